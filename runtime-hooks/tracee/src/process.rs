//! What /proc says about a process.
//!
//! Everything here is a look at one moment: the process may end, or its pid may be another's, right after. Whoever
//! keeps a pid over time keeps a `proc::ProcessHandle`.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// A stretch of a process's address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Range {
    /// The first address.
    pub start: u64,
    /// The address after the last one.
    pub end: u64,
}

impl Range {
    /// Its size in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    /// Whether there is nothing in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}-{:#x}", self.start, self.end)
    }
}

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

/// A line of /proc/PID/maps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// The addresses.
    pub range: Range,
    /// `r-xp` and the like.
    pub access: [u8; 4],
    /// The file's inode; 0 for none.
    pub inode: u64,
    /// A path, a name in brackets, or nothing.
    pub path: PathBuf,
}

impl Mapping {
    /// Tells whether code in it can run.
    #[must_use]
    pub fn is_executable(&self) -> bool {
        self.access[2] == b'x'
    }

    /// Tells whether the process can write to it.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        self.access[1] == b'w'
    }
}

/// A thread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Thread {
    /// Its id.
    pub tid: i32,
    /// Its name, at most 15 bytes; what is not UTF-8 in it is replaced.
    pub name: String,
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

/// Tells whether an error of /proc says that the process has gone.
pub(crate) fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

/// The threads of a process, those that have ended but were not waited for included.
///
/// # Errors
/// When there is no such process.
pub fn threads(pid: i32) -> io::Result<Vec<Thread>> {
    let mut threads = vec![];
    for tid in tids(pid)? {
        // A thread may end while the others are listed.
        if let Ok(name) = thread_name(pid, tid) {
            threads.push(Thread { tid, name });
        }
    }
    Ok(threads)
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
    let status = fs::read(format!("/proc/{pid}/status"))?;
    let innermost = status_field(&status, "NSpid").and_then(|pids| pids.split_whitespace().next_back()?.parse().ok());
    // Kernels without pid namespaces do not have the line.
    Ok(innermost.unwrap_or(pid))
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

/// What is in `after` and was not in `before`, in order of addresses. Both are in that order, as /proc has them.
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
    for entry in fs::read_dir(living(pid)?.join("fd"))? {
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
    let maps = fs::read(living(pid)?.join("maps"))?;
    maps.split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
        .map(|line| mapping(line).ok_or_else(|| malformed(pid, "maps")))
        .collect()
}

/// A line like `7f00-7f10 r-xp 00000000 08:01 42      /usr/lib/x y.so`. What is not UTF-8 may be in its path only.
fn mapping(line: &[u8]) -> Option<Mapping> {
    let mut fields = line.splitn(6, |byte| *byte == b' ');
    let range = std::str::from_utf8(fields.next()?).ok()?;
    let (start, end) = range.split_once('-')?;
    let range = Range { start: u64::from_str_radix(start, 16).ok()?, end: u64::from_str_radix(end, 16).ok()? };
    let access = fields.next()?.try_into().ok()?;
    let inode = std::str::from_utf8(fields.nth(2)?).ok()?.parse().ok()?;
    let path = fields.next().unwrap_or_default();
    let blanks = path.iter().take_while(|byte| **byte == b' ').count();
    let path = PathBuf::from(OsString::from_vec(path.get(blanks..)?.to_vec()));
    Some(Mapping { range, access, inode, path })
}

/// Where in /proc memory and descriptors of a process show. Not under its pid, if its first thread has ended before
/// the others.
fn living(pid: i32) -> io::Result<PathBuf> {
    let process = PathBuf::from(format!("/proc/{pid}"));
    if letter(pid, pid)? != b'Z' {
        return Ok(process);
    }
    let alive = |tid: &i32| letter(pid, *tid).is_ok_and(|state| state != b'Z' && state != b'X');
    Ok(tids(pid)?.into_iter().find(alive).map_or(process, |tid| PathBuf::from(format!("/proc/{pid}/task/{tid}"))))
}

/// Returns the ids of all threads.
///
/// # Errors
/// When there is no such process.
pub fn tids(pid: i32) -> io::Result<Vec<i32>> {
    let mut tids = vec![];
    for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
        tids.extend(entry?.file_name().to_str().and_then(|name| name.parse::<i32>().ok()));
    }
    Ok(tids)
}

/// Returns the name of a thread.
///
/// # Errors
/// When there is no such thread.
pub fn thread_name(pid: i32, tid: i32) -> io::Result<String> {
    let mut name = fs::read(format!("/proc/{pid}/task/{tid}/comm"))?;
    if name.last() == Some(&b'\n') {
        name.pop();
    }
    Ok(String::from_utf8_lossy(&name).into_owned())
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
