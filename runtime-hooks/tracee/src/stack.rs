//! Code that a thread is in the middle of, by what its stack returns to.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::process::{self, Range};

/// Bytes of the stack that are searched, from the stack pointer on. Below the frames of a library that waits are at
/// most those of a few functions of the C library, which are small.
const DEPTH: usize = 4096;

/// Returns whether a thread that stands still is in the middle of a call of a library: its program counter, or a word
/// of the innermost part of its stack, points to code of a file whose path matches.
///
/// A word that a call has left behind counts too. So the answer may be `true` for a thread that has left the library.
///
/// # Errors
/// When there is no such thread, or the thread runs.
pub fn is_in(pid: i32, tid: i32, matches: impl Fn(&Path) -> bool) -> io::Result<bool> {
    let mappings = process::mappings(pid)?;
    let library = mappings.iter().filter(|mapping| mapping.is_executable() && matches(&mapping.path));
    let code: Vec<Range> = library.map(|mapping| mapping.range).collect();
    if code.is_empty() {
        return Ok(false);
    }
    let is_code = |address: u64| code.iter().any(|range| range.start <= address && address < range.end);
    let (stack, counter) = place(pid, tid)?;
    Ok(is_code(counter) || words(pid, stack)?.any(is_code))
}

/// Returns the stack pointer and the program counter of a thread.
fn place(pid: i32, tid: i32) -> io::Result<(u64, u64)> {
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

/// Returns the words of the stack from an address on.
fn words(pid: i32, stack: u64) -> io::Result<impl Iterator<Item = u64>> {
    let mut bytes = vec![0; DEPTH];
    let memory = File::open(format!("/proc/{pid}/mem"))?;
    // Less comes where the stack ends.
    let length = memory.read_at(&mut bytes, stack & !7)?;
    bytes.truncate(length);
    let words = bytes.chunks_exact(8).map(|word| word.try_into().map_or(0, u64::from_ne_bytes));
    Ok(words.collect::<Vec<_>>().into_iter())
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
        assert!(process::mappings(program.pid).unwrap().iter().any(|mapping| is_unwinder(&mapping.path)));
        let tids = process::tids(program.pid).unwrap();
        let held: Vec<i32> = tids.into_iter().filter(|tid| place(program.pid, *tid).is_ok()).collect();
        assert!(held.len() >= 4, "{held:?}");
        for tid in &held {
            assert!(is_in(program.pid, *tid, |path| path == test).unwrap(), "thread {tid}");
        }
        // A word that was left behind may say otherwise of one of them.
        assert!(held.iter().any(|tid| !is_in(program.pid, *tid, is_unwinder).unwrap()));
    }

    #[test]
    fn a_thread_that_runs_is_in_an_unknown_place() {
        let program = Program::play("many");
        let found = process::tids(program.pid).unwrap().into_iter().map(|tid| place(program.pid, tid));
        assert!(found.filter_map(Result::err).any(|error| error.kind() == io::ErrorKind::WouldBlock));
    }
}
