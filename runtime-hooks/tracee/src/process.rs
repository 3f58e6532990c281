//! State of a process by /proc: mappings, descriptors, threads, and whether the process runs.
//!
//! All functions look at one moment: the process can end, and its pid can be another's, right after. Code that keeps a
//! pid over time keeps a `proc::ProcessHandle`.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use proc::{HostPid, Mapping, Range, Stat, Status};

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
    Traced(HostPid),
    /// It has ended, and is a zombie or gone.
    Dead,
}

/// Returns whether a process can do anything.
#[must_use]
pub fn run_state(pid: HostPid) -> RunState {
    let mut state = RunState::Dead;
    for tid in proc::tids(pid).unwrap_or_default() {
        let Ok(status) = Status::of_thread(pid, tid) else { continue };
        match (status.tracer(), status.state()) {
            (_, None | Some(b'Z' | b'X' | b'x')) => {}
            (Some(tracer), _) => return RunState::Traced(tracer),
            // A stop concerns all threads: those that are not there yet are on their way.
            (_, Some(b'T')) => state = RunState::Stopped,
            _ if state == RunState::Dead => state = RunState::Running,
            _ => {}
        }
    }
    state
}

/// Returns the letter for the state of a thread (proc_pid_stat(5)); None when the thread is gone.
#[must_use]
pub fn thread_state(pid: HostPid, tid: i32) -> Option<u8> {
    Stat::of_thread(pid, tid).ok().map(|stat| stat.state())
}

/// The anonymous, private, writable memory of a process: every mapping of it that has no file and is not special to
/// the kernel (heap and stacks of main threads are).
///
/// [`gained`] of what this says at two moments finds what is new.
///
/// # Errors
/// When there is no such process.
pub fn anonymous_mappings(pid: HostPid) -> io::Result<Vec<Range>> {
    let anonymous = |mapping: &Mapping| {
        let name = mapping.path.as_os_str().as_bytes();
        // A name that was given to anonymous memory by prctl does not make it special.
        mapping.access == *b"rw-p" && mapping.inode == 0 && (name.is_empty() || name.starts_with(b"[anon:"))
    };
    Ok(proc::mappings(pid)?.into_iter().filter(anonymous).map(|mapping| mapping.range).collect())
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
pub fn mappings_matching(pid: HostPid, matches: impl Fn(&Path) -> bool) -> io::Result<Vec<DeviceMapping>> {
    let found = proc::mappings(pid)?.into_iter().filter(|mapping| matches(&mapping.path));
    Ok(found.map(|Mapping { range, path, .. }| DeviceMapping { start: range.start, end: range.end, path }).collect())
}

/// Returns the descriptors of files whose path matches.
///
/// # Errors
/// When there is no such process.
pub fn fds_matching(pid: HostPid, matches: impl Fn(&Path) -> bool) -> io::Result<Vec<DeviceFd>> {
    let mut found = vec![];
    for entry in fs::read_dir(proc::living(pid)?.join("fd"))? {
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

/// Returns whether a thread has ended or is about to. The first one of a pid namespace is so until all others of that have been
/// waited for, and some of them may be this process's to wait for.
#[must_use]
pub fn is_ending(pid: HostPid, tid: i32) -> bool {
    /// `PF_EXITING` of the kernel, in field 9 of proc_pid_stat(5).
    const EXITING: u64 = 4;
    let Ok(stat) = Stat::of_thread(pid, tid) else { return true };
    stat.has_ended() || stat.field(9).is_some_and(|flags| flags & EXITING != 0)
}

#[cfg(test)]
mod tests;
