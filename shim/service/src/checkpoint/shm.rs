//! The contents of a container's `/dev/shm` that comes from outside: a pod's, or a volume in memory.
//!
//! CRIU takes such a mount for external and saves nothing of it, while processes map the files in it: without them a
//! restore fails, or finds them empty. One that the container has for itself is CRIU's affair.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::StatFs;

/// Its name among the images.
pub(super) const FILE: &str = "dev-shm.tar";
const PLACE: &str = "/dev/shm";
/// `TMPFS_MAGIC` of linux/magic.h.
const TMPFS: i64 = 0x0102_1994;

/// A folder of the host that a container has as its /dev/shm.
#[derive(Clone, Debug)]
pub(crate) struct Shm {
    folder: PathBuf,
}

impl Shm {
    /// `mounts` are the destination and source of each bind mount. None if what is there is not in memory, and so
    /// stays, or is the host's own.
    pub(crate) fn find<'a>(mounts: impl Iterator<Item = (&'a Path, &'a Path)>) -> Option<Self> {
        let (_, source) = mounts.filter(|(destination, _)| is_place(destination)).last()?;
        let is_tmpfs = rustix::fs::statfs(source).is_ok_and(|StatFs { f_type, .. }| f_type == TMPFS);
        let device = |path: &Path| fs::metadata(path).map(|metadata| metadata.dev()).ok();
        let is_hosts = device(source) == device(Path::new(PLACE));
        (is_tmpfs && !is_hosts).then(|| Self { folder: source.to_owned() })
    }

    /// Writes its contents among the images; nothing if it is empty.
    pub(crate) fn save(&self, images: &Path) -> io::Result<()> {
        if fs::read_dir(&self.folder)?.next().is_none() {
            return Ok(());
        }
        let file = File::options().write(true).create_new(true).open(images.join(FILE))?;
        let mut archive = tar::Builder::new(io::BufWriter::with_capacity(1 << 20, file));
        archive.follow_symlinks(false);
        append(&mut archive, &self.folder, Path::new(""))?;
        archive.into_inner()?.into_inner().map_err(io::IntoInnerError::into_error).map(drop)
    }

    /// Puts saved contents back. What is there already is another container's of the pod, or newer: it stays.
    pub(crate) fn load(&self, images: &Path) -> io::Result<()> {
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
    pub(crate) fn is_saved(images: &Path) -> bool {
        images.join(FILE).exists()
    }
}

fn is_place(path: &Path) -> bool {
    path.components().eq(Path::new(PLACE).components())
}

/// Adds what is in `folder`, under the names below `prefix`. Sockets are left out: nobody listens at them any more.
fn append(archive: &mut tar::Builder<impl io::Write>, folder: &Path, prefix: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let (path, name) = (entry.path(), prefix.join(entry.file_name()));
        let kind = entry.file_type()?;
        if kind.is_dir() {
            archive.append_dir(&name, &path)?;
            append(archive, &path, &name)?;
        } else if kind.is_file() || kind.is_symlink() {
            archive.append_path_with_name(&path, &name)?;
        } else {
            tracing::debug!("{} is left out of a checkpoint", path.display());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
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
