//! State of a process by /proc: mappings, descriptors, threads, and whether the process runs.
//!
//! All functions look at one moment: the process can end, and its pid can be another's, right after. Code that keeps a
//! pid over time keeps a `proc::ProcessHandle`.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use proc::{HostPid, ProcessIds};
pub use proc::{Mapping, Range, Thread};

/// A mapping of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceMapping {
    /// The first address.
    pub start: u64,
    /// The address after the last one.
    pub end: u64,
    /// The file, as /proc/PID/maps names it: with " (deleted)" behind the name if it is.
    pub path: PathBuf,
}

/// A descriptor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceFd {
    /// The descriptor.
    pub fd: i32,
    /// The file, as /proc/PID/fd names it: with " (deleted)" behind the name if it is.
    pub path: PathBuf,
}

/// Whether a process can do anything at all. That it is in a frozen cgroup does not show here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunState {
    /// Nothing stops it.
    Running,
    /// It is stopped by a signal of job control.
    Stopped,
    /// A thread of it at least is traced by the process of this pid, and stands still or not as that one likes.
    Traced(i32),
    /// It has ended, and is a zombie or gone.
    Dead,
}

/// Returns the threads of a process, those that have ended but were not waited for included.
///
/// # Errors
/// When there is no such process.
pub fn threads(pid: i32) -> io::Result<Vec<Thread>> {
    proc::threads(HostPid::try_from(pid)?)
}

/// Whether a process can do anything.
#[must_use]
pub fn run_state(pid: i32) -> RunState {
    let mut state = RunState::Dead;
    for tid in tids(pid).unwrap_or_default() {
        let Ok(status) = fs::read(format!("/proc/{pid}/task/{tid}/status")) else { continue };
        let letter = status_field(&status, "State").and_then(|value| value.bytes().next());
        match (status_number(&status, "TracerPid"), letter) {
            (_, None | Some(b'Z' | b'X' | b'x')) => {}
            (Some(tracer), _) if tracer != 0 => return RunState::Traced(tracer),
            // A stop concerns all threads: those that are not there yet are on their way.
            (_, Some(b'T')) => state = RunState::Stopped,
            _ if state == RunState::Dead => state = RunState::Running,
            _ => {}
        }
    }
    state
}

/// The letter for the state of a thread (proc_pid_status(5)); None when it has gone.
pub fn thread_state(pid: i32, tid: i32) -> Option<u8> {
    let status = fs::read(format!("/proc/{pid}/task/{tid}/status")).ok()?;
    status_field(&status, "State")?.bytes().next()
}

/// The pid that a process has in its own, the innermost, pid namespace.
///
/// # Errors
/// When there is no such process.
pub fn namespace_pid(pid: i32) -> io::Result<i32> {
    Ok(ProcessIds::of(HostPid::try_from(pid)?)?.container.raw())
}

/// The anonymous, private, writable memory of a process: every mapping of it that has no file and is not special to
/// the kernel (heap and stacks of main threads are).
///
/// [`gained`] of what this says at two moments finds what is new.
///
/// # Errors
/// When there is no such process.
pub fn anonymous_mappings(pid: i32) -> io::Result<Vec<Range>> {
    let anonymous = |mapping: &Mapping| {
        let name = mapping.path.as_os_str().as_bytes();
        // A name that was given to anonymous memory by prctl does not make it special.
        mapping.access == *b"rw-p" && mapping.inode == 0 && (name.is_empty() || name.starts_with(b"[anon:"))
    };
    Ok(mappings(pid)?.into_iter().filter(anonymous).map(|mapping| mapping.range).collect())
}

/// Returns the parts of `after` that are not in `before`, in order of addresses. Both are in that order, as in /proc.
///
/// Not the mappings that are new, but the addresses: the kernel joins neighbouring mappings to one.
#[must_use]
pub fn gained(before: &[Range], after: &[Range]) -> Vec<Range> {
    let mut gained = vec![];
    for range in after {
        let mut start = range.start;
        for old in before.iter().filter(|old| old.start < range.end && old.end > range.start) {
            if old.start > start {
                gained.push(Range { start, end: old.start });
            }
            start = start.max(old.end);
        }
        if start < range.end {
            gained.push(Range { start, end: range.end });
        }
    }
    gained
}

/// Returns the mappings of files whose path matches.
///
/// # Errors
/// When there is no such process.
pub fn mappings_matching(pid: i32, matches: impl Fn(&Path) -> bool) -> io::Result<Vec<DeviceMapping>> {
    let found = mappings(pid)?.into_iter().filter(|mapping| matches(&mapping.path));
    Ok(found.map(|Mapping { range, path, .. }| DeviceMapping { start: range.start, end: range.end, path }).collect())
}

/// Returns the descriptors of files whose path matches.
///
/// # Errors
/// When there is no such process.
pub fn fds_matching(pid: i32, matches: impl Fn(&Path) -> bool) -> io::Result<Vec<DeviceFd>> {
    let mut found = vec![];
    for entry in fs::read_dir(proc::living(HostPid::try_from(pid)?)?.join("fd"))? {
        let entry = entry?;
        let fd = entry.file_name().to_str().and_then(|name| name.parse().ok());
        // A descriptor may be closed while the others are listed.
        if let (Some(fd), Ok(path)) = (fd, fs::read_link(entry.path()))
            && matches(&path)
        {
            found.push(DeviceFd { fd, path });
        }
    }
    found.sort_unstable_by_key(|found| found.fd);
    Ok(found)
}

/// Returns all mappings, in order of addresses.
///
/// # Errors
/// When there is no such process.
pub fn mappings(pid: i32) -> io::Result<Vec<Mapping>> {
    proc::mappings(HostPid::try_from(pid)?)
}

/// Returns the ids of all threads.
///
/// # Errors
/// When there is no such process.
pub fn tids(pid: i32) -> io::Result<Vec<i32>> {
    proc::tids(HostPid::try_from(pid)?)
}

/// Returns the name of a thread.
///
/// # Errors
/// When there is no such thread.
pub fn thread_name(pid: i32, tid: i32) -> io::Result<String> {
    proc::thread_name(HostPid::try_from(pid)?, tid)
}

/// The state of a thread, as proc_pid_stat(5) has it: `b'R'`, `b'S'`, `b'D'`, ...
pub(crate) fn letter(pid: i32, tid: i32) -> io::Result<u8> {
    let stat = fs::read(format!("/proc/{pid}/task/{tid}/stat"))?;
    after_name(&stat).first().copied().ok_or_else(|| malformed(pid, "stat"))
}

/// Tells whether a thread has ended or is about to. The first one of a pid namespace is so until all others of that have been
/// waited for, and some of them may be this process's to wait for.
#[must_use]
pub fn is_ending(pid: i32, tid: i32) -> bool {
    /// `PF_EXITING` of the kernel, in field 9 of proc_pid_stat(5).
    const EXITING: u64 = 4;
    let Ok(stat) = fs::read(format!("/proc/{pid}/task/{tid}/stat")) else { return true };
    let is_dead = matches!(after_name(&stat).first(), None | Some(b'Z' | b'X'));
    is_dead || stat_field(&stat, 9).is_some_and(|flags| flags & EXITING != 0)
}

/// A numeric field of /proc/PID/stat by its number in proc_pid_stat(5), from 4 on.
pub(crate) fn stat_field(stat: &[u8], number: usize) -> Option<u64> {
    let text = std::str::from_utf8(after_name(stat)).ok()?;
    text.split_whitespace().nth(number.checked_sub(3)?)?.parse().ok()
}

/// The fields from the third, the state, on. The name before them is in parentheses and may hold anything.
fn after_name(stat: &[u8]) -> &[u8] {
    let end = stat.iter().rposition(|byte| *byte == b')');
    end.and_then(|end| stat.get(end + 2..)).unwrap_or_default()
}

/// A number of /proc/PID/status, in base 10.
pub fn status_number(status: &[u8], key: &str) -> Option<i32> {
    status_field(status, key)?.parse().ok()
}

/// The value of a line of /proc/PID/status. `None` too if it is not UTF-8, as the name may be.
pub fn status_field<'a>(status: &'a [u8], key: &str) -> Option<&'a str> {
    let of = |line: &'a [u8]| line.strip_prefix(key.as_bytes())?.strip_prefix(b":");
    let value = status.split(|byte| *byte == b'\n').find_map(of)?;
    OsStr::from_bytes(value).to_str().map(str::trim)
}

fn malformed(pid: i32, file: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{pid}/{file} is not as expected"))
}

#[cfg(test)]
mod tests;
