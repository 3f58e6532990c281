//! List of the containers of a pod's shim, kept in the shim's bundle.
//!
//! After the death of a shim, containerd runs `delete` in the bundle of the shim's start: the
//! sandbox's. The bundles of the pod's other containers may be gone by then. So each container's
//! facts for `delete` are kept in `pod/ID/` of the sandbox's bundle, from the container's creation
//! to its deletion.

use std::io;
use std::path::{Path, PathBuf};

use runtime::Choice;

/// Folder in the bundle of the shim's first container.
const FOLDER: &str = "pod";

/// A further container of a shim, beside the first.
pub(crate) struct Member {
    pub(crate) id: String,
    /// Folder with the runtime choice.
    pub(crate) folder: PathBuf,
    /// Bundle of the container, which may be gone.
    pub(crate) bundle: PathBuf,
}

/// Records that the shim started in `shim_bundle` serves the container in `bundle`.
pub(crate) fn join(shim_bundle: &Path, bundle: &Path, choice: &Choice) -> io::Result<()> {
    let Some(folder) = folder(shim_bundle, bundle) else { return Ok(()) };
    std::fs::create_dir_all(&folder)?;
    choice.save(&folder)
}

/// Removes the record of a fully deleted container.
pub(crate) fn leave(shim_bundle: &Path, bundle: &Path) {
    let Some(folder) = folder(shim_bundle, bundle) else { return };
    if let Err(error) = std::fs::remove_dir_all(&folder) {
        tracing::debug!("cannot remove {}: {error}", folder.display());
    }
}

/// Returns the containers recorded in `shim_bundle`.
pub(crate) fn members(shim_bundle: &Path) -> Vec<Member> {
    let Ok(entries) = std::fs::read_dir(shim_bundle.join(FOLDER)) else { return Vec::new() };
    let member = |entry: std::fs::DirEntry| {
        let id = entry.file_name().into_string().ok()?;
        Some(Member { bundle: shim_bundle.parent()?.join(&id), folder: entry.path(), id })
    };
    entries.flatten().filter_map(member).collect()
}

/// Returns the record's folder; `None` for the shim's first container, which has its own bundle.
fn folder(shim_bundle: &Path, bundle: &Path) -> Option<PathBuf> {
    let id = bundle.file_name().filter(|_| shim_bundle != bundle)?;
    Some(shim_bundle.join(FOLDER).join(id))
}

#[cfg(test)]
mod tests {
    use runtime::Kind;

    use super::*;

    #[test]
    fn a_pods_containers_are_known_from_creation_to_deletion() {
        let namespace = tempfile::tempdir().unwrap();
        let (sandbox, container) = (namespace.path().join("sandbox"), namespace.path().join("container"));
        std::fs::create_dir(&sandbox).unwrap();
        let choice = Choice::new(Kind::Libcontainer, "/run/x".into(), false);

        join(&sandbox, &sandbox, &choice).unwrap();
        assert!(members(&sandbox).is_empty(), "its own bundle says all about the sandbox");

        join(&sandbox, &container, &choice).unwrap();
        let known = members(&sandbox);
        assert_eq!((known[0].id.as_str(), &known[0].bundle), ("container", &container));
        assert_eq!(Choice::load(&known[0].folder).unwrap(), Some(choice));

        leave(&sandbox, &container);
        assert!(members(&sandbox).is_empty());
    }
}
