//! Loading of a container's seccomp filter at the right moment.
//!
//! Without `noNewPrivileges` only a privileged process may load a filter, so the load comes before
//! the process drops capabilities. With `noNewPrivileges` the load comes as late as possible: the
//! filter then need not allow the steps before the user's program.
//!
//! libcontainer does neither for further processes of a container, and takes an explicit
//! `noNewPrivileges: false` for true. libcontainer also exchanges the two values of a masked
//! comparison: with the profile of most containers, processes may then make user namespaces. A
//! filter with a listener is left to libcontainer, with the values exchanged: the listener's
//! descriptor comes from another process.

use std::path::Path;

use libcontainer::capabilities::drop_privileges;
use libcontainer::seccomp::is_notify;
use libcontainer::syscall::syscall::create_syscall;
use oci_spec::runtime::{
    Capabilities, Capability, Linux, LinuxCapabilities, LinuxSeccomp, LinuxSeccompArgBuilder, LinuxSeccompFilterFlag,
    LinuxSeccompOperator, Process,
};

use super::error::{Result, chain};
use super::{filter, preparation};
use crate::Prepare;
use crate::libcontainer::sys;

/// Folder of a kernel with seccomp filters.
const SECCOMP: &str = "/proc/sys/kernel/seccomp";
/// Capabilities for loading a filter, and for dropping that capability from the bounding set.
const TO_LOAD: [Capability; 2] = [Capability::SysAdmin, Capability::Setpcap];

/// Filters of a process, and the moment of their load.
#[derive(Clone, Debug)]
pub(super) struct Filter {
    /// In the order of the load: programs, with their flags.
    programs: Vec<(Vec<u64>, u64)>,
    moment: Moment,
}

#[derive(Clone, Debug)]
enum Moment {
    /// Just before the wait for the start. The process's capabilities become these then.
    Privileged(Box<LinuxCapabilities>),
    /// Right before the user's program.
    Last,
}

impl Filter {
    /// Takes the filter out of the specification, adds that of the preparation, and gives the process
    /// the capabilities for the load. A profile with a listener stays alone: libcontainer loads it
    /// before, and it may refuse another.
    pub(super) fn take(process: &mut Process, linux: &mut Linux, prepare: Prepare) -> Result<Option<Self>> {
        let profile = linux.seccomp().clone();
        if let Some(profile) = profile.as_ref().filter(|profile| is_notify(profile)) {
            linux.set_seccomp(Some(exchanged(profile)?));
            return Ok(None);
        }
        let mut programs = Vec::new();
        if prepare == Prepare::Seccomp && Path::new(SECCOMP).exists() {
            programs.push((preparation::program(), libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW));
        }
        if let Some(profile) = profile {
            programs.push((filter::program(&profile)?, flags(&profile)));
        }
        if programs.is_empty() {
            return Ok(None);
        }
        linux.set_seccomp(None);
        let moment = if process.no_new_privileges() == Some(true) {
            Moment::Last
        } else {
            let last = process.capabilities().clone().unwrap_or_default();
            let mut until_loaded = last.clone();
            let extended = |set: &Option<Capabilities>| {
                let mut set = set.clone().unwrap_or_default();
                set.extend(TO_LOAD);
                Some(set)
            };
            until_loaded.set_bounding(extended(last.bounding()));
            until_loaded.set_permitted(extended(last.permitted()));
            until_loaded.set_effective(extended(last.effective()));
            process.set_capabilities(Some(until_loaded));
            Moment::Privileged(Box::new(last))
        };
        Ok(Some(Self { programs, moment }))
    }

    /// Loads a privileged filter. Called just before the process waits for its start.
    pub(super) fn before_start(&self) -> std::result::Result<(), String> {
        let Moment::Privileged(last) = &self.moment else { return Ok(()) };
        self.load()?;
        drop_privileges(last, &*create_syscall())
            .map_err(|error| format!("cannot drop capabilities: {}", chain(&error)))
    }

    /// Loads an unprivileged filter. Called right before the user's program.
    pub(super) fn before_exec(&self) -> std::result::Result<(), String> {
        match self.moment {
            Moment::Privileged(_) => Ok(()),
            Moment::Last => self.load(),
        }
    }

    fn load(&self) -> std::result::Result<(), String> {
        let load = |(program, flags): &(Vec<u64>, u64)| sys::load_filter(program, *flags);
        self.programs.iter().try_for_each(load).map_err(|error| format!("cannot load the seccomp filter: {error}"))
    }
}

/// Returns the flags, by default runc's: on a kernel before 5.16 a filter would cost every program
/// a tenth of its speed.
fn flags(profile: &LinuxSeccomp) -> u64 {
    let Some(flags) = profile.flags() else { return libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW };
    flags.iter().fold(0, |all, flag| {
        all | match flag {
            LinuxSeccompFilterFlag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
            LinuxSeccompFilterFlag::SeccompFilterFlagTsync => libc::SECCOMP_FILTER_FLAG_TSYNC,
            LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
            // This flag is for listeners only, and refused without one.
            LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => 0,
        }
    })
}

/// Returns the profile with the values of masked comparisons exchanged, in libcontainer's order.
fn exchanged(profile: &LinuxSeccomp) -> Result<LinuxSeccomp> {
    let mut profile = profile.clone();
    let mut rules = profile.syscalls().clone();
    for rule in rules.iter_mut().flatten() {
        let mut arguments = rule.args().clone();
        for argument in arguments.iter_mut().flatten() {
            if argument.op() == LinuxSeccompOperator::ScmpCmpMaskedEq {
                *argument = LinuxSeccompArgBuilder::default()
                    .index(argument.index())
                    .op(argument.op())
                    .value(argument.value_two().unwrap_or_default())
                    .value_two(argument.value())
                    .build()?;
            }
        }
        rule.set_args(arguments);
    }
    profile.set_syscalls(rules);
    Ok(profile)
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::{
        LinuxBuilder, LinuxSeccompAction, LinuxSeccompBuilder, LinuxSyscallBuilder, ProcessBuilder,
    };

    use super::*;

    fn take(no_new_privileges: Option<bool>, action: LinuxSeccompAction) -> (Option<Filter>, Process, Linux) {
        let none = || Some(Capabilities::new());
        let mut capabilities = LinuxCapabilities::default();
        capabilities.set_bounding(none()).set_effective(none()).set_permitted(none());
        capabilities.set_inheritable(none()).set_ambient(none());
        let mut process = ProcessBuilder::default().capabilities(capabilities).build().unwrap();
        process.set_no_new_privileges(no_new_privileges);
        let argument = LinuxSeccompArgBuilder::default()
            .index(0_usize)
            .op(LinuxSeccompOperator::ScmpCmpMaskedEq)
            .value(7_u64)
            .value_two(1_u64)
            .build()
            .unwrap();
        let rule =
            LinuxSyscallBuilder::default().names(vec!["clone".to_owned()]).action(action).args(vec![argument]).build();
        let profile = LinuxSeccompBuilder::default()
            .default_action(LinuxSeccompAction::ScmpActErrno)
            .syscalls(vec![rule.unwrap()])
            .build()
            .unwrap();
        let mut linux = LinuxBuilder::default().seccomp(profile).build().unwrap();
        (Filter::take(&mut process, &mut linux, Prepare::Seccomp).unwrap(), process, linux)
    }

    #[test]
    fn a_prepared_container_has_a_filter_of_its_own_before_the_profiles() {
        let (filter, ..) = take(Some(true), LinuxSeccompAction::ScmpActAllow);
        let programs = filter.unwrap().programs;
        assert_eq!((programs.len(), &programs[0].0), (2, &preparation::program()));
        let (mut process, mut linux) = (Process::default(), Linux::default());
        linux.set_seccomp(None);
        let mut alone = |prepare| Filter::take(&mut process, &mut linux, prepare).unwrap();
        assert!(alone(Prepare::Nothing).is_none());
        assert_eq!(alone(Prepare::Seccomp).unwrap().programs.len(), 1);
    }

    #[test]
    fn a_process_without_privileges_loads_its_filter_last() {
        let (filter, process, linux) = take(Some(true), LinuxSeccompAction::ScmpActAllow);
        assert!(matches!(filter.unwrap().moment, Moment::Last));
        assert!(process.capabilities().as_ref().unwrap().effective().as_ref().unwrap().is_empty());
        assert_eq!(linux.seccomp(), &None);
    }

    #[test]
    fn capabilities_for_loading_a_filter_are_dropped_afterwards() {
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
    fn a_filter_with_a_listener_stays_and_means_what_it_says() {
        let (filter, _, linux) = take(None, LinuxSeccompAction::ScmpActNotify);
        assert!(filter.is_none());
        let rules = linux.seccomp().as_ref().unwrap().syscalls().as_ref().unwrap();
        let argument = &rules[0].args().as_ref().unwrap()[0];
        assert_eq!((argument.value(), argument.value_two()), (1, Some(7)));
    }
}
