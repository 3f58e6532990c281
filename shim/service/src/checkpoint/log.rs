//! Where CRIU's logs go. A bundle is removed with its container, and a failed restore's container right away: what
//! went wrong has to be readable afterwards.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

const FOLDER: &str = "/var/log/gpusnap";
/// Logs of failures that are kept in each namespace; the oldest go first. One is some ten MB at most.
const KEPT: usize = 20;

/// A folder for the log of one operation.
#[derive(Debug)]
pub(crate) struct LogFolder {
    path: PathBuf,
    /// The client chose it.
    given: bool,
}

impl LogFolder {
    /// The folder that the client chose, or one that is kept only if the operation fails.
    pub(crate) fn make(given: Option<&Path>, namespace: &str, id: &str, log: &str) -> io::Result<Self> {
        Self::make_in(Path::new(FOLDER), given, namespace, id, log)
    }

    fn make_in(root: &Path, given: Option<&Path>, namespace: &str, id: &str, log: &str) -> io::Result<Self> {
        let namespace = root.join(namespace);
        let stem = log.strip_suffix(".log").unwrap_or(log);
        let path = given.map_or_else(|| namespace.join(format!("{id}.{stem}")), Path::to_owned);
        DirBuilder::new().recursive(true).mode(0o700).create(&path)?;
        if given.is_none() {
            prune(&namespace, &path)?;
        }
        // What is told of a failure must not be an earlier one's.
        match std::fs::remove_file(path.join(log)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        Ok(Self { path, given: given.is_some() })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The operation has succeeded.
    pub(crate) fn remove(self) {
        if !self.given
            && let Err(error) = std::fs::remove_dir_all(&self.path)
        {
            tracing::debug!("a log is left in {}: {error}", self.path.display());
        }
    }
}

/// Makes room for `newest`.
fn prune(namespace: &Path, newest: &Path) -> io::Result<()> {
    let mut folders: Vec<(SystemTime, PathBuf)> = Vec::new();
    for entry in std::fs::read_dir(namespace)? {
        let entry = entry?;
        // Another container's shim may have removed it by now.
        let Ok(metadata) = entry.metadata() else { continue };
        if entry.path() != newest && metadata.is_dir() {
            folders.push((metadata.modified()?, entry.path()));
        }
    }
    folders.sort();
    let surplus = (folders.len() + 1).saturating_sub(KEPT);
    for (_, folder) in &folders[..surplus] {
        match std::fs::remove_dir_all(folder) {
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
        let make = || LogFolder::make_in(root.path(), None, "ns", "c", "dump.log").unwrap();
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
        LogFolder::make(Some(given.path()), "ns", "c", "dump.log").unwrap().remove();
        assert!(given.path().join("mine").exists());
    }

    #[test]
    fn old_logs_make_room() {
        let root = tempfile::tempdir().unwrap();
        for n in 0..KEPT + 3 {
            LogFolder::make_in(root.path(), None, "ns", &format!("c{n}"), "dump.log").unwrap();
        }
        assert_eq!(std::fs::read_dir(root.path().join("ns")).unwrap().count(), KEPT);
    }
}
