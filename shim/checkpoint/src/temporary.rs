//! Folders into which containerd unpacks a checkpoint for Create, and that containerd never removes
//! (containerd#10166).

use std::ffi::OsStr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Prefix of the folders' names; digits follow (`os.MkdirTemp`).
const PREFIX: &str = "ctrd-checkpoint";

/// Removes `folder` if the name and place match containerd's folders. Any other folder is left
/// alone.
pub fn remove_if_containerds(folder: &Path) {
    if !is_containerds(folder, &places()) {
        return;
    }
    match std::fs::remove_dir_all(folder) {
        Ok(()) => tracing::debug!("removed {}, which containerd leaves behind", folder.display()),
        Err(error) => tracing::warn!("cannot remove {}: {error}", folder.display()),
    }
}

/// Places of containerd's folders: the shim has containerd's environment.
fn places() -> Vec<PathBuf> {
    let named = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    [named("XDG_RUNTIME_DIR"), named("TMPDIR"), Some("/tmp".into())].into_iter().flatten().collect()
}

fn is_containerds(folder: &Path, places: &[PathBuf]) -> bool {
    let suffix = folder.file_name().and_then(OsStr::to_str).and_then(|name| name.strip_prefix(PREFIX));
    let is_named = suffix.is_some_and(|suffix| !suffix.is_empty() && suffix.bytes().all(|byte| byte.is_ascii_digit()));
    let is_there = folder.parent().is_some_and(|parent| places.iter().any(|place| place == parent));
    // A link, or another user's folder, is left alone.
    let is_own = std::fs::symlink_metadata(folder)
        .is_ok_and(|metadata| metadata.is_dir() && metadata.uid() == rustix::process::geteuid().as_raw());
    is_named && is_there && is_own
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_containerds_own_are_known() {
        let place = tempfile::tempdir().unwrap();
        let places = [place.path().to_owned()];
        let made = |name: &str| {
            let folder = place.path().join(name);
            std::fs::create_dir_all(&folder).unwrap();
            is_containerds(&folder, &places)
        };
        assert!(made("ctrd-checkpoint123456"));
        assert!(!made("ctrd-checkpoint"));
        assert!(!made("ctrd-checkpoint12x"));
        assert!(!made("my-checkpoint1"));
        assert!(!made("deeper/ctrd-checkpoint1"));
        let link = place.path().join("ctrd-checkpoint7");
        std::os::unix::fs::symlink(place.path().join("deeper"), &link).unwrap();
        assert!(!is_containerds(&link, &places));
        assert!(!is_containerds(Path::new("/nonexistent/ctrd-checkpoint1"), &places));
    }
}
