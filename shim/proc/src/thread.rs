//! Threads of a process.

use std::fs;
use std::io;
use std::path::PathBuf;

use crate::{HostPid, Stat, trimmed};

/// A thread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Thread {
    /// Id of the thread, in the numbers of [`HostPid`].
    pub tid: i32,
    /// Name of the thread, at most 15 bytes; bytes outside UTF-8 are replaced.
    pub name: String,
}

/// Returns the threads of a process, including ended ones not yet waited for.
///
/// # Errors
/// Fails if there is no such process.
pub fn threads(pid: HostPid) -> io::Result<Vec<Thread>> {
    let mut threads = vec![];
    for tid in tids(pid)? {
        // A thread may end during the listing.
        if let Ok(name) = thread_name(pid, tid) {
            threads.push(Thread { tid, name });
        }
    }
    Ok(threads)
}

/// Returns the ids of the threads of a process.
///
/// # Errors
/// Fails if there is no such process.
pub fn tids(pid: HostPid) -> io::Result<Vec<i32>> {
    let mut tids = vec![];
    for entry in fs::read_dir(pid.path("task"))? {
        tids.extend(entry?.file_name().to_str().and_then(|name| name.parse::<i32>().ok()));
    }
    Ok(tids)
}

/// Returns the name of a thread.
///
/// # Errors
/// Fails if there is no such thread.
pub fn thread_name(pid: HostPid, tid: i32) -> io::Result<String> {
    fs::read(pid.path(&format!("task/{tid}/comm"))).map(|name| trimmed(&name))
}

/// Returns the folder in `/proc` with a process's memory and descriptors. The process's own pid
/// shows neither once its first thread has ended before the others.
///
/// # Errors
/// Fails if there is no such process.
pub fn living(pid: HostPid) -> io::Result<PathBuf> {
    let process = PathBuf::from(format!("/proc/{pid}"));
    if !Stat::of_thread(pid, pid.raw())?.has_ended() {
        return Ok(process);
    }
    let alive = |tid: &i32| Stat::of_thread(pid, *tid).is_ok_and(|stat| !stat.has_ended());
    Ok(tids(pid)?.into_iter().find(alive).map_or(process, |tid| pid.path(&format!("task/{tid}"))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_are_listed_by_name() {
        let (started, is_started) = std::sync::mpsc::channel();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::Builder::new().name("a thread".into()).spawn(move || {
            started.send(rustix::thread::gettid().as_raw_nonzero().get()).unwrap();
            ended.recv().unwrap();
        });
        let tid = is_started.recv().unwrap();
        assert!(threads(HostPid::own()).unwrap().contains(&Thread { tid, name: "a thread".into() }));
        assert_eq!(living(HostPid::own()).unwrap(), PathBuf::from(format!("/proc/{}", HostPid::own())));
        end.send(()).unwrap();
        thread.unwrap().join().unwrap();
    }
}
