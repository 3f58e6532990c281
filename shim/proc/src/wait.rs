//! Waits of threads in the kernel.

use std::fmt;
use std::fs;

use crate::{HostPid, Stat, thread_name};

/// A thread and its activity at one moment, as far as the kernel tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wait {
    /// Process of the thread.
    pub pid: HostPid,
    /// Id of the thread.
    pub tid: i32,
    /// Name of the thread; empty when the thread is gone.
    pub name: String,
    /// State by proc_pid_stat(5): R, S, D, T, t, Z; `?` when the thread is gone.
    pub state: char,
    /// Function of the kernel in which the thread waits; empty when the thread runs or the kernel does not tell.
    pub place: String,
    /// Number of the system call that the thread is in.
    pub syscall: Option<i64>,
}

impl Wait {
    /// Returns the activity of a thread at this moment.
    #[must_use]
    pub fn of(pid: HostPid, tid: i32) -> Self {
        let read = |file: &str| fs::read_to_string(pid.path(&format!("task/{tid}/{file}"))).unwrap_or_default();
        let place = read("wchan");
        Self {
            pid,
            tid,
            name: thread_name(pid, tid).unwrap_or_default(),
            state: Stat::of_thread(pid, tid).map_or('?', |stat| char::from(stat.state())),
            place: if place == "0" { String::new() } else { place },
            syscall: read("syscall").split_whitespace().next().and_then(|number| number.parse().ok()),
        }
    }

    /// Returns whether the thread waits in a way that no signal and no freezer ends.
    #[must_use]
    pub fn is_uninterruptible(&self) -> bool {
        self.state == 'D'
    }
}

impl fmt::Display for Wait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pid, tid, name, state, place, syscall } = self;
        write!(f, "thread {tid} ({name}) of process {pid} ")?;
        match state {
            'D' => write!(f, "waits uninterruptibly")?,
            _ => write!(f, "is in state {state}")?,
        }
        if !place.is_empty() {
            write!(f, " in {place}")?;
        }
        match syscall {
            Some(number) if *number >= 0 => write!(f, ", in system call {number}"),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wait(state: char, place: &str, syscall: Option<i64>) -> String {
        let (pid, name) = (HostPid::own(), "sh".to_owned());
        let wait = Wait { pid, tid: 7, name, state, place: place.to_owned(), syscall };
        wait.to_string().replace(&pid.to_string(), "PID")
    }

    #[test]
    fn a_wait_is_told_with_all_that_is_known_of_it() {
        let uninterruptible = "thread 7 (sh) of process PID waits uninterruptibly in rpc_wait, in system call 0";
        assert_eq!(wait('D', "rpc_wait", Some(0)), uninterruptible);
        assert_eq!(wait('S', "", Some(-1)), "thread 7 (sh) of process PID is in state S");
        assert_eq!(wait('?', "", None), "thread 7 (sh) of process PID is in state ?");
    }

    #[test]
    fn a_thread_that_looks_at_itself_runs() {
        let tid = rustix::thread::gettid().as_raw_nonzero().get();
        let own = Wait::of(HostPid::own(), tid);
        assert_eq!((own.state, own.place.as_str(), own.is_uninterruptible()), ('R', "", false));
        let gone = Wait::of(HostPid::own(), 1 << 23);
        assert_eq!((gone.state, gone.name.as_str(), gone.syscall), ('?', "", None));
    }
}
