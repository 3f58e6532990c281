//! Restores files of a tree from an archive.
//!
//! The archive gives names, kinds, owners, permissions and contents, and nothing else is trusted. A
//! name is a path of plain components, folders are opened through no link, and files are made but
//! never opened. Setuid and setgid are not restored for anything executable: the tree's mount need
//! not be `nosuid`.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags};
use tar::EntryType;

use super::FILE;
use super::save::is_gone;
use super::tree::{Entry, Tree};

/// Bits that make a program run as its owner or group.
const SET_ID: u32 = 0o6000;
const SET_UID: u32 = 0o4000;
/// Most bytes of an entry with names: more than any path of Linux, with room for extensions of pax.
const MOST_NAMES: u64 = 16 << 10;
/// Size of a piece of zeros that becomes a hole, in a file with holes.
const PAGE: usize = 4096;

/// Makes all files of the archive that the tree lacks.
pub(super) fn load(tree: &Tree, mut archive: &File) -> io::Result<()> {
    check_extensions(archive)?;
    archive.rewind()?;
    let mut left_out = LeftOut::default();
    for entry in tar::Archive::new(io::BufReader::with_capacity(1 << 20, archive)).entries()? {
        let mut entry = entry?;
        let path = entry.path()?.into_owned();
        let (parent, name) = parts(&path)?;
        let folder = match tree.folder(parent) {
            Ok(folder) => folder,
            Err(error) if is_gone(&error) => {
                left_out.add(path);
                continue;
            }
            Err(error) => return Err(because(&error, &path)),
        };
        match make(tree, &folder, name, &mut entry) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                tracing::debug!("{} is in /dev/shm already", path.display());
            }
            made => made.map_err(|error| because(&error, &path))?,
        }
    }
    if let Some(warning) = left_out.warning() {
        tracing::warn!("{warning}");
    }
    Ok(())
}

/// Entries of the archive that are not restored. One warning covers them all: the maker of an
/// archive may add any number.
#[derive(Debug, Default)]
pub(super) struct LeftOut {
    first: Option<PathBuf>,
    others: u64,
}

impl LeftOut {
    pub(super) fn add(&mut self, path: PathBuf) {
        match self.first {
            Some(_) => self.others += 1,
            None => self.first = Some(path),
        }
    }

    /// Returns the warning; `None` if everything is restored.
    pub(super) fn warning(&self) -> Option<String> {
        let first = self.first.as_ref()?.display();
        let others = if self.others == 0 { String::new() } else { format!(" and {} more", self.others) };
        Some(format!(
            "{first}{others} not restored in /dev/shm: a file of another container is in the place of the folder"
        ))
    }
}

/// Checks entries with names of later entries: such entries are read into memory.
fn check_extensions(archive: &File) -> io::Result<()> {
    for entry in tar::Archive::new(archive).entries_with_seek()?.raw(true) {
        let entry = entry?;
        let kind = entry.header().entry_type();
        let says_names = kind.is_gnu_longname()
            || kind.is_gnu_longlink()
            || kind.is_pax_local_extensions()
            || kind.is_pax_global_extensions();
        if says_names && entry.header().entry_size()? > MOST_NAMES {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("{FILE} has a name that is too long")));
        }
    }
    Ok(())
}

fn because(error: &io::Error, path: &Path) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

fn invalid(path: &Path) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{FILE} leads to {}", path.display()))
}

/// The folder and the last component of a path below the top.
fn parts(path: &Path) -> io::Result<(&Path, &OsStr)> {
    let is_plain = path.components().all(|component| matches!(component, Component::Normal(_)));
    let parts = path.parent().zip(path.file_name()).filter(|_| is_plain);
    parts.ok_or_else(|| invalid(path))
}

/// Owner and permissions of an entry.
struct Owner {
    uid: u32,
    gid: u32,
    mode: u32,
}

impl Owner {
    fn of(header: &tar::Header) -> io::Result<Self> {
        let id =
            |id: u64| u32::try_from(id).map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "an impossible owner"));
        Ok(Self { uid: id(header.uid()?)?, gid: id(header.gid()?)?, mode: header.mode()? & 0o7777 })
    }
}

fn make(tree: &Tree, folder: &OwnedFd, name: &OsStr, entry: &mut tar::Entry<'_, impl Read>) -> io::Result<()> {
    let owner = Owner::of(entry.header())?;
    match entry.header().entry_type() {
        EntryType::Directory => {
            rustix::fs::mkdirat(folder, name, Mode::RWXU)?;
            // Setgid of a folder only determines the group of new files in the folder.
            made(folder, name, FileType::Directory, &owner, Some(owner.mode & !SET_UID))
        }
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
            let file = create(folder, name)?;
            let is_sparse = entry.header().entry_type() == EntryType::GNUSparse;
            copy(entry, &file, is_sparse)?;
            std::os::unix::fs::fchown(&file, Some(owner.uid), Some(owner.gid))?;
            file.set_permissions(std::fs::Permissions::from_mode(owner.mode & !SET_ID))?;
            let modified = std::time::Duration::from_secs(entry.header().mtime()?);
            let modified = std::time::UNIX_EPOCH.checked_add(modified);
            modified.map_or(Ok(()), |modified| file.set_modified(modified))
        }
        EntryType::Symlink => {
            let target = entry.link_name()?.unwrap_or_default().into_owned();
            rustix::fs::symlinkat(&target, folder, name)?;
            made(folder, name, FileType::Symlink, &owner, None)
        }
        EntryType::Link => {
            let first: PathBuf = entry.link_name()?.unwrap_or_default().into_owned();
            let (parent, first_name) = parts(&first)?;
            let first = Entry::at(&tree.folder(parent)?, first_name)?;
            if FileType::from_raw_mode(first.stat.st_mode) != FileType::RegularFile {
                return Err(io::Error::from(io::ErrorKind::AlreadyExists));
            }
            first.link(folder, name)
        }
        EntryType::Fifo => {
            rustix::fs::mknodat(folder, name, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
            made(folder, name, FileType::Fifo, &owner, Some(owner.mode & !SET_ID))
        }
        other => {
            tracing::debug!("an entry of kind {other:?} is left out of /dev/shm");
            Ok(())
        }
    }
}

/// Sets the owner and permissions of a new entry. Anything put in the entry's place meanwhile stays
/// unchanged.
fn made(folder: &OwnedFd, name: &OsStr, kind: FileType, owner: &Owner, mode: Option<u32>) -> io::Result<()> {
    let entry = match Entry::at(folder, name) {
        Ok(entry) => entry,
        Err(error) if is_gone(&error) => return Ok(()),
        Err(error) => return Err(error),
    };
    let is_as_made = match kind {
        FileType::Directory => entry.stat.st_mode & 0o7777 & !0o2000 == 0o700,
        FileType::Fifo => entry.stat.st_mode & 0o7777 & !0o600 == 0,
        _ => true,
    };
    let is_ours = FileType::from_raw_mode(entry.stat.st_mode) == kind
        && entry.stat.st_uid == rustix::process::geteuid().as_raw()
        && is_as_made;
    if is_ours { entry.own(owner.uid, owner.gid, mode) } else { Ok(()) }
}

fn create(folder: &OwnedFd, name: &OsStr) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(File::from(rustix::fs::openat(folder, name, flags, Mode::RUSR | Mode::WUSR)?))
}

/// Writes contents. Files with holes have them again; all other files have all their memory.
fn copy(from: &mut impl Read, to: &File, is_sparse: bool) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0_u64;
    loop {
        let mut filled = 0;
        while filled < buffer.len() {
            match from.read(&mut buffer[filled..])? {
                0 => break,
                read => filled += read,
            }
        }
        if filled == 0 {
            return to.set_len(at);
        }
        let size = if is_sparse { PAGE } else { buffer.len() };
        for piece in buffer[..filled].chunks(size) {
            if !is_sparse || piece.iter().any(|byte| *byte != 0) {
                to.write_all_at(piece, at)?;
            }
            at += piece.len() as u64;
        }
    }
}
