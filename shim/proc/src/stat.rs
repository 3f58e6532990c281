//! `/proc/PID/stat`.

use std::fs;
use std::io;

use crate::{HostPid, malformed};

/// Contents of `/proc/PID/stat` for a process or a thread, proc_pid_stat(5).
#[derive(Clone, Debug)]
pub struct Stat {
    /// The fields from the third on, as text.
    fields: String,
}

impl Stat {
    /// Reads the file for a process.
    ///
    /// # Errors
    /// Fails if there is no such process.
    pub fn of(pid: HostPid) -> io::Result<Self> {
        Self::parse(&fs::read(pid.path("stat"))?).ok_or_else(|| malformed(pid, "stat"))
    }

    /// Reads the file for a thread.
    ///
    /// # Errors
    /// Fails if there is no such thread.
    pub fn of_thread(pid: HostPid, tid: i32) -> io::Result<Self> {
        Self::parse(&fs::read(pid.path(&format!("task/{tid}/stat")))?).ok_or_else(|| malformed(pid, "task/TID/stat"))
    }

    /// Parses the file's text. The name, the second field, is in parentheses and may hold anything.
    #[must_use]
    pub fn parse(text: &[u8]) -> Option<Self> {
        let end = text.iter().rposition(|byte| *byte == b')')?;
        let fields = std::str::from_utf8(text.get(end + 2..)?).ok()?.to_owned();
        (!fields.is_empty()).then_some(Self { fields })
    }

    /// Returns the letter of the state: `b'R'`, `b'S'`, `b'D'`, `b'Z'`, ...
    #[must_use]
    pub fn state(&self) -> u8 {
        // Not empty: checked by parse().
        self.fields.as_bytes().first().copied().unwrap_or(b'X')
    }

    /// Returns whether the process has ended: a zombie, or on the way to be gone.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        matches!(self.state(), b'Z' | b'X' | b'x')
    }

    /// Returns the pid of the parent; `None` if the parent is outside the visible namespaces.
    #[must_use]
    pub fn parent(&self) -> Option<HostPid> {
        HostPid::new(i32::try_from(self.field(4)?).ok()?)
    }

    /// Returns the time of the start, in clock ticks since boot.
    #[must_use]
    pub fn start_time(&self) -> Option<u64> {
        self.field(22)
    }

    /// Returns a numeric field by its number in proc_pid_stat(5), from 4 on. `None` for a missing
    /// or negative field.
    #[must_use]
    pub fn field(&self, number: usize) -> Option<u64> {
        self.fields.split_ascii_whitespace().nth(number.checked_sub(3)?)?.parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_brackets_does_not_hide_the_fields_behind_it() {
        let text = b"7 (a) S) (b) R 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4711 10 20\n";
        let stat = Stat::parse(text).unwrap();
        assert_eq!((stat.state(), stat.parent(), stat.start_time()), (b'R', HostPid::new(1), Some(4711)));
        assert_eq!((stat.field(8), stat.field(24), stat.field(25)), (None, Some(20), None));
    }

    #[test]
    fn half_a_line_is_no_stat() {
        for text in ["", "7", "7 (x", "7 (x)", "7 (x) "] {
            assert!(Stat::parse(text.as_bytes()).is_none(), "{text:?}");
        }
        assert_eq!(Stat::parse(b"7 (x) R 1").unwrap().start_time(), None);
    }

    #[test]
    fn a_process_whose_parent_is_outside_has_none() {
        assert_eq!(Stat::parse(b"7 (x) Z 0 7").unwrap().parent(), None);
        assert!(Stat::parse(b"7 (x) Z 0 7").unwrap().has_ended());
    }

    #[test]
    fn this_process_is_alive() {
        let own = Stat::of(HostPid::own()).unwrap();
        assert!(!own.has_ended());
        assert_eq!(own.parent().map(HostPid::raw), rustix::process::getppid().map(|pid| pid.as_raw_nonzero().get()));
    }
}
