//! Folders of CRIU's logs. A bundle is removed with the container, and after a failed restore at
//! once: the logs have to stay readable.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Folder of the logs, with a subfolder for each namespace.
pub const ROOT: &str = "/var/log/gpusnap";
/// Logs of failures kept in each namespace; the oldest go first. A log has some ten MB at most.
const KEPT: usize = 20;

/// A folder for the log of one operation.
#[derive(Debug)]
pub struct LogFolder {
    path: PathBuf,
    /// Shared lock during the operation, which keeps other shims from pruning the folder. `None`
    /// for a folder chosen by the client, which is never removed.
    lock: Option<File>,
}

impl LogFolder {
    /// Makes the folder chosen by the client, or one in `root`, kept only after a failure.
    ///
    /// # Errors
    /// A folder that cannot be made.
    pub fn make(root: &Path, given: Option<&Path>, namespace: &str, id: &str, log: &str) -> io::Result<Self> {
        let folder = if let Some(path) = given {
            DirBuilder::new().recursive(true).mode(0o700).create(path)?;
            Self { path: path.to_owned(), lock: None }
        } else {
            let namespace = root.join(namespace);
            let stem = log.strip_suffix(".log").unwrap_or(log);
            let path = namespace.join(format!("{id}.{stem}"));
            let lock = make_locked(&path)?;
            prune(&namespace, &path)?;
            Self { path, lock: Some(lock) }
        };
        // A failure must not be reported with an earlier failure's log.
        match std::fs::remove_file(folder.path.join(log)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        Ok(folder)
    }

    /// Returns the folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes the log of a successful operation.
    pub fn remove(self) {
        if let Some(lock) = &self.lock
            && let Err(error) = remove_unused(&self.path, lock)
        {
            tracing::debug!("a log is left in {}: {error}", self.path.display());
        }
    }
}

/// Makes a folder, or uses an existing one, and takes the lock.
fn make_locked(path: &Path) -> io::Result<File> {
    loop {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
        let folder = match made.and_then(|()| File::open(path)) {
            Ok(folder) => folder,
            // Another shim has pruned the folder, after it was made or found.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && !is_file(path) => continue,
            Err(error) => return Err(error),
        };
        // Exclusive locks last only as long as a removal.
        folder.lock_shared()?;
        if is_at(&folder, path)? {
            return Ok(folder);
        }
    }
}

fn is_file(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|found| !found.is_dir())
}

/// Returns whether the open folder is the one at `path`.
fn is_at(folder: &File, path: &Path) -> io::Result<bool> {
    let opened = folder.metadata()?;
    match std::fs::symlink_metadata(path) {
        Ok(found) => Ok((found.dev(), found.ino()) == (opened.dev(), opened.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Removes a folder, unless another operation holds the lock.
fn remove_unused(path: &Path, folder: &File) -> io::Result<()> {
    match folder.try_lock() {
        Ok(()) if is_at(folder, path)? => std::fs::remove_dir_all(path),
        Ok(()) | Err(std::fs::TryLockError::WouldBlock) => Ok(()),
        Err(std::fs::TryLockError::Error(error)) => Err(error),
    }
}

/// Removes old folders to make room for `newest`.
fn prune(namespace: &Path, newest: &Path) -> io::Result<()> {
    let mut folders: Vec<(SystemTime, PathBuf)> = Vec::new();
    for entry in std::fs::read_dir(namespace)? {
        let entry = entry?;
        // Another container's shim may have removed the folder by now.
        let Ok(metadata) = entry.metadata() else { continue };
        if entry.path() != newest && metadata.is_dir() {
            folders.push((metadata.modified()?, entry.path()));
        }
    }
    folders.sort();
    let surplus = (folders.len() + 1).saturating_sub(KEPT);
    for (_, folder) in &folders[..surplus] {
        match File::open(folder).and_then(|opened| remove_unused(folder, &opened)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failures_log_stays_and_a_successs_goes() {
        let root = tempfile::tempdir().unwrap();
        let make = || LogFolder::make(root.path(), None, "ns", "c", "dump.log").unwrap();
        let failed = make().path().to_owned();
        std::fs::write(failed.join("dump.log"), "why").unwrap();
        assert!(failed.exists());
        let again = make();
        assert!(!failed.join("dump.log").exists());
        again.remove();
        assert!(!failed.exists());
    }

    #[test]
    fn the_clients_folder_is_never_removed() {
        let given = tempfile::tempdir().unwrap();
        std::fs::write(given.path().join("mine"), "").unwrap();
        LogFolder::make(given.path(), Some(given.path()), "ns", "c", "dump.log").unwrap().remove();
        assert!(given.path().join("mine").exists());
    }

    #[test]
    fn old_logs_make_room() {
        let root = tempfile::tempdir().unwrap();
        for n in 0..KEPT + 3 {
            LogFolder::make(root.path(), None, "ns", &format!("c{n}"), "dump.log").unwrap();
        }
        assert_eq!(std::fs::read_dir(root.path().join("ns")).unwrap().count(), KEPT);
    }

    #[test]
    fn the_folder_of_an_operation_that_is_under_way_makes_no_room() {
        let root = tempfile::tempdir().unwrap();
        let make = |n: usize| LogFolder::make(root.path(), None, "ns", &format!("c{n}"), "restore.log").unwrap();
        let under_way: Vec<LogFolder> = (0..2 * KEPT).map(make).collect();
        assert!(under_way.iter().all(|folder| folder.path().exists()));
        drop(under_way);
        make(2 * KEPT);
        assert_eq!(std::fs::read_dir(root.path().join("ns")).unwrap().count(), KEPT);
    }

    #[test]
    fn a_folder_that_two_operations_use_stays_until_both_are_done() {
        let root = tempfile::tempdir().unwrap();
        let make = || LogFolder::make(root.path(), None, "ns", "c", "dump.log").unwrap();
        let (first, second) = (make(), make());
        first.remove();
        assert!(second.path().exists());
        let path = second.path().to_owned();
        second.remove();
        assert!(!path.exists());
    }

    #[test]
    fn operations_that_come_and_go_at_once_keep_their_folders() {
        let root = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let root = root.path();
                scope.spawn(move || {
                    for n in 0..200 {
                        // The same few names in all threads.
                        let id = format!("c{}", (n + thread) % (KEPT + 2));
                        let folder = LogFolder::make(root, None, "ns", &id, "dump.log").unwrap();
                        std::fs::write(folder.path().join("dump.log"), "why").unwrap();
                        if n % 2 == 0 {
                            folder.remove();
                        }
                    }
                });
            }
        });
    }
}
