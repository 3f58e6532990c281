//! `/proc/PID/status`.

use std::fmt;
use std::fs;
use std::io;

use crate::HostPid;

/// Contents of `/proc/PID/status` for a process or a thread, proc_pid_status(5).
#[derive(Clone, Debug)]
pub struct Status(Vec<u8>);

/// The capability sets of a thread, one bit a capability.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// Kept over an exec.
    pub inheritable: u64,
    /// May be made effective.
    pub permitted: u64,
    /// In force.
    pub effective: u64,
    /// Limit of an exec's gain.
    pub bounding: u64,
    /// Given to programs without file capabilities.
    pub ambient: u64,
}

/// Filter of a thread's system calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seccomp {
    /// All calls are allowed.
    Disabled,
    /// Only read, write, exit and sigreturn are allowed.
    Strict,
    /// A program decides.
    Filter,
}

impl Status {
    /// Reads the file for a process.
    ///
    /// # Errors
    /// Fails if there is no such process.
    pub fn of(pid: HostPid) -> io::Result<Self> {
        fs::read(pid.path("status")).map(Self)
    }

    /// Reads the file for a thread.
    ///
    /// # Errors
    /// Fails if there is no such thread.
    pub fn of_thread(pid: HostPid, tid: i32) -> io::Result<Self> {
        fs::read(pid.path(&format!("task/{tid}/status"))).map(Self)
    }

    /// Takes the file's text. [`Self::field`] also reads files of the same form, such as
    /// `/proc/PID/fdinfo/FD`.
    #[must_use]
    pub fn parse(text: Vec<u8>) -> Self {
        Self(text)
    }

    /// Returns the value of a line. `None` without such a line, or for bytes outside UTF-8, as
    /// possible in the name.
    #[must_use]
    pub fn field(&self, key: &str) -> Option<&str> {
        let value = self.0.split(|byte| *byte == b'\n').find_map(|line| {
            let value = line.strip_prefix(key.as_bytes())?.strip_prefix(b":")?;
            Some(value)
        })?;
        std::str::from_utf8(value).ok().map(str::trim)
    }

    /// Returns the value of a line as a number in base 10.
    #[must_use]
    pub fn number(&self, key: &str) -> Option<i32> {
        self.field(key)?.parse().ok()
    }

    /// Returns the value of a line with a set of bits, in base 16.
    #[must_use]
    pub fn bits(&self, key: &str) -> Option<u64> {
        u64::from_str_radix(self.field(key)?, 16).ok()
    }

    /// Returns the letter of the state; `None` if the kernel left it out.
    #[must_use]
    pub fn state(&self) -> Option<u8> {
        self.field("State")?.bytes().next()
    }

    /// Returns the tracing thread, if there is one in this process's pid namespace.
    #[must_use]
    pub fn tracer(&self) -> Option<HostPid> {
        HostPid::new(self.number("TracerPid")?)
    }

    /// Returns the pid in each pid namespace of the process, from the one of /proc to the
    /// innermost.
    #[must_use]
    pub fn namespace_pids(&self) -> Vec<i32> {
        let pids = self.field("NSpid").unwrap_or_default();
        pids.split_ascii_whitespace().filter_map(|pid| pid.parse().ok()).collect()
    }

    /// Returns the blocked signals, signal N as bit N - 1.
    #[must_use]
    pub fn blocked_signals(&self) -> Option<u64> {
        self.bits("SigBlk")
    }

    /// Returns the filter of system calls; `None` if the kernel has no filters.
    #[must_use]
    pub fn seccomp(&self) -> Option<Seccomp> {
        match self.number("Seccomp")? {
            0 => Some(Seccomp::Disabled),
            1 => Some(Seccomp::Strict),
            _ => Some(Seccomp::Filter),
        }
    }

    /// Returns whether an exec can gain no privileges (`no_new_privs`).
    #[must_use]
    pub fn has_no_new_privileges(&self) -> Option<bool> {
        self.number("NoNewPrivs").map(|set| set != 0)
    }

    /// Returns the capability sets; `None` unless all are present.
    #[must_use]
    pub fn capabilities(&self) -> Option<Capabilities> {
        Some(Capabilities {
            inheritable: self.bits("CapInh")?,
            permitted: self.bits("CapPrm")?,
            effective: self.bits("CapEff")?,
            bounding: self.bits("CapBnd")?,
            // Missing in kernels before 4.3.
            ambient: self.bits("CapAmb").unwrap_or(0),
        })
    }
}

impl fmt::Display for Seccomp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Disabled => "no filter",
            Self::Strict => "strict mode",
            Self::Filter => "a filter",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "Name:\tweird\nState:\tT (stopped)\nTracerPid:\t0\nNSpid:\t300\t7\t1\nNoNewPrivs:\t1\n\
        SigBlk:\t0000000000010002\nCapInh:\t0000000000000000\nCapPrm:\t00000000a80425fb\nCapEff:\t00000000a80425fb\n\
        CapBnd:\t000001ffffffffff\nCapAmb:\t0000000000000001\nSeccomp:\t2\nSeccomp_filters:\t1\n";

    #[test]
    fn every_line_that_is_asked_for_is_found() {
        let status = Status::parse(TEXT.into());
        assert_eq!((status.state(), status.tracer()), (Some(b'T'), None));
        assert_eq!(status.namespace_pids(), [300, 7, 1]);
        assert_eq!(status.has_no_new_privileges(), Some(true));
        assert_eq!(status.blocked_signals(), Some(0x1_0002));
        assert_eq!(status.seccomp(), Some(Seccomp::Filter), "not the line Seccomp_filters");
        let expected = Capabilities {
            inheritable: 0,
            permitted: 0xa804_25fb,
            effective: 0xa804_25fb,
            bounding: 0x1ff_ffff_ffff,
            ambient: 1,
        };
        assert_eq!(status.capabilities(), Some(expected));
    }

    #[test]
    fn a_name_that_is_not_utf8_hides_no_other_line() {
        let status = Status::parse(b"Name:\t\xff\xfe\nTracerPid:\t12\n".to_vec());
        assert_eq!((status.field("Name"), status.tracer()), (None, HostPid::new(12)));
        assert_eq!((status.seccomp(), status.capabilities()), (None, None));
    }

    #[test]
    fn this_process_has_a_status() {
        let own = Status::of(HostPid::own()).unwrap();
        assert!(own.capabilities().is_some());
        assert_eq!(own.namespace_pids().first(), Some(&HostPid::own().raw()));
    }
}
