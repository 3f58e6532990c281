//! The contents of a container's `/dev/shm` that comes from outside: a pod's, or a volume in memory.
//!
//! CRIU takes such a mount for external and saves nothing of it, while processes map the files in it: without them a
//! restore fails, or finds them empty. One that the container has for itself is CRIU's affair.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{SeekFrom, StatFs};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

/// Its name among the images.
pub(crate) const FILE: &str = "dev-shm.tar";
const PLACE: &str = "/dev/shm";
/// `TMPFS_MAGIC` of linux/magic.h.
const TMPFS: i64 = 0x0102_1994;

/// A folder of the host that a container has as its /dev/shm.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Shm {
    folder: PathBuf,
}

impl Shm {
    /// `mounts` are the destination and source of each bind mount. None if what is there is not in memory, and so
    /// stays, or is the host's own.
    pub fn find<'a>(mounts: impl Iterator<Item = (&'a Path, &'a Path)>) -> Option<Self> {
        let (_, source) = mounts.filter(|(destination, _)| is_place(destination)).last()?;
        let is_tmpfs = rustix::fs::statfs(source).is_ok_and(|StatFs { f_type, .. }| f_type == TMPFS);
        let device = |path: &Path| fs::metadata(path).map(|metadata| metadata.dev()).ok();
        let is_hosts = device(source) == device(Path::new(PLACE));
        (is_tmpfs && !is_hosts).then(|| Self { folder: source.to_owned() })
    }

    /// Writes its contents among the images; nothing if it is empty.
    ///
    /// # Errors
    /// A file that cannot be read or written.
    pub fn save(&self, images: &Path) -> io::Result<()> {
        if fs::read_dir(&self.folder)?.next().is_none() {
            return Ok(());
        }
        let file = File::options().write(true).create_new(true).open(images.join(FILE))?;
        let mut archive = tar::Builder::new(io::BufWriter::with_capacity(1 << 20, file));
        append(&mut archive, &self.folder, Path::new(""))?;
        archive.into_inner()?.into_inner().map_err(io::IntoInnerError::into_error).map(drop)
    }

    /// Puts saved contents back. What is there already is another container's of the pod, or newer: it stays.
    ///
    /// # Errors
    /// A file that cannot be read or made; an archive that leads out of the folder.
    pub fn load(&self, images: &Path) -> io::Result<()> {
        let file = match File::open(images.join(FILE)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        let mut archive = tar::Archive::new(io::BufReader::with_capacity(1 << 20, file));
        archive.set_preserve_permissions(true);
        archive.set_preserve_ownerships(true);
        for entry in archive.entries()? {
            let mut entry = entry?;
            let path = entry.path()?.into_owned();
            if !path.components().all(|component| matches!(component, Component::Normal(_))) {
                return Err(io::Error::new(io::ErrorKind::InvalidData, format!("{FILE} leads to {}", path.display())));
            }
            if self.folder.join(&path).symlink_metadata().is_ok() {
                tracing::debug!("{} is in {} already", path.display(), self.folder.display());
                continue;
            }
            // Follows no link out of the folder.
            entry.unpack_in(&self.folder)?;
        }
        Ok(())
    }

    /// Whether a checkpoint has such contents.
    #[must_use]
    pub fn is_saved(images: &Path) -> bool {
        images.join(FILE).exists()
    }
}

fn is_place(path: &Path) -> bool {
    path.components().eq(Path::new(PLACE).components())
}

/// Adds what is in `folder`, under the names below `prefix`. Sockets are left out: nobody listens at them any more.
///
/// Other containers of the pod go on meanwhile: what vanishes is not there, and what shrinks or grows is saved as long
/// as it was when it was opened. So nothing is added by its path.
fn append(archive: &mut tar::Builder<impl io::Write>, folder: &Path, prefix: &Path) -> io::Result<()> {
    for entry in unless_gone(fs::read_dir(folder))?.into_iter().flatten() {
        let Some(entry) = unless_gone(entry)? else { continue };
        let (path, name) = (entry.path(), prefix.join(entry.file_name()));
        let Some(metadata) = unless_gone(fs::symlink_metadata(&path))? else { continue };
        let mut header = tar::Header::new_gnu();
        header.set_metadata(&metadata);
        if metadata.is_dir() {
            header.set_size(0);
            archive.append_data(&mut header, &name, io::empty())?;
            append(archive, &path, &name)?;
        } else if metadata.is_symlink() {
            let Some(target) = unless_gone(fs::read_link(&path))? else { continue };
            header.set_size(0);
            archive.append_link(&mut header, &name, target)?;
        } else if metadata.is_file() {
            let Some(file) = unless_gone(open(&path))? else { continue };
            append_file(archive, &name, &file)?;
        } else {
            tracing::debug!("{} is left out of a checkpoint", path.display());
        }
    }
    Ok(())
}

/// Not through a link, and not a pipe, that somebody has put there meanwhile.
fn open(path: &Path) -> io::Result<File> {
    File::options().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)
}

fn append_file(archive: &mut tar::Builder<impl io::Write>, name: &Path, file: &File) -> io::Result<()> {
    /// Unit of `st_blocks`.
    const BLOCK: u64 = 512;
    let metadata = file.metadata()?;
    if metadata.blocks() * BLOCK < metadata.len() {
        // The archiver finds the holes by itself, in a file that nobody changes meanwhile.
        return archive.append_file(name, &mut copy_with_holes(file, &metadata)?);
    }
    let mut header = tar::Header::new_gnu();
    header.set_metadata(&metadata);
    header.set_size(metadata.len());
    archive.append_data(&mut header, name, Padded { file, left: metadata.len() })
}

/// A copy in memory that has holes where the file has them now.
fn copy_with_holes(file: &File, metadata: &fs::Metadata) -> io::Result<File> {
    let copy = File::from(rustix::fs::memfd_create("gpusnap-shm", rustix::fs::MemfdFlags::CLOEXEC)?);
    copy.set_len(metadata.len())?;
    copy.set_permissions(metadata.permissions())?;
    std::os::unix::fs::fchown(&copy, Some(metadata.uid()), Some(metadata.gid()))?;
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    while at < metadata.len() {
        let data = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(data) => data,
            // No more of it.
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
                // It is shorter now.
                return Ok(copy);
            }
            copy.write_all_at(&buffer[..read], at)?;
            at += read as u64;
        }
    }
    Ok(copy)
}

/// A file, as long as it was, with zeros where it is shorter now.
struct Padded<'a> {
    file: &'a File,
    left: u64,
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

/// None for what somebody has removed meanwhile, or put something else in its place.
fn unless_gone<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(there) => Ok(Some(there)),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
        Err(error) if error.raw_os_error() == Some(libc::ELOOP) => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Seek;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn contents_come_back_as_they_were() {
        let (from, images, to) =
            (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::create_dir(from.path().join("d")).unwrap();
        fs::write(from.path().join("d/f"), [7; 5000]).unwrap();
        fs::set_permissions(from.path().join("d/f"), fs::Permissions::from_mode(0o600)).unwrap();
        symlink("/etc/passwd", from.path().join("link")).unwrap();
        let sparse = File::create(from.path().join("sparse")).unwrap();
        sparse.set_len(64 << 20).unwrap();

        Shm { folder: from.path().into() }.save(images.path()).unwrap();
        assert!(Shm::is_saved(images.path()));
        assert!(fs::metadata(images.path().join(FILE)).unwrap().len() < 1 << 20, "holes are not stored");
        fs::write(to.path().join("sparse"), "there before").unwrap();
        Shm { folder: to.path().into() }.load(images.path()).unwrap();

        assert_eq!(fs::read(to.path().join("d/f")).unwrap(), [7; 5000]);
        assert_eq!(fs::metadata(to.path().join("d/f")).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_link(to.path().join("link")).unwrap(), Path::new("/etc/passwd"));
        assert_eq!(fs::read(to.path().join("sparse")).unwrap(), b"there before");
    }

    #[test]
    fn a_file_that_shrinks_keeps_its_length_and_what_vanishes_is_left_out() {
        let (from, images, to) =
            (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let path = from.path().join("shrinks");
        fs::write(&path, [7; 100]).unwrap();
        let file = open(&path).unwrap();
        let mut archive = tar::Builder::new(File::create(images.path().join(FILE)).unwrap());
        let mut header = tar::Header::new_gnu();
        header.set_metadata(&file.metadata().unwrap());
        let mut padded = Padded { file: &file, left: 100 };
        File::options().write(true).open(&path).unwrap().set_len(40).unwrap();
        (&file).rewind().unwrap();
        archive.append_data(&mut header, "shrinks", &mut padded).unwrap();
        append(&mut archive, Path::new("/nonexistent"), Path::new("")).unwrap();
        append(&mut archive, &path, Path::new("")).unwrap();
        archive.finish().unwrap();
        drop(archive);
        Shm { folder: to.path().into() }.load(images.path()).unwrap();
        let saved = fs::read(to.path().join("shrinks")).unwrap();
        assert_eq!((&saved[..40], &saved[40..]), (&[7; 40][..], &[0; 60][..]));
        assert!(open(&from.path().join("none")).is_err());
    }

    #[test]
    fn an_archive_cannot_lead_out() {
        let (images, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let outside = tempfile::tempdir().unwrap();
        let mut archive = tar::Builder::new(File::create(images.path().join(FILE)).unwrap());
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        archive.append_link(&mut header, "way", outside.path()).unwrap();
        let mut header = tar::Header::new_gnu();
        header.set_size(1);
        archive.append_data(&mut header, "way/out", &b"x"[..]).unwrap();
        archive.finish().unwrap();
        let _ = Shm { folder: to.path().into() }.load(images.path());
        assert!(!outside.path().join("out").exists());
    }

    #[test]
    fn nothing_is_saved_of_an_empty_one() {
        let (from, images) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        Shm { folder: from.path().into() }.save(images.path()).unwrap();
        assert!(!Shm::is_saved(images.path()));
    }
}
