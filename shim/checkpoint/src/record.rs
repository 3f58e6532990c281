//! The commit record: `gpusnap.json` from the first moment of a checkpoint to the last.
//!
//! ```text
//!   Record::begin ──► "incomplete" ──► CRIU dumps, images are cut, memory is published ──► Record::complete ──► "complete"
//!                          └── whoever dies in between leaves a folder that a restore refuses
//! ```
//!
//! The record is written before any other file, so that a folder never looks whole without being
//! so. Room for the final record is reserved at the beginning: a disk that fills up meanwhile
//! cannot prevent the commit.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use images::{Image, ImageError};
use rustix::fs::FallocateFlags;
use serde::{Deserialize, Serialize};

use crate::draft::is_ours;
use crate::manifest::{Manifest, now};

/// Name of the record among the images.
pub(crate) const FILE: &str = "gpusnap.json";
/// Name of the final record before the commit.
pub(crate) const NEXT: &str = ".gpusnap.json.new";
/// Oldest known version. Version 1 has all memory in the images, version 2 may have memory
/// elsewhere; both have no state.
const OLDEST: u32 = 1;
const VERSION: u32 = 3;
/// Most bytes of a record; a few hundred are usual.
const SIZE_LIMIT: u64 = 1 << 20;
/// Room for the manifest of some hundred GPU processes.
const RESERVE: u64 = 64 << 10;

/// Failure to find a restorable checkpoint in a folder.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// The images are missing or damaged.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The record cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The record.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// The record is not valid.
    #[error("{path} is damaged: {what}")]
    Damaged {
        /// The record.
        path: PathBuf,
        /// The damage.
        what: String,
    },
    /// The record is of another version.
    #[error("{path} has version {found}, where {OLDEST} to {VERSION} are known: restore it with a newer gpusnap")]
    Version {
        /// The record.
        path: PathBuf,
        /// The record's version.
        found: u32,
    },
    /// A file of the checkpoint is a link or a device, and would lead a restore to other files.
    #[error("{path} is not a regular file")]
    NotAFile {
        /// The file.
        path: PathBuf,
    },
    /// The checkpoint was begun and never completed.
    #[error(
        "the checkpoint of container {container} in {folder} is incomplete: gpusnap or the machine was stopped before it was \
         whole. Take a new one; this one cannot be restored, and may be deleted"
    )]
    Incomplete {
        /// The folder.
        folder: PathBuf,
        /// The container to be saved.
        container: String,
    },
    /// Memory was cut from the images, and no record locates the memory.
    #[error(
        "the images in {folder} lack the container's big memory, and no {FILE} locates it: \
         restore the whole folder as gpusnap wrote it, or take a new checkpoint"
    )]
    Cut {
        /// The folder.
        folder: PathBuf,
    },
}

/// State of a checkpoint in the record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum State {
    Incomplete,
    Complete,
}

/// First fields of every record.
#[derive(Debug, Deserialize)]
struct Head {
    version: u32,
    /// The state; `None` in old versions, always of complete checkpoints.
    state: Option<State>,
    #[serde(default)]
    container: String,
    /// None in records of earlier gpusnaps.
    began: Option<u64>,
}

#[derive(Serialize)]
struct Incomplete<'a> {
    version: u32,
    state: State,
    container: &'a str,
    began: u64,
    created: u64,
}

#[derive(Serialize)]
struct Complete<'a> {
    version: u32,
    state: State,
    began: u64,
    #[serde(flatten)]
    manifest: &'a Manifest,
}

/// The record of a checkpoint in progress.
#[derive(Debug)]
pub struct Record {
    folder: PathBuf,
    began: u64,
    /// The final record, with room reserved.
    next: File,
}

impl Record {
    /// Records in `folder` that a checkpoint of `container` has begun. `began` is in milliseconds since
    /// 1970: both together identify the checkpoint.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn begin(folder: &Path, container: &str, began: u64) -> io::Result<Self> {
        let begun = Incomplete { version: VERSION, state: State::Incomplete, container, began, created: now() };
        let mut file = create(folder)?;
        serde_json::to_writer(&mut file, &begun)?;
        put_in_place(folder)?;
        let next = create(folder)?;
        match rustix::fs::fallocate(&next, FallocateFlags::KEEP_SIZE, 0, RESERVE) {
            // A file system without reservation of room.
            Ok(()) | Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(Self { folder: folder.to_owned(), began, next })
    }

    /// Commits the checkpoint, atomically.
    ///
    /// # Errors
    /// A file that cannot be written. The record stays incomplete then.
    pub fn complete(mut self, manifest: &Manifest) -> io::Result<()> {
        let complete = Complete { version: VERSION, state: State::Complete, began: self.began, manifest };
        self.next.write_all(&serde_json::to_vec(&complete)?)?;
        put_in_place(&self.folder)
    }
}

fn create(folder: &Path) -> io::Result<File> {
    let path = folder.join(NEXT);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    File::options().write(true).create_new(true).mode(0o600).open(path)
}

/// Renames without a flush: a flush waits for all of CRIU's writes, for tens of seconds on a slow
/// disk, while the container stands still. After a power cut the images are no better than the
/// record.
fn put_in_place(folder: &Path) -> io::Result<()> {
    std::fs::rename(folder.join(NEXT), folder.join(FILE))
}

/// A folder with a whole checkpoint, according to the record.
#[derive(Debug)]
pub struct Folder {
    /// Properties of the images.
    pub image: Image,
    /// The manifest; `None` for a checkpoint of another shim.
    pub manifest: Option<Manifest>,
}

impl Folder {
    /// Reads the inventory, the threads and the record of a checkpoint.
    ///
    /// # Errors
    /// A folder without a checkpoint, with an incomplete one, or with cut images and no record of
    /// the memory.
    pub fn inspect(folder: &Path) -> Result<Self, FolderError> {
        // Read the record first: an incomplete checkpoint may lack anything else.
        let manifest = read(folder)?;
        let image = images::inspect(folder)?;
        check_files(folder)?;
        images::check_threads(folder)?;
        let is_filled = manifest.as_ref().is_some_and(|manifest| manifest.memory().is_some());
        if image.is_cut() && !is_filled {
            return Err(FolderError::Cut { folder: folder.to_owned() });
        }
        Ok(Self { image, manifest })
    }
}

/// Checks that all files for CRIU and the shim are in the folder itself.
fn check_files(folder: &Path) -> Result<(), FolderError> {
    let failed = |source| FolderError::Read { path: folder.to_owned(), source };
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if is_ours(&entry.file_name()) && !entry.file_type().map_err(failed)?.is_file() {
            return Err(FolderError::NotAFile { path: entry.path() });
        }
    }
    Ok(())
}

/// Reads the manifest of a complete checkpoint; `None` without a record.
pub(crate) fn read(folder: &Path) -> Result<Option<Manifest>, FolderError> {
    let Some((bytes, head)) = read_head(folder)? else { return Ok(None) };
    let path = folder.join(FILE);
    let damaged = |what: String| FolderError::Damaged { path: path.clone(), what };
    match (head.version, head.state) {
        (OLDEST..VERSION, _) | (VERSION, Some(State::Complete)) => {}
        (VERSION, Some(State::Incomplete)) => {
            return Err(FolderError::Incomplete { folder: folder.to_owned(), container: head.container });
        }
        (VERSION, None) => return Err(damaged("it has no state".into())),
        (found, _) => return Err(FolderError::Version { path, found }),
    }
    serde_json::from_slice(&bytes).map(Some).map_err(|error| damaged(error.to_string()))
}

/// Reads a record, and the part that all versions have; None without a record.
fn read_head(folder: &Path) -> Result<Option<(Vec<u8>, Head)>, FolderError> {
    let path = folder.join(FILE);
    let failed = |source| FolderError::Read { path: path.clone(), source };
    let damaged = |what: String| FolderError::Damaged { path: path.clone(), what };
    // Through no link, and without waiting for a fifo's other end: anybody may have made the
    // folder.
    let file = File::options().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(&path);
    let file = match file {
        Ok(file) => file,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(error) => return Err(failed(error)),
    };
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(damaged("it is not a regular file".into()));
    }
    let mut bytes = Vec::new();
    file.take(SIZE_LIMIT + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > SIZE_LIMIT {
        return Err(damaged(format!("it is larger than {SIZE_LIMIT} bytes")));
    }
    let head = serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
    Ok(Some((bytes, head)))
}

/// Returns whether the folder has the complete record of this checkpoint of a container.
pub(crate) fn is_complete(folder: &Path, container: &str, began: u64) -> bool {
    let head = read_head(folder).ok().flatten().map(|(_, head)| head);
    head.is_some_and(|head| {
        let is_this = head.container == container && head.began == Some(began);
        is_this && head.version == VERSION && head.state == Some(State::Complete)
    })
}

/// Returns whether the folder has a record that was never completed.
pub(crate) fn is_incomplete(folder: &Path) -> bool {
    matches!(read(folder), Err(FolderError::Incomplete { .. }))
}

#[cfg(test)]
mod tests {
    use runtime::{Allow, Phase, Timeline};

    use super::*;

    fn manifest() -> Manifest {
        let timeline = Timeline::start(Phase::Freeze);
        Manifest::new("c", "runc".into(), Allow::default(), None, None, Some(5), &timeline)
    }

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort_unstable();
        names
    }

    #[test]
    fn what_is_completed_is_read() {
        let folder = tempfile::tempdir().unwrap();
        assert!(read(folder.path()).unwrap().is_none());
        let manifest = manifest();
        Record::begin(folder.path(), "c", 1).unwrap().complete(&manifest).unwrap();
        assert_eq!(read(folder.path()).unwrap(), Some(manifest));
        assert_eq!(names(folder.path()), [FILE]);
    }

    #[test]
    fn what_is_begun_and_not_completed_is_refused_with_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        let record = Record::begin(folder.path(), "web", 1).unwrap();
        let error = Folder::inspect(folder.path()).unwrap_err().to_string();
        assert!(error.contains("web") && error.contains("incomplete") && error.contains("Take a new one"), "{error}");
        assert!(is_incomplete(folder.path()));
        // Left by a killed shim.
        drop(record);
        assert!(is_incomplete(folder.path()));
        // The next checkpoint can begin there.
        Record::begin(folder.path(), "web", 1).unwrap().complete(&manifest()).unwrap();
        assert!(read(folder.path()).unwrap().is_some());
    }

    /// Writes the smallest folder that passes for a checkpoint, without processes. The inventory
    /// names these plugins.
    fn write_images(folder: &Path, plugins: &[u8]) {
        let mut inventory = vec![0x16, 0x31, 0x31, 0x58, 0, 0, 0, 0, 8, 2];
        if !plugins.is_empty() {
            inventory.extend([
                0x62,
                u8::try_from(plugins.len() + 2).unwrap(),
                0x62,
                u8::try_from(plugins.len()).unwrap(),
            ]);
            inventory.extend(plugins);
        }
        inventory[4] = u8::try_from(inventory.len() - 8).unwrap();
        std::fs::write(folder.join(images::INVENTORY), inventory).unwrap();
        std::fs::write(folder.join("pstree.img"), [0x19, 0x43, 0x56, 0x54, 0x30, 0x30, 0x27, 0x50]).unwrap();
    }

    #[test]
    fn images_without_their_memory_need_a_record_that_says_where_it_is() {
        let folder = tempfile::tempdir().unwrap();
        write_images(folder.path(), b"");
        assert!(Folder::inspect(folder.path()).unwrap().manifest.is_none());
        write_images(folder.path(), images::MARK.as_bytes());
        let refused = |folder: &Path| Folder::inspect(folder).unwrap_err().to_string();
        assert!(refused(folder.path()).contains("restore the whole folder as gpusnap wrote it"));
        Record::begin(folder.path(), "c", 1).unwrap().complete(&manifest()).unwrap();
        assert!(refused(folder.path()).contains("big memory"), "its record says nothing of memory");
        let timeline = Timeline::start(Phase::Freeze);
        let memory = bulk::Published { source: bulk::Source::Inline, memory: 1, spared: 0 };
        let manifest = Manifest::new("c", "runc".into(), Allow::default(), None, Some(memory), None, &timeline);
        Record::begin(folder.path(), "c", 1).unwrap().complete(&manifest).unwrap();
        assert!(Folder::inspect(folder.path()).unwrap().image.is_cut());
    }

    #[test]
    fn a_link_among_the_images_is_refused() {
        for name in ["pages-1.img", "memory.segments", "memory-000000.pack", "dev-shm.tar"] {
            let folder = tempfile::tempdir().unwrap();
            write_images(folder.path(), b"");
            std::os::unix::fs::symlink("/etc/passwd", folder.path().join(name)).unwrap();
            let error = Folder::inspect(folder.path()).unwrap_err();
            assert!(matches!(&error, FolderError::NotAFile { path } if path.ends_with(name)), "{error}");
        }
    }

    #[test]
    fn the_golden_files_are_understood() {
        let folder = tempfile::tempdir().unwrap();
        let read = |golden: &str| {
            std::fs::write(folder.path().join(FILE), golden).unwrap();
            read(folder.path())
        };
        assert!(read(include_str!("testdata/gpusnap.json")).unwrap().is_some());
        assert!(read(include_str!("testdata/gpusnap-complete.json")).unwrap().is_some());
        let incomplete = read(include_str!("testdata/gpusnap-incomplete.json")).unwrap_err();
        assert!(matches!(&incomplete, FolderError::Incomplete { container, .. } if container == "web"), "{incomplete}");
    }

    #[test]
    fn what_a_later_version_wrote_is_refused_and_what_is_no_record_as_well() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE);
        let read = |content: &str| {
            std::fs::write(&path, content).unwrap();
            read(folder.path()).unwrap_err().to_string()
        };
        let later = include_str!("testdata/gpusnap-complete.json").replace("\"version\":3", "\"version\":4");
        assert!(read(&later).contains("version 4"));
        assert!(read(&later.replace("\"version\":4,\"state\":\"complete\"", "\"version\":3")).contains("no state"));
        assert!(read("{").contains("damaged"));
        assert!(read(&" ".repeat(2 << 20)).contains("larger"));
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", &path).unwrap();
        assert!(matches!(super::read(folder.path()), Err(FolderError::Read { .. })));
    }

    #[test]
    fn a_full_disk_does_not_keep_a_checkpoint_from_being_completed() {
        let folder = tempfile::tempdir().unwrap();
        let options = "size=256k,nr_inodes=64";
        // Requires root, as all of these tests do in CI; without root there is no disk to fill.
        let flags = rustix::mount::MountFlags::empty();
        let options = std::ffi::CString::new(options).unwrap();
        if rustix::mount::mount("tmpfs", folder.path(), "tmpfs", flags, options.as_c_str()).is_err() {
            return;
        }
        let record = Record::begin(folder.path(), "c", 1).unwrap();
        let mut hog = File::create(folder.path().join("hog")).unwrap();
        while hog.write_all(&[1; 4096]).is_ok() {}
        let completed = record.complete(&manifest());
        let found = read(folder.path());
        rustix::mount::unmount(folder.path(), rustix::mount::UnmountFlags::DETACH).unwrap();
        completed.unwrap();
        assert!(found.unwrap().is_some());
    }
}
