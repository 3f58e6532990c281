//! Code that a thread is in the middle of, by what its stack returns to.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use proc::{HostPid, Range};

/// Bytes of the stack that are searched, from the stack pointer on. Below the frames of a library that waits are at
/// most those of a few functions of the C library, which are small.
const DEPTH: usize = 4096;

/// Code of a library in a process.
pub struct Code {
    pid: HostPid,
    ranges: Vec<Range>,
    memory: File,
}

impl Code {
    /// Finds the code of the files whose path matches.
    ///
    /// # Errors
    /// There is no such process.
    pub fn of(pid: HostPid, matches: impl Fn(&Path) -> bool) -> io::Result<Self> {
        let mappings = proc::mappings(pid)?.into_iter();
        let ranges = mappings.filter(|mapping| mapping.is_executable() && matches(&mapping.path));
        let ranges = ranges.map(|mapping| mapping.range).collect();
        Ok(Self { pid, ranges, memory: File::open(format!("/proc/{pid}/mem"))? })
    }

    /// Returns whether a thread that stands still is in the middle of a call of the library: its program counter, or a
    /// word of the innermost part of its stack, points to the code.
    ///
    /// A word that a call has left behind counts too. So the answer may be `true` for a thread that has left the library.
    ///
    /// # Errors
    /// There is no such thread, or the thread runs.
    pub fn is_called_by(&self, tid: i32) -> io::Result<bool> {
        if self.ranges.is_empty() {
            return Ok(false);
        }
        let (stack, counter) = place(self.pid, tid)?;
        let mut bytes = [0; DEPTH];
        // Less comes where the stack ends.
        let length = self.memory.read_at(&mut bytes, stack & !7)?;
        let words = bytes[..length].chunks_exact(8).map(|word| word.try_into().map_or(0, u64::from_ne_bytes));
        let mut addresses = words.chain([counter]);
        Ok(addresses.any(|address| self.ranges.iter().any(|range| (range.start..range.end).contains(&address))))
    }
}

/// Returns the stack pointer and the program counter of a thread.
fn place(pid: HostPid, tid: i32) -> io::Result<(u64, u64)> {
    // The call's number and arguments, or -1; the stack pointer and the program counter come last.
    let text = fs::read_to_string(format!("/proc/{pid}/task/{tid}/syscall"))?;
    let mut last = text.split_whitespace().rev().map(|word| {
        let digits = word.strip_prefix("0x").ok_or(io::ErrorKind::WouldBlock)?;
        u64::from_str_radix(digits, 16).map_err(io::Error::other)
    });
    let mut next = || last.next().unwrap_or_else(|| Err(io::ErrorKind::WouldBlock.into()));
    let counter = next()?;
    Ok((next()?, counter))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hold::Hold;
    use support::{Program, soon};

    /// A library that is mapped, and that nobody calls before a panic.
    fn is_unwinder(path: &Path) -> bool {
        path.file_name().is_some_and(|file| file.to_string_lossy().starts_with("libgcc_s"))
    }

    #[test]
    fn a_thread_is_in_the_libraries_that_its_stack_returns_to_and_in_no_other() {
        let program = Program::play("many");
        let mut hold = Hold::new(crate::spared);
        hold.take(program.pid).unwrap();
        hold.settle(soon()).unwrap();
        let test = std::env::current_exe().unwrap();
        assert!(proc::mappings(program.pid).unwrap().iter().any(|mapping| is_unwinder(&mapping.path)));
        let threads = proc::threads(program.pid).unwrap();
        // The driver's thread runs on, and only looks held while it sleeps.
        let spared = crate::spared(program.pid, &threads);
        let tids = threads.iter().map(|thread| thread.tid).filter(|tid| !spared.contains(tid));
        let held: Vec<i32> = tids.filter(|tid| place(program.pid, *tid).is_ok()).collect();
        assert!(held.len() >= 4, "{held:?}");
        let own = Code::of(program.pid, |path| path == test).unwrap();
        for tid in &held {
            assert!(own.is_called_by(*tid).unwrap(), "thread {tid}");
        }
        let unwinder = Code::of(program.pid, is_unwinder).unwrap();
        // A word that was left behind may say otherwise of one of them.
        assert!(held.iter().any(|tid| !unwinder.is_called_by(*tid).unwrap()));
    }

    #[test]
    fn a_thread_that_runs_is_in_an_unknown_place() {
        let program = Program::play("many");
        let found = proc::tids(program.pid).unwrap().into_iter().map(|tid| place(program.pid, tid));
        assert!(found.filter_map(Result::err).any(|error| error.kind() == io::ErrorKind::WouldBlock));
    }
}
