//! A container's cgroup according to the runtime's own notes, and removal of the remains.
//!
//! runc and wrappers of runc keep `state.json`, crun keeps `status`. A runtime soon gives up
//! removing a cgroup (runc after a third of a second), in some cases silently. Once the notes are
//! gone, nobody can ask again.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use cgroup::{Cgroup, Place};
use proc::HostPid;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::Command;
use crate::RuntimeError;

/// Largest note, in bytes: a note holds the container's whole configuration.
const LIMIT: u64 = 32 << 20;

/// runc's note, as far as needed.
#[derive(Debug, Deserialize)]
struct RuncState {
    /// Directories by controllers; version 2 has the empty name.
    cgroup_paths: BTreeMap<String, PathBuf>,
}

/// crun's note.
#[derive(Debug, Deserialize)]
struct CrunStatus {
    /// Path in the hierarchies.
    #[serde(rename = "cgroup-path")]
    cgroup_path: Option<PathBuf>,
}

impl Command {
    /// Returns the cgroup in the runtime's note; `None` without a readable note.
    pub(super) fn noted_cgroup(&self, id: &str) -> Option<Cgroup> {
        noted(&self.inner.root.join(id))
    }

    pub(super) fn cgroup_now(&self, id: &str, init: HostPid) -> Result<Cgroup, RuntimeError> {
        match self.noted_cgroup(id) {
            Some(cgroup) => Ok(cgroup),
            None => Cgroup::of_process(init).map_err(|error| RuntimeError::Cgroup {
                runtime: self.inner.binary.display().to_string(),
                container: id.into(),
                message: phase::chain(&error),
            }),
        }
    }

    /// Removes the remains of a deleted container's cgroup. Processes inside are not the
    /// container's, and are left alone.
    pub(super) async fn remove_rest(&self, id: &str, cgroup: Cgroup) {
        let removed = tokio::task::spawn_blocking(move || cgroup.remove_empty()).await;
        match removed {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::error!(container = id, "a cgroup is left of a deleted container: {}", phase::chain(&error));
            }
            Err(error) => tracing::error!(container = id, %error, "the removal of a cgroup was given up"),
        }
    }
}

fn noted(state: &Path) -> Option<Cgroup> {
    if let Some(runc) = read::<RuncState>(&state.join("state.json")) {
        return Cgroup::of_directories(runc.cgroup_paths);
    }
    let path = read::<CrunStatus>(&state.join("status"))?.cgroup_path.filter(|path| path.is_absolute())?;
    Place::new(&path, false).and_then(|place| place.cgroup()).ok()
}

fn read<T: DeserializeOwned>(path: &Path) -> Option<T> {
    let is_honest = std::fs::metadata(path).is_ok_and(|metadata| metadata.len() <= LIMIT);
    let bytes = if is_honest { std::fs::read(path).ok()? } else { return None };
    serde_json::from_slice(&bytes)
        .inspect_err(|error| tracing::debug!(path = %path.display(), %error, "unknown note"))
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runcs_note_names_the_directories() {
        let state = tempfile::tempdir().unwrap();
        let note = r#"{"id":"x","init_process_pid":7,"cgroup_paths":{"freezer":"/sys/fs/cgroup/freezer/x","cpu,cpuacct":"/sys/fs/cgroup/cpu,cpuacct/x"}}"#;
        std::fs::write(state.path().join("state.json"), note).unwrap();
        let expected = ["freezer", "cpu", "cpuacct"].map(|name| {
            let folder = if name == "freezer" { "freezer" } else { "cpu,cpuacct" };
            (name.to_owned(), PathBuf::from(format!("/sys/fs/cgroup/{folder}/x")))
        });
        assert_eq!(noted(state.path()), Cgroup::of_directories(expected));
        std::fs::write(state.path().join("state.json"), r#"{"cgroup_paths":{"":"/sys/fs/cgroup/a.slice/x"}}"#).unwrap();
        let unified = Cgroup::of_directories([(String::new(), "/sys/fs/cgroup/a.slice/x".into())]);
        assert_eq!(noted(state.path()), unified);
    }

    #[test]
    fn without_a_note_nothing_is_known() {
        let state = tempfile::tempdir().unwrap();
        assert_eq!(noted(state.path()), None);
        std::fs::write(state.path().join("state.json"), r#"{"cgroup_paths":{}}"#).unwrap();
        assert_eq!(noted(state.path()), None);
        std::fs::write(state.path().join("state.json"), "{").unwrap();
        assert_eq!(noted(state.path()), None);
    }
}
