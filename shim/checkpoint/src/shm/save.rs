//! Saves a tree as an archive.

use std::collections::HashMap;
use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, SeekFrom, Stat};
use rustix::io::Errno;

use super::tree::{Entry, Tree, names};

/// Adds the whole tree. One folder is open at a time, at any depth.
pub(super) fn save(tree: &Tree, archive: &mut tar::Builder<impl io::Write>) -> io::Result<()> {
    let mut linked = HashMap::new();
    let mut folders = vec![PathBuf::new()];
    while let Some(path) = folders.pop() {
        let Some(folder) = unless_gone(tree.folder(&path)).map_err(|error| too_deep(error, &path))? else { continue };
        if !path.as_os_str().is_empty() {
            let mut header = header(&rustix::fs::fstat(&folder)?, tar::EntryType::Directory);
            archive.append_data(&mut header, &path, io::empty())?;
        }
        for name in names(&folder)? {
            let entry_path = path.join(&name);
            match unless_gone(Entry::at(&folder, &name))? {
                Some(entry) if kind(&entry.stat) == FileType::Directory => folders.push(entry_path),
                Some(entry) => append(archive, &entry_path, &entry, &mut linked)?,
                None => {}
            }
        }
    }
    Ok(())
}

/// Adds an entry other than a folder. Sockets, without a listener now, and devices are left out.
fn append(
    archive: &mut tar::Builder<impl io::Write>,
    path: &Path,
    entry: &Entry,
    linked: &mut HashMap<u64, PathBuf>,
) -> io::Result<()> {
    let stat = &entry.stat;
    match kind(stat) {
        FileType::RegularFile => {
            if stat.st_nlink > 1 {
                // Processes may share memory through either name.
                if let Some(first) = linked.get(&stat.st_ino) {
                    return archive.append_link(&mut header(stat, tar::EntryType::Link), path, first);
                }
                linked.insert(stat.st_ino, path.to_owned());
            }
            append_file(archive, path, &entry.file()?)
        }
        FileType::Symlink => {
            let Some(target) = unless_gone(entry.target())? else { return Ok(()) };
            archive.append_link(&mut header(stat, tar::EntryType::Symlink), path, target)
        }
        FileType::Fifo => archive.append_data(&mut header(stat, tar::EntryType::Fifo), path, io::empty()),
        _ => {
            tracing::debug!("{} in /dev/shm is left out of a checkpoint", path.display());
            Ok(())
        }
    }
}

fn kind(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

fn header(stat: &Stat, kind: tar::EntryType) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(stat.st_mode & 0o7777);
    header.set_uid(stat.st_uid.into());
    header.set_gid(stat.st_gid.into());
    header.set_mtime(u64::try_from(stat.st_mtime).unwrap_or_default());
    header.set_size(0);
    header
}

/// Adds a file with the length at the time of opening, even if shortened meanwhile.
pub(super) fn append_file(archive: &mut tar::Builder<impl io::Write>, path: &Path, file: &File) -> io::Result<()> {
    /// Unit of `st_blocks`.
    const BLOCK: u64 = 512;
    let metadata = file.metadata()?;
    if metadata.blocks() * BLOCK < metadata.len() {
        // The archiver itself finds the holes, in a file that nobody changes meanwhile.
        return archive.append_file(path, &mut copy_with_holes(file, &metadata)?);
    }
    let mut header = tar::Header::new_gnu();
    header.set_metadata(&metadata);
    header.set_size(metadata.len());
    archive.append_data(&mut header, path, Padded { file, left: metadata.len() })
}

/// A copy in memory with the file's current holes.
fn copy_with_holes(file: &File, metadata: &Metadata) -> io::Result<File> {
    let copy = File::from(rustix::fs::memfd_create("gpusnap-shm", rustix::fs::MemfdFlags::CLOEXEC)?);
    copy.set_len(metadata.len())?;
    copy.set_permissions(metadata.permissions())?;
    std::os::unix::fs::fchown(&copy, Some(metadata.uid()), Some(metadata.gid()))?;
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    while at < metadata.len() {
        let data = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(data) => data,
            // No more data.
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let hole = rustix::fs::seek(file, SeekFrom::Hole(data)).unwrap_or(metadata.len());
        let end = hole.min(metadata.len());
        at = data;
        while at < end {
            let most = usize::try_from(end - at).unwrap_or(usize::MAX).min(buffer.len());
            let read = file.read_at(&mut buffer[..most], at)?;
            if read == 0 {
                // The file has been shortened.
                return Ok(copy);
            }
            copy.write_all_at(&buffer[..read], at)?;
            at += read as u64;
        }
    }
    Ok(copy)
}

/// A file of fixed length, with zeros where it has been shortened.
pub(super) struct Padded<'a> {
    pub(super) file: &'a File,
    pub(super) left: u64,
}

impl Read for Padded<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let buffer = &mut buffer[..most];
        let read = match self.file.read(buffer)? {
            0 => {
                buffer.fill(0);
                most
            }
            read => read,
        };
        self.left -= read as u64;
        Ok(read)
    }
}

/// Turns an entry that was removed or replaced meanwhile into `None`.
pub(super) fn unless_gone<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(there) => Ok(Some(there)),
        Err(error) if is_gone(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Returns whether a path leads nowhere any more, or through a new link or mount.
pub(super) fn is_gone(error: &io::Error) -> bool {
    let errno = Errno::from_io_error(error);
    matches!(errno, Some(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV))
}

fn too_deep(error: io::Error, path: &Path) -> io::Error {
    if Errno::from_io_error(&error) != Some(Errno::NAMETOOLONG) {
        return error;
    }
    let levels = path.components().count();
    let what = format!("its folders are nested {levels} levels deep and more, too deep for any path: remove them");
    io::Error::new(io::ErrorKind::InvalidFilename, what)
}
