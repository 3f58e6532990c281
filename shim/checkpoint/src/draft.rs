//! A checkpoint being written: committed as a whole, or removed without a trace.
//!
//! containerd names an empty folder, or a folder chosen by the client with an earlier checkpoint
//! inside. An empty folder receives the images directly, marked as incomplete by the [`Record`].
//! Beside an earlier checkpoint the images are written into a subfolder, and replace the earlier
//! ones once complete.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use images::INVENTORY;
use snapshot::Name;

use crate::manifest::Manifest;
use crate::record::{self, Record};

/// Prefix of the names of folders beside a checkpoint.
const PREFIX: &str = ".gpusnap-";

/// A checkpoint being written. Dropped before the publication, the draft is removed.
#[derive(Debug)]
pub struct Draft {
    target: PathBuf,
    /// Names present before the draft, kept if the draft fails.
    before: BTreeSet<OsString>,
    /// The subfolder of the draft, if not the target itself.
    beside: Option<tempfile::TempDir>,
    /// The record; `None` once the checkpoint is complete.
    record: Option<Record>,
    done: bool,
    /// Lock against a second draft in the same folder.
    _lock: File,
}

impl Draft {
    /// Begins a checkpoint of `container` in `target`, and makes a missing folder. Unfinished files
    /// of killed shims are removed.
    ///
    /// # Errors
    /// A folder that cannot be made, read or written, or that has another draft in progress.
    pub fn begin(target: &Path, container: &str) -> io::Result<Self> {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(target)?;
        let lock = File::open(target)?;
        match lock.try_lock() {
            Err(TryLockError::WouldBlock) => {
                return Err(io::Error::new(
                    io::ErrorKind::ResourceBusy,
                    "another checkpoint is being written there: wait for it, or name another folder",
                ));
            }
            // A file system without locks: its users have to avoid a shared folder.
            Err(TryLockError::Error(_)) | Ok(()) => {}
        }
        remove_stale(target, &record::is_incomplete)?;
        let mut before = names(target)?;
        if record::is_incomplete(target) {
            remove(target, before.iter().filter(|name| is_ours(name)))?;
            before = names(target)?;
        }
        let beside = if before.contains(OsStr::new(INVENTORY)) {
            Some(tempfile::Builder::new().prefix(PREFIX).tempdir_in(target)?)
        } else {
            None
        };
        let folder = beside.as_ref().map_or(target, tempfile::TempDir::path);
        let mut draft =
            Self { target: target.to_owned(), before, record: None, done: false, _lock: lock, beside: None };
        let record = Record::begin(folder, container);
        draft.beside = beside;
        draft.record = Some(record?);
        Ok(draft)
    }

    /// Returns the folder for the images.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.beside.as_ref().map_or(&self.target, |beside| beside.path())
    }

    /// Marks the record as complete.
    ///
    /// # Errors
    /// A file that cannot be written. The checkpoint stays incomplete then.
    pub fn complete(&mut self, manifest: &Manifest) -> io::Result<()> {
        self.record.take().map_or(Ok(()), |record| record.complete(manifest))
    }

    /// Replaces the earlier checkpoint by the complete one.
    ///
    /// # Errors
    /// A file that cannot be removed or moved. All present files stay.
    pub fn publish(mut self) -> io::Result<()> {
        // From here on these files may be the only copy of the container.
        self.done = true;
        if self.record.is_some() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the checkpoint is not complete"));
        }
        if let Some(beside) = self.beside.take() {
            let beside = beside.keep();
            // Without its inventory the earlier checkpoint is invalid: a mix of both is never taken
            // for a whole.
            remove(&self.target, [&OsString::from(INVENTORY)])?;
            remove(&self.target, self.before.iter().filter(|name| is_ours(name)))?;
            for name in names(&beside)?.iter().filter(|name| *name != INVENTORY) {
                std::fs::rename(beside.join(name), self.target.join(name))?;
            }
            std::fs::rename(beside.join(INVENTORY), self.target.join(INVENTORY))?;
            std::fs::remove_dir(&beside)?;
        }
        remove_stale(&self.target, &|_| true)
    }

    /// Keeps the unfinished files: the container has ended.
    #[must_use]
    pub fn keep(mut self) -> PathBuf {
        self.done = true;
        self.beside.take().map_or_else(|| self.target.clone(), tempfile::TempDir::keep)
    }
}

/// Returns whether a complete checkpoint in a folder, or in a draft there, has memory in the
/// snapshot of this name.
#[must_use]
pub fn needs(target: &Path, snapshot: &Name) -> bool {
    let beside = names(target).unwrap_or_default();
    let beside = beside.iter().filter(|name| name.as_encoded_bytes().starts_with(PREFIX.as_bytes()));
    let mut folders = std::iter::once(target.to_owned()).chain(beside.map(|name| target.join(name)));
    folders.any(|folder| {
        let Ok(Some(manifest)) = record::read(&folder) else { return false };
        let Some(bulk::Source::Snapshot(pointer)) = manifest.memory().map(|memory| &memory.source) else {
            return false;
        };
        pointer.name() == Some(snapshot)
    })
}

impl Drop for Draft {
    fn drop(&mut self) {
        if self.done || self.beside.is_some() {
            return;
        }
        let remove = || {
            let names = names(&self.target)?;
            remove(&self.target, names.iter().filter(|name| is_ours(name) && !self.before.contains(*name)))
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

fn remove<'a>(folder: &Path, names: impl IntoIterator<Item = &'a OsString>) -> io::Result<()> {
    for name in names {
        match std::fs::remove_file(folder.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// Removes the stale folders of killed makers beside a checkpoint.
fn remove_stale(target: &Path, is_stale: &dyn Fn(&Path) -> bool) -> io::Result<()> {
    for name in names(target)?.iter().filter(|name| name.as_encoded_bytes().starts_with(PREFIX.as_bytes())) {
        let path = target.join(name);
        if !std::fs::symlink_metadata(&path).is_ok_and(|found| found.is_dir()) {
            continue;
        }
        let is_view = name.as_encoded_bytes().starts_with(images::UNMARKED_PREFIX.as_bytes());
        // A restore holds the lock of its folder.
        let is_in_use = File::open(&path)?.try_lock().is_err();
        if !is_in_use && (is_view || is_stale(&path)) {
            std::fs::remove_dir_all(&path)?;
        }
    }
    Ok(())
}

/// Returns whether a checkpoint writes files of this name, or a killed writer may have left one.
pub(crate) fn is_ours(name: &OsStr) -> bool {
    let fixed = ["stats-dump", "descriptors.json", crate::shm::FILE, record::FILE, record::NEXT];
    let path = Path::new(name);
    let has = |extension: &str| path.extension() == Some(OsStr::new(extension));
    let text = name.to_str().unwrap_or_default();
    let is_replacement = has("new") && ["inventory.", "mm-", "pagemap-"].iter().any(|start| text.starts_with(start));
    // From the time before the record.
    let is_old = text
        .strip_prefix(".tmp")
        .is_some_and(|rest| rest.len() == 6 && rest.bytes().all(|byte| byte.is_ascii_alphanumeric()));
    has("img") || is_replacement || is_old || bulk::is_inline(text) || fixed.contains(&text)
}

#[cfg(test)]
mod tests {
    use runtime::{Allow, Phase, Timeline};

    use super::*;

    fn write(folder: &Path, names: &[&str]) {
        for name in names {
            std::fs::write(folder.join(name), *name).unwrap();
        }
    }

    fn list(folder: &Path) -> Vec<String> {
        names(folder).unwrap().into_iter().map(|name| name.into_string().unwrap()).collect()
    }

    fn publish(mut draft: Draft) {
        let timeline = Timeline::start(Phase::Freeze);
        let manifest = Manifest::new("c", "runc".into(), Allow::default(), None, None, None, &timeline);
        draft.complete(&manifest).unwrap();
        draft.publish().unwrap();
    }

    /// Leaves a draft as a killed shim would.
    fn killed(draft: Draft) {
        let _ = draft.keep();
    }

    #[test]
    fn a_checkpoint_that_comes_to_nothing_leaves_what_was_there() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), &["mine.txt", "core-7.img"]);
        let draft = Draft::begin(folder.path(), "c").unwrap();
        write(draft.folder(), &["core-1.img"]);
        drop(draft);
        assert_eq!(list(folder.path()), ["core-7.img", "mine.txt"]);
    }

    #[test]
    fn an_earlier_checkpoint_stays_until_the_new_one_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), &["inventory.img", "core-7.img", "notes"]);
        let draft = Draft::begin(folder.path(), "c").unwrap();
        write(draft.folder(), &["core-1.img"]);
        drop(draft);
        assert_eq!(list(folder.path()), ["core-7.img", "inventory.img", "notes"]);

        let draft = Draft::begin(folder.path(), "c").unwrap();
        write(draft.folder(), &["core-1.img", "inventory.img"]);
        publish(draft);
        assert_eq!(list(folder.path()), ["core-1.img", "gpusnap.json", "inventory.img", "notes"]);
    }

    #[test]
    fn a_folder_says_that_it_is_incomplete_before_anything_else_is_in_it() {
        let folder = tempfile::tempdir().unwrap();
        let draft = Draft::begin(folder.path(), "c").unwrap();
        assert!(record::is_incomplete(folder.path()));
        publish(draft);
        assert!(!record::is_incomplete(folder.path()));
        let draft = Draft::begin(folder.path(), "c").unwrap();
        draft.publish().unwrap_err();
    }

    #[test]
    fn what_a_killed_shim_left_is_removed_by_the_next_checkpoint() {
        let folder = tempfile::tempdir().unwrap();
        let draft = Draft::begin(folder.path(), "c").unwrap();
        write(draft.folder(), &["pages-9.img", "memory-000000.pack", "mm-1.new", ".tmpAb12Cd", "mine"]);
        killed(draft);
        drop(Draft::begin(folder.path(), "c").unwrap());
        assert_eq!(list(folder.path()), ["mine"]);
        let draft = Draft::begin(folder.path(), "c").unwrap();
        write(draft.folder(), &["inventory.img", "pages-9.img"]);
        killed(draft);
        assert!(record::is_incomplete(folder.path()));
        let draft = Draft::begin(folder.path(), "c").unwrap();
        write(draft.folder(), &["inventory.img"]);
        publish(draft);
        assert_eq!(list(folder.path()), ["gpusnap.json", "inventory.img", "mine"]);
        // Beside an earlier checkpoint.
        let draft = Draft::begin(folder.path(), "c").unwrap();
        write(draft.folder(), &["core-1.img", "inventory.img"]);
        killed(draft);
        assert_eq!(list(folder.path()).len(), 4);
        drop(Draft::begin(folder.path(), "c").unwrap());
        assert_eq!(list(folder.path()), ["gpusnap.json", "inventory.img", "mine"]);
    }

    #[test]
    fn a_folder_that_a_restore_reads_from_is_not_taken_for_left_behind() {
        let (folder, work) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let inventory = [0x16, 0x31, 0x31, 0x58, 2, 0, 0, 0, 8, 2];
        std::fs::write(folder.path().join(INVENTORY), inventory).unwrap();
        let unmarked = images::Unmarked::of(folder.path(), work.path()).unwrap();
        drop(Draft::begin(folder.path(), "c").unwrap());
        assert!(unmarked.path().exists());
    }

    #[test]
    fn two_checkpoints_are_not_written_to_one_folder_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let first = Draft::begin(folder.path(), "c").unwrap();
        let error = Draft::begin(folder.path(), "d").unwrap_err();
        assert!(error.to_string().contains("another checkpoint"), "{error}");
        drop(first);
        Draft::begin(folder.path(), "d").unwrap();
    }

    #[test]
    fn a_missing_folder_is_made_for_root_alone() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("a/b");
        publish(Draft::begin(&target, "c").unwrap());
        assert_eq!(std::fs::metadata(target).unwrap().permissions().mode() & 0o777, 0o700);
    }
}
