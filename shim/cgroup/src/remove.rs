//! Removal of a cgroup with all that is in it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use proc::ProcessHandle;
use rustix::process::Signal;

use crate::{CgroupError, file, process};

/// Limit of a removal. Killed processes are gone within milliseconds, unless they are stuck in the kernel; on
/// a machine with more work than processors the last step of an exit can wait for seconds.
const DEADLINE: Duration = Duration::from_secs(60);

/// Limit for an empty cgroup to be in use.
const PATIENCE: Duration = Duration::from_secs(10);

/// After that time without success it is told that a removal takes long.
const LONG: Duration = Duration::from_secs(5);

const SHORTEST_WAIT: Duration = Duration::from_micros(200);
const LONGEST_WAIT: Duration = Duration::from_millis(20);

/// Kills every process in these directories and below, and removes them. Both are tried again until all are gone: a
/// process can come into a cgroup as long as the cgroup is there, and so can another cgroup.
pub(crate) fn remove(directories: &[PathBuf]) -> Result<(), CgroupError> {
    remove_by(directories, Instant::now() + DEADLINE, Members::Die)
}

/// Removes these directories and those below, if nobody is in them.
pub(crate) fn remove_empty(directories: &[PathBuf]) -> Result<(), CgroupError> {
    remove_by(directories, Instant::now() + PATIENCE, Members::Stay)
}

/// Fate of processes in a cgroup that is to be removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Members {
    Die,
    Stay,
}

fn remove_by(directories: &[PathBuf], deadline: Instant, members: Members) -> Result<(), CgroupError> {
    let long = Instant::now() + LONG;
    let mut told = false;
    let mut wait = SHORTEST_WAIT;
    loop {
        if members == Members::Die {
            directories.iter().try_for_each(|directory| kill(directory))?;
        }
        let mut left = None;
        for directory in directories {
            left = remove_tree(directory)?.or(left);
        }
        let Some((busy, source)) = left else { return Ok(()) };
        let now = Instant::now();
        if now >= deadline {
            let pids = process::pids(&busy)?;
            return Err(CgroupError::Busy { path: busy, pids, source });
        }
        if now >= long && !told {
            told = true;
            tracing::warn!(cgroup = %busy.display(), pids = ?process::pids(&busy)?, "a cgroup is still in use");
        }
        thread::sleep(wait);
        wait = (wait * 2).min(LONGEST_WAIT);
    }
}

/// Kills everybody who is in a cgroup, or below it, now.
fn kill(directory: &Path) -> Result<(), CgroupError> {
    let pids = process::pids(directory)?;
    if pids.is_empty() || process::kill_v2(directory)? {
        return Ok(());
    }
    let handles: Vec<ProcessHandle> = pids.into_iter().filter_map(|pid| ProcessHandle::open(pid).ok()).collect();
    // A pid that is still listed was this process's when it was opened, or that process is dead.
    let still = process::pids(directory)?;
    for handle in handles.iter().filter(|handle| still.contains(&handle.pid())) {
        // An error means that it is dead.
        let _ = handle.signal(Signal::KILL);
    }
    // A frozen process does not die.
    for directory in process::subtree(directory)? {
        for (file, thawed) in [("cgroup.freeze", "0"), ("freezer.state", "THAWED")] {
            let path = directory.join(file);
            if path.exists() {
                file::unless_gone(file::write(&path, thawed))?;
            }
        }
    }
    Ok(())
}

/// Removes a cgroup and all below it, as far as that is possible now. Returns one that is in use.
fn remove_tree(directory: &Path) -> Result<Option<(PathBuf, io::Error)>, CgroupError> {
    let mut busy = None;
    let mut tree = process::subtree(directory)?;
    // The deepest first: a path is longer than those above it.
    tree.sort_by_key(|path| std::cmp::Reverse(path.as_os_str().len()));
    for path in tree {
        match fs::remove_dir(&path) {
            Ok(()) => {}
            Err(error) if file::is_gone(&error) => {}
            // In use, or another has been made below it meanwhile.
            Err(error) if matches!(error.kind(), io::ErrorKind::ResourceBusy | io::ErrorKind::DirectoryNotEmpty) => {
                busy = busy.or(Some((path, error)));
            }
            Err(source) => return Err(CgroupError::File { action: "remove", path, source }),
        }
    }
    Ok(busy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_below_is_removed_and_a_second_time_is_no_error() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("a");
        fs::create_dir_all(directory.join("b/c")).unwrap();
        fs::create_dir_all(directory.join("d")).unwrap();
        remove(std::slice::from_ref(&directory)).unwrap();
        assert!(!directory.exists());
        remove(&[directory]).unwrap();
    }

    #[test]
    fn a_cgroup_that_stays_in_use_is_named_and_the_rest_goes() {
        let root = tempfile::tempdir().unwrap();
        let [stays, goes] = ["stays", "goes"].map(|name| root.path().join(name));
        fs::create_dir_all(stays.join("inner")).unwrap();
        fs::create_dir_all(&goes).unwrap();
        // A file in it: what the kernel would call busy is a directory that is not empty here.
        fs::write(stays.join("inner/file"), "").unwrap();
        let error = remove_by(&[stays.clone(), goes.clone()], Instant::now(), Members::Die).unwrap_err();
        assert!(matches!(&error, CgroupError::Busy { path, .. } if *path == stays.join("inner")), "{error}");
        assert!(!goes.exists());
    }

    #[test]
    fn one_that_is_in_use_for_a_while_is_tried_again() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("a");
        fs::create_dir(&directory).unwrap();
        let file = directory.join("file");
        fs::write(&file, "").unwrap();
        let tries = thread::spawn({
            let directory = directory.clone();
            move || remove(&[directory])
        });
        thread::sleep(Duration::from_millis(20));
        fs::remove_file(file).unwrap();
        tries.join().unwrap().unwrap();
        assert!(!directory.exists());
    }
}
