//! A checkpoint while it is written: it becomes one at once, or nothing of it is left.
//!
//! containerd names an empty folder of its own, or one that the client chose, which may hold an earlier checkpoint. In
//! an empty one the images are written where they are to be: without `inventory.img`, which CRIU writes last, they are
//! none. Beside an earlier one they are written into a folder of their own and take its place when they are whole.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// What makes a folder a checkpoint.
const INVENTORY: &str = "inventory.img";

/// A checkpoint that is being written. Dropped before it is published, it is removed.
#[derive(Debug)]
pub struct Draft {
    target: PathBuf,
    /// What was there before, and stays if nothing comes of it.
    before: BTreeSet<OsString>,
    /// Where it is written, if not to the target itself.
    beside: Option<tempfile::TempDir>,
    done: bool,
}

impl Draft {
    /// Begins a checkpoint in `target`, which is made if it is missing.
    ///
    /// # Errors
    /// A folder that cannot be made or read.
    pub fn begin(target: &Path) -> io::Result<Self> {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(target)?;
        let before = names(target)?;
        let beside = if before.contains(OsStr::new(INVENTORY)) {
            Some(tempfile::Builder::new().prefix(".gpusnap-").tempdir_in(target)?)
        } else {
            None
        };
        Ok(Self { target: target.to_owned(), before, beside, done: false })
    }

    /// Where to write it.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.beside.as_ref().map_or(&self.target, |beside| beside.path())
    }

    /// Puts it in the place of what was there.
    ///
    /// # Errors
    /// A file that cannot be removed or moved. What there is stays.
    pub fn publish(mut self) -> io::Result<()> {
        // From here on all that there is of the container may be these files.
        self.done = true;
        let Some(beside) = self.beside.take() else { return Ok(()) };
        let beside = beside.keep();
        // Without its inventory the earlier one is none any more: half of each is never taken for a whole.
        let old = self.before.iter().filter(|name| is_ours(name));
        for name in [OsStr::new(INVENTORY)].into_iter().chain(old.map(OsString::as_os_str)) {
            match std::fs::remove_file(self.target.join(name)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        for name in names(&beside)?.iter().filter(|name| *name != INVENTORY) {
            std::fs::rename(beside.join(name), self.target.join(name))?;
        }
        std::fs::rename(beside.join(INVENTORY), self.target.join(INVENTORY))?;
        std::fs::remove_dir(&beside)
    }

    /// Keeps what there is, unfinished: the container has ended.
    #[must_use]
    pub fn keep(mut self) -> PathBuf {
        self.done = true;
        self.beside.take().map_or_else(|| self.target.clone(), tempfile::TempDir::keep)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if self.done || self.beside.is_some() {
            return;
        }
        let remove = || -> io::Result<()> {
            for name in names(&self.target)? {
                if is_ours(&name) && !self.before.contains(&name) {
                    std::fs::remove_file(self.target.join(&name))?;
                }
            }
            Ok(())
        };
        match remove() {
            Ok(()) => {}
            // containerd has removed its folder.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => tracing::warn!("a failed checkpoint is left in {}: {error}", self.target.display()),
        }
    }
}

fn names(folder: &Path) -> io::Result<BTreeSet<OsString>> {
    std::fs::read_dir(folder)?.map(|entry| Ok(entry?.file_name())).collect()
}

/// Whether a checkpoint writes files of this name.
fn is_ours(name: &OsStr) -> bool {
    let fixed = ["stats-dump", "descriptors.json", crate::shm::FILE, crate::manifest::FILE];
    let is_memory = name.to_str().is_some_and(bulk::is_inline);
    Path::new(name).extension() == Some(OsStr::new("img")) || is_memory || fixed.iter().any(|fixed| name == *fixed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(folder: &Path, names: &[&str]) {
        for name in names {
            std::fs::write(folder.join(name), *name).unwrap();
        }
    }

    fn list(folder: &Path) -> Vec<String> {
        names(folder).unwrap().into_iter().map(|name| name.into_string().unwrap()).collect()
    }

    #[test]
    fn a_checkpoint_that_comes_to_nothing_leaves_what_was_there() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), &["mine.txt", "core-7.img"]);
        let draft = Draft::begin(folder.path()).unwrap();
        write(draft.folder(), &["core-1.img", "gpusnap.json"]);
        drop(draft);
        assert_eq!(list(folder.path()), ["core-7.img", "mine.txt"]);
    }

    #[test]
    fn an_earlier_checkpoint_stays_until_the_new_one_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), &["inventory.img", "core-7.img", "notes"]);
        let draft = Draft::begin(folder.path()).unwrap();
        write(draft.folder(), &["core-1.img"]);
        drop(draft);
        assert_eq!(list(folder.path()), ["core-7.img", "inventory.img", "notes"]);

        let draft = Draft::begin(folder.path()).unwrap();
        write(draft.folder(), &["core-1.img", "inventory.img", "gpusnap.json"]);
        draft.publish().unwrap();
        assert_eq!(list(folder.path()), ["core-1.img", "gpusnap.json", "inventory.img", "notes"]);
    }

    #[test]
    fn a_missing_folder_is_made_for_root_alone() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("a/b");
        Draft::begin(&target).unwrap().publish().unwrap();
        assert_eq!(std::fs::metadata(target).unwrap().permissions().mode() & 0o777, 0o700);
    }
}
