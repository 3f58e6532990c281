//! Loading a container's seccomp filter, at the right moment and with runc's answer to system calls of the future.
//!
//! Without `noNewPrivileges` only a privileged process may load a filter, so it must happen before the process gives up
//! its capabilities; with it, as late as can be, so that the filter need not allow what the process does before it is
//! the user's. libcontainer does neither for further processes of a container, and for its first process takes an
//! explicit `noNewPrivileges: false` for true. A filter that reports to a listener is left to libcontainer: the listener
//! gets its descriptor from another process.

use std::fmt::Display;

use libcontainer::capabilities::drop_privileges;
use libcontainer::seccomp::{initialize_seccomp, is_notify};
use libcontainer::syscall::syscall::create_syscall;
use libseccomp::ScmpSyscall;
use oci_spec::runtime::{
    Capability, Linux, LinuxCapabilities, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompFilterFlag, LinuxSyscall,
    Process,
};

use super::error::chain;
use crate::libcontainer::sys;

/// To load a filter, and to give up from the bounding set the capability that this takes.
const TO_LOAD: [Capability; 2] = [Capability::SysAdmin, Capability::Setpcap];

/// A filter, and when to load it.
#[derive(Clone, Debug)]
pub(super) struct Filter {
    profile: LinuxSeccomp,
    moment: Moment,
}

#[derive(Clone, Debug)]
enum Moment {
    /// When the process is about to wait for its start. Then its capabilities become these.
    Privileged(Box<LinuxCapabilities>),
    /// Right before it becomes the user's program.
    Last,
}

impl Filter {
    /// Takes the filter out of the specification, and gives the process the capabilities that it takes to load it.
    pub(super) fn take(process: &mut Process, linux: &mut Linux) -> Option<Self> {
        let mut profile = linux.seccomp().clone().filter(|profile| !is_notify(profile))?;
        linux.set_seccomp(None);
        // runc's default: on a kernel before 5.16 a filter costs every program in it a tenth of its speed otherwise.
        if profile.flags().is_none() {
            profile.set_flags(Some(vec![LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow]));
        }
        let moment = if process.no_new_privileges() == Some(true) {
            Moment::Last
        } else {
            let last = process.capabilities().clone().unwrap_or_default();
            let mut until_loaded = last.clone();
            let extended = |set: &Option<_>| -> Option<_> {
                let mut set: oci_spec::runtime::Capabilities = set.clone().unwrap_or_default();
                set.extend(TO_LOAD);
                Some(set)
            };
            until_loaded.set_bounding(extended(last.bounding()));
            until_loaded.set_permitted(extended(last.permitted()));
            until_loaded.set_effective(extended(last.effective()));
            process.set_capabilities(Some(until_loaded));
            Moment::Privileged(Box::new(last))
        };
        Some(Self { profile, moment })
    }

    /// To be called when the process is about to wait for its start.
    pub(super) fn before_start(&self) -> Result<(), String> {
        let Moment::Privileged(last) = &self.moment else { return Ok(()) };
        self.load()?;
        drop_privileges(last, &*create_syscall())
            .map_err(|error| format!("cannot drop capabilities: {}", chain(&error)))
    }

    /// To be called right before the process becomes the user's program.
    pub(super) fn before_exec(&self) -> Result<(), String> {
        match self.moment {
            Moment::Privileged(_) => Ok(()),
            Moment::Last => self.load(),
        }
    }

    fn load(&self) -> Result<(), String> {
        fn cannot(error: impl Display) -> String {
            format!("cannot load the seccomp filter: {error}")
        }
        initialize_seccomp(&self.profile).map_err(|error| cannot(chain(&error)))?;
        match newest(&self.profile) {
            Some(newest) => sys::load_filter(&unknown_to_it(newest)).map_err(cannot),
            None => Ok(()),
        }
    }
}

/// The number of the newest system call that a profile knows, if those it cannot know are to be answered by ENOSYS.
///
/// A profile that lists what is allowed answers EPERM to all else. To a system call that is newer than the profile that
/// is the wrong answer: the C library in the container takes it for a refusal, while ENOSYS would have it do without.
fn newest(profile: &LinuxSeccomp) -> Option<u32> {
    let refuses = profile.default_action() == LinuxSeccompAction::ScmpActErrno;
    let errno = profile.default_errno_ret().unwrap_or(libc::EPERM.unsigned_abs());
    // The answer is a second filter, for which the first must let it be loaded.
    let allows_loading = profile.syscalls().iter().flatten().any(|rule| allows_always(rule, "seccomp"));
    if !refuses || errno == libc::ENOSYS.unsigned_abs() || !allows_loading {
        return None;
    }
    let names = profile.syscalls().iter().flatten().flat_map(LinuxSyscall::names);
    names
        .filter_map(|name| ScmpSyscall::from_name(name).ok())
        // Numbers that libseccomp made up, for what another architecture has, are negative.
        .filter_map(|syscall| u32::try_from(i32::from(syscall)).ok())
        .max()
        // From here on every architecture has the same numbers.
        .filter(|&newest| newest >= 424)
}

fn allows_always(rule: &LinuxSyscall, name: &str) -> bool {
    rule.action() == LinuxSeccompAction::ScmpActAllow
        && rule.args().as_ref().is_none_or(Vec::is_empty)
        && rule.names().iter().any(|named| named == name)
}

/// A filter that answers ENOSYS to all that is newer. Where several filters refuse, the one loaded last has the word.
fn unknown_to_it(newest: u32) -> [libc::sock_filter; 5] {
    /// Marks the numbers of x32, which are those of x86-64 otherwise.
    const X32: u32 = 0x4000_0000;
    const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
    const AND: u16 = 0x54; // BPF_ALU | BPF_AND | BPF_K
    const JUMP_IF_GREATER: u16 = 0x25; // BPF_JMP | BPF_JGT | BPF_K
    const RETURN: u16 = 0x06; // BPF_RET | BPF_K
    let instruction = |code, jt, k| libc::sock_filter { code, jt, jf: 0, k };
    [
        // The number is the first member of struct seccomp_data.
        instruction(LOAD, 0, 0),
        instruction(AND, 0, !X32),
        instruction(JUMP_IF_GREATER, 1, newest),
        instruction(RETURN, 0, libc::SECCOMP_RET_ALLOW),
        instruction(RETURN, 0, libc::SECCOMP_RET_ERRNO | libc::ENOSYS.unsigned_abs()),
    ]
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::{LinuxBuilder, LinuxSeccompBuilder, LinuxSyscallBuilder, ProcessBuilder};

    use super::*;

    fn profile(default: LinuxSeccompAction, allowed: &[&str]) -> LinuxSeccomp {
        profile_with(default, LinuxSeccompAction::ScmpActAllow, allowed)
    }

    fn profile_with(default: LinuxSeccompAction, action: LinuxSeccompAction, allowed: &[&str]) -> LinuxSeccomp {
        let names = allowed.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
        let rule = LinuxSyscallBuilder::default().names(names).action(action).build().unwrap();
        LinuxSeccompBuilder::default().default_action(default).syscalls(vec![rule]).build().unwrap()
    }

    #[test]
    fn what_is_newer_than_the_profile_is_unknown() {
        let refuse = LinuxSeccompAction::ScmpActErrno;
        assert_eq!(newest(&profile(refuse, &["read", "seccomp", "openat2", "clone3", "not_a_call"])), Some(437));
        // Nothing tells how new it is.
        assert_eq!(newest(&profile(refuse, &["read", "seccomp"])), None);
        // The second filter could not be loaded.
        assert_eq!(newest(&profile(refuse, &["read", "openat2"])), None);
        assert_eq!(newest(&profile(LinuxSeccompAction::ScmpActAllow, &["seccomp", "openat2"])), None);
        assert_eq!(newest(&profile(LinuxSeccompAction::ScmpActKillProcess, &["seccomp", "openat2"])), None);
    }

    fn take(no_new_privileges: Option<bool>, action: LinuxSeccompAction) -> (Option<Filter>, Process, Linux) {
        let none = || Some(oci_spec::runtime::Capabilities::new());
        let mut capabilities = LinuxCapabilities::default();
        capabilities.set_bounding(none()).set_effective(none()).set_permitted(none());
        capabilities.set_inheritable(none()).set_ambient(none());
        let mut process = ProcessBuilder::default().capabilities(capabilities).build().unwrap();
        process.set_no_new_privileges(no_new_privileges);
        let profile = profile_with(LinuxSeccompAction::ScmpActErrno, action, &["read"]);
        let mut linux = LinuxBuilder::default().seccomp(profile).build().unwrap();
        (Filter::take(&mut process, &mut linux), process, linux)
    }

    #[test]
    fn a_process_without_privileges_loads_its_filter_last() {
        let (filter, process, linux) = take(Some(true), LinuxSeccompAction::ScmpActAllow);
        assert!(matches!(filter.unwrap().moment, Moment::Last));
        assert!(process.capabilities().as_ref().unwrap().effective().as_ref().unwrap().is_empty());
        assert_eq!(linux.seccomp(), &None);
    }

    #[test]
    fn what_it_takes_to_load_a_filter_is_given_up_afterwards() {
        let (filter, process, linux) = take(None, LinuxSeccompAction::ScmpActAllow);
        let until_loaded = process.capabilities().as_ref().unwrap();
        for set in [until_loaded.bounding(), until_loaded.effective(), until_loaded.permitted()] {
            assert_eq!(set.as_ref().unwrap(), &TO_LOAD.into_iter().collect());
        }
        assert!(until_loaded.ambient().as_ref().unwrap().is_empty());
        let Moment::Privileged(last) = filter.unwrap().moment else { panic!("loaded too late") };
        assert!(last.bounding().as_ref().unwrap().is_empty());
        assert_eq!(linux.seccomp(), &None);
    }

    #[test]
    fn a_filter_with_a_listener_stays_where_it_is() {
        let (filter, _, linux) = take(None, LinuxSeccompAction::ScmpActNotify);
        assert!(filter.is_none());
        assert!(linux.seccomp().is_some());
    }
}
