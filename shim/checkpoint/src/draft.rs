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
    beside: Option<PathBuf>,
    /// The record; `None` once the checkpoint is complete.
    record: Option<Record>,
    done: bool,
    /// Lock against a second draft in the same folder.
    _lock: File,
}

impl Draft {
    /// Makes the folder of a checkpoint, if it is missing. To be called once for a request: later on, a folder that is
    /// missing was removed by a client that is gone.
    ///
    /// # Errors
    /// A folder that cannot be made.
    pub fn make_folder(target: &Path) -> io::Result<()> {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(target)
    }

    /// Begins a checkpoint of `container` in `target`. `began` is in milliseconds since 1970. Unfinished checkpoints of
    /// killed sessions are removed there.
    ///
    /// # Errors
    /// A folder that is missing, or cannot be read or written, or in which another checkpoint is being written.
    pub fn begin(target: &Path, container: &str, began: u64) -> io::Result<Self> {
        let lock = lock(target)?;
        remove_stale(target, &record::is_incomplete)?;
        let mut before = names(target)?;
        if record::is_incomplete(target) {
            remove(target, before.iter().filter(|name| is_ours(name)))?;
            before = names(target)?;
        }
        let beside = if before.contains(OsStr::new(INVENTORY)) {
            Some(tempfile::Builder::new().prefix(PREFIX).tempdir_in(target)?.keep())
        } else {
            None
        };
        let folder = beside.as_deref().unwrap_or(target);
        let mut draft =
            Self { target: target.to_owned(), before, record: None, done: false, _lock: lock, beside: beside.clone() };
        let record = Record::begin(folder, container, began);
        draft.record = Some(record?);
        Ok(draft)
    }

    /// Returns the complete checkpoint that a killed session had begun at this time, published or not.
    ///
    /// # Errors
    /// A folder that cannot be read, or in which another checkpoint is being written.
    pub fn complete_of(target: &Path, container: &str, began: u64) -> io::Result<Option<Self>> {
        let is_it = |folder: &Path| record::is_complete(folder, container, began);
        let beside = match drafts(target) {
            Ok(drafts) => drafts.into_iter().find(|folder| is_it(folder)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        if beside.is_none() && !is_it(target) {
            return Ok(None);
        }
        let lock = lock(target)?;
        let mut before = names(target)?;
        if beside.is_none() {
            before.retain(|name| !is_ours(name));
        }
        Ok(Some(Self { target: target.to_owned(), before, beside, record: None, done: false, _lock: lock }))
    }

    /// Returns the folder for the images.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.beside.as_deref().unwrap_or(&self.target)
    }

    /// Marks the record as complete.
    ///
    /// # Errors
    /// A file that cannot be written. The checkpoint stays incomplete then.
    pub fn complete(&mut self, manifest: &Manifest) -> io::Result<()> {
        self.record.take().map_or(Ok(()), |record| record.complete(manifest))
    }

    /// Leaves everything as it is.
    pub fn leave(mut self) {
        self.done = true;
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
}

/// Locks the folder of a checkpoint until the returned file is closed.
fn lock(target: &Path) -> io::Result<File> {
    let lock = File::open(target)?;
    match lock.try_lock() {
        Err(TryLockError::WouldBlock) => Err(io::Error::new(
            io::ErrorKind::ResourceBusy,
            "another checkpoint is being written there: wait for it, or name another folder",
        )),
        // A file system without locks: its users have to avoid a shared folder.
        Err(TryLockError::Error(_)) | Ok(()) => Ok(lock),
    }
}

/// Returns the folders of drafts beside a checkpoint.
fn drafts(target: &Path) -> io::Result<Vec<PathBuf>> {
    let names = names(target)?;
    let names = names.iter().filter(|name| name.as_encoded_bytes().starts_with(PREFIX.as_bytes()));
    Ok(names.map(|name| target.join(name)).collect())
}

impl Drop for Draft {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        let removed = match &self.beside {
            Some(beside) => std::fs::remove_dir_all(beside),
            None => names(&self.target).and_then(|names| {
                remove(&self.target, names.iter().filter(|name| is_ours(name) && !self.before.contains(*name)))
            }),
        };
        match removed {
            Ok(()) => {}
            // containerd has removed its folder.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => tracing::warn!("a failed checkpoint is left in {}: {error}", self.folder().display()),
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
    for path in drafts(target)? {
        if !std::fs::symlink_metadata(&path).is_ok_and(|found| found.is_dir()) {
            continue;
        }
        let name = path.file_name().unwrap_or_default();
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
        draft.complete(&manifest()).unwrap();
        draft.publish().unwrap();
    }

    fn manifest() -> Manifest {
        let timeline = Timeline::start(Phase::Freeze);
        Manifest::new("c", "runc".into(), Allow::default(), None, None, None, &timeline)
    }

    #[test]
    fn a_complete_checkpoint_of_a_killed_session_is_known_again_and_can_be_removed_or_published() {
        let folder = tempfile::tempdir().unwrap();
        let complete = |began, name: &str| {
            let mut draft = Draft::begin(folder.path(), "c", began).unwrap();
            write(draft.folder(), &["inventory.img", name]);
            draft.complete(&manifest()).unwrap();
            draft.leave();
        };
        let of = |began| Draft::complete_of(folder.path(), "c", began).unwrap();
        write(folder.path(), &["mine"]);
        assert!(of(1).is_none());
        Draft::begin(folder.path(), "c", 1).unwrap().leave();
        assert!(of(1).is_none(), "an incomplete one");
        complete(1, "core-1.img");
        assert!(of(2).is_none(), "another one");
        assert!(Draft::complete_of(folder.path(), "d", 1).unwrap().is_none(), "another container's");
        drop(of(1).unwrap());
        assert_eq!(list(folder.path()), ["mine"]);
        complete(2, "core-2.img");
        of(2).unwrap().publish().unwrap();
        assert_eq!(list(folder.path()), ["core-2.img", "gpusnap.json", "inventory.img", "mine"]);
        // Beside an earlier checkpoint.
        complete(3, "core-3.img");
        drop(of(3).unwrap());
        assert_eq!(list(folder.path()), ["core-2.img", "gpusnap.json", "inventory.img", "mine"]);
        complete(4, "core-4.img");
        of(4).unwrap().publish().unwrap();
        assert_eq!(list(folder.path()), ["core-4.img", "gpusnap.json", "inventory.img", "mine"]);
        assert!(of(4).is_some());
        assert!(Draft::complete_of(&folder.path().join("missing"), "c", 1).unwrap().is_none());
    }

    #[test]
    fn a_checkpoint_that_comes_to_nothing_leaves_what_was_there() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), &["mine.txt", "core-7.img"]);
        let draft = Draft::begin(folder.path(), "c", 1).unwrap();
        write(draft.folder(), &["core-1.img"]);
        drop(draft);
        assert_eq!(list(folder.path()), ["core-7.img", "mine.txt"]);
    }

    #[test]
    fn an_earlier_checkpoint_stays_until_the_new_one_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), &["inventory.img", "core-7.img", "notes"]);
        let draft = Draft::begin(folder.path(), "c", 1).unwrap();
        write(draft.folder(), &["core-1.img"]);
        drop(draft);
        assert_eq!(list(folder.path()), ["core-7.img", "inventory.img", "notes"]);

        let draft = Draft::begin(folder.path(), "c", 1).unwrap();
        write(draft.folder(), &["core-1.img", "inventory.img"]);
        publish(draft);
        assert_eq!(list(folder.path()), ["core-1.img", "gpusnap.json", "inventory.img", "notes"]);
    }

    #[test]
    fn a_folder_says_that_it_is_incomplete_before_anything_else_is_in_it() {
        let folder = tempfile::tempdir().unwrap();
        let draft = Draft::begin(folder.path(), "c", 1).unwrap();
        assert!(record::is_incomplete(folder.path()));
        publish(draft);
        assert!(!record::is_incomplete(folder.path()));
        let draft = Draft::begin(folder.path(), "c", 1).unwrap();
        draft.publish().unwrap_err();
    }

    #[test]
    fn what_a_killed_shim_left_is_removed_by_the_next_checkpoint() {
        let folder = tempfile::tempdir().unwrap();
        let draft = Draft::begin(folder.path(), "c", 1).unwrap();
        write(draft.folder(), &["pages-9.img", "memory-000000.pack", "mm-1.new", ".tmpAb12Cd", "mine"]);
        draft.leave();
        drop(Draft::begin(folder.path(), "c", 1).unwrap());
        assert_eq!(list(folder.path()), ["mine"]);
        let draft = Draft::begin(folder.path(), "c", 1).unwrap();
        write(draft.folder(), &["inventory.img", "pages-9.img"]);
        draft.leave();
        assert!(record::is_incomplete(folder.path()));
        let draft = Draft::begin(folder.path(), "c", 1).unwrap();
        write(draft.folder(), &["inventory.img"]);
        publish(draft);
        assert_eq!(list(folder.path()), ["gpusnap.json", "inventory.img", "mine"]);
        // Beside an earlier checkpoint.
        let draft = Draft::begin(folder.path(), "c", 1).unwrap();
        write(draft.folder(), &["core-1.img", "inventory.img"]);
        draft.leave();
        assert_eq!(list(folder.path()).len(), 4);
        drop(Draft::begin(folder.path(), "c", 1).unwrap());
        assert_eq!(list(folder.path()), ["gpusnap.json", "inventory.img", "mine"]);
    }

    #[test]
    fn a_folder_that_a_restore_reads_from_is_not_taken_for_left_behind() {
        let (folder, work) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let inventory = [0x16, 0x31, 0x31, 0x58, 2, 0, 0, 0, 8, 2];
        std::fs::write(folder.path().join(INVENTORY), inventory).unwrap();
        let unmarked = images::Unmarked::of(folder.path(), work.path()).unwrap();
        drop(Draft::begin(folder.path(), "c", 1).unwrap());
        assert!(unmarked.path().exists());
    }

    #[test]
    fn two_checkpoints_are_not_written_to_one_folder_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let first = Draft::begin(folder.path(), "c", 1).unwrap();
        let error = Draft::begin(folder.path(), "d", 1).unwrap_err();
        assert!(error.to_string().contains("another checkpoint"), "{error}");
        drop(first);
        Draft::begin(folder.path(), "d", 1).unwrap();
    }

    #[test]
    fn a_missing_folder_is_made_for_root_alone_and_only_when_asked_for() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("a/b");
        let error = Draft::begin(&target, "c", 1).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert!(!target.exists());
        Draft::make_folder(&target).unwrap();
        publish(Draft::begin(&target, "c", 1).unwrap());
        assert_eq!(std::fs::metadata(target).unwrap().permissions().mode() & 0o777, 0o700);
    }
}
