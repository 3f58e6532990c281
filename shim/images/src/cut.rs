//! The mark of images without big memory: a plugin required of CRIU and never loaded.
//!
//! CRIU would restore such images without an error, and leave the missing memory empty. But CRIU
//! refuses an inventory with a plugin not loaded (`check_inventory_plugins` in criu/image.c, since
//! 4.1). So nobody restores such images by mistake: only a caller about to fill the memory opens
//! them [`Unmarked`].

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD};
use tempfile::TempDir;

use crate::format::{INVENTORY, INVENTORY_MAGIC, ImageError, MARK, damaged};
use crate::inspect::{MAX_PLUGINS, inspect};
use crate::rewrite::{RewriteError, replace};
use crate::wire::{Field, MAX_ENTRY, Value, fields, first_entry, put_message, write_entry, write_magic};

/// Prefix of the names of [`Unmarked`] folders.
pub const UNMARKED_PREFIX: &str = ".gpusnap-images-";

/// The list of plugins in images/inventory.proto, and a name inside.
const PLUGINS: u32 = 12;
const NAME: u32 = 12;

/// Marks images whose memory is elsewhere in part, before any is taken out. From then on CRIU alone
/// refuses the images.
///
/// # Errors
/// Fails if the inventory cannot be read or replaced.
pub fn mark(images: &Path) -> Result<(), RewriteError> {
    let path = images.join(INVENTORY);
    let image = inspect(images)?;
    if image.is_cut() {
        return Ok(());
    }
    if image.plugins.is_some_and(|plugins| plugins.len() >= MAX_PLUGINS) {
        return Err(damaged(&path, "it names too many plugins").into());
    }
    let entry = first_entry(&path, &[INVENTORY_MAGIC], MAX_ENTRY)?;
    let mut names = vec![];
    put_message(&mut names, NAME, MARK.as_bytes());
    let mut marked = vec![];
    fields(&path, &entry, |Field { number, value, raw }| {
        match (number, value) {
            (PLUGINS, Value::Bytes(others)) => names.extend_from_slice(others),
            _ => marked.extend_from_slice(raw),
        }
        Ok(())
    })?;
    put_message(&mut marked, PLUGINS, &names);
    if u32::try_from(marked.len()).map_or(true, |length| length > MAX_ENTRY) {
        return Err(damaged(&path, "an entry is too long").into());
    }
    write(&path, &marked)
}

/// Returns the entry of an inventory without the mark.
fn unmarked(path: &Path) -> Result<Vec<u8>, ImageError> {
    let entry = first_entry(path, &[INVENTORY_MAGIC], MAX_ENTRY)?;
    let mut without = vec![];
    fields(path, &entry, |Field { number, value, raw }| {
        let (PLUGINS, Value::Bytes(list)) = (number, value) else {
            without.extend_from_slice(raw);
            return Ok(());
        };
        let mut names = vec![];
        fields(path, list, |Field { number, value, raw }| {
            if !matches!(value, Value::Bytes(name) if number == NAME && name == MARK.as_bytes()) {
                names.extend_from_slice(raw);
            }
            Ok(())
        })?;
        put_message(&mut without, PLUGINS, &names);
        Ok(())
    })?;
    Ok(without)
}

fn write(path: &Path, entry: &[u8]) -> Result<(), RewriteError> {
    replace(path, |out| {
        write_magic(out, &[INVENTORY_MAGIC])?;
        write_entry(out, entry)
    })
}

/// A folder with the same images, in which some can be replaced. Removed on drop.
///
/// The files are hard links: CRIU opens images also from within the restored tree's own root, where
/// a link by path would lead astray.
#[derive(Debug)]
pub struct PrivateCopy {
    folder: TempDir,
    /// Shared lock, held while in use: the leftovers of a killed restore have none.
    _lock: File,
}

impl PrivateCopy {
    /// Makes the folder inside the images' folder; if nothing can be made there, inside `work`, by
    /// copies. Records beside the images are shared likewise.
    ///
    /// # Errors
    /// Fails if the images cannot be read, or the folder cannot be made.
    pub fn of(images: &Path, work: &Path) -> Result<Self, RewriteError> {
        let place = |place: &Path| tempfile::Builder::new().prefix(UNMARKED_PREFIX).tempdir_in(place);
        let folder = place(images).or_else(|_| place(work)).map_err(|source| RewriteError::File {
            action: "make a folder in",
            path: work.to_owned(),
            source,
        })?;
        let failed = |path: PathBuf| move |source| RewriteError::File { action: "read", path, source };
        let lock = File::open(folder.path()).map_err(failed(folder.path().to_owned()))?;
        // A filesystem without locks has no one to ask for a lock.
        let _ = lock.lock_shared();
        for found in fs::read_dir(images).map_err(failed(images.to_owned()))? {
            let found = found.map_err(failed(images.to_owned()))?;
            let name = found.file_name();
            let is_image = Path::new(&name).extension().is_some_and(|extension| extension == "img");
            let is_record = Path::new(&name).extension().is_some_and(|extension| extension == "json");
            if is_image || is_record {
                share(&found.path(), &folder.path().join(name)).map_err(failed(found.path()))?;
            }
        }
        Ok(Self { folder, _lock: lock })
    }

    /// Returns the folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.folder.path()
    }
}

/// A copy with an inventory without the mark, acceptable to CRIU. Removed on drop.
#[derive(Debug)]
pub struct Unmarked(PrivateCopy);

impl Unmarked {
    /// Makes the copy as [`PrivateCopy::of`] does.
    ///
    /// # Errors
    /// Fails if the images cannot be read, or the folder cannot be made.
    pub fn of(images: &Path, work: &Path) -> Result<Self, RewriteError> {
        let entry = unmarked(&images.join(INVENTORY))?;
        let copy = PrivateCopy::of(images, work)?;
        write(&copy.path().join(INVENTORY), &entry)?;
        Ok(Self(copy))
    }

    /// Returns the folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

/// Gives a regular file another name; makes a copy on another filesystem, or if links are not
/// allowed.
fn share(from: &Path, to: &Path) -> io::Result<()> {
    let file = crate::wire::open(from).map_err(|error| match error {
        ImageError::Read { source, .. } => source,
        other => io::Error::new(io::ErrorKind::InvalidData, other),
    })?;
    match rustix::fs::linkat(CWD, from, CWD, to, AtFlags::empty()) {
        Ok(()) => Ok(()),
        Err(_) => io::copy(&mut &file, &mut File::create_new(to)?).map(drop),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::formats::{file, write_image};

    #[test]
    fn a_mark_comes_and_goes_and_leaves_the_rest_of_the_inventory_as_it_was() {
        let (images, work) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        write_image(images.path());
        let inventory = images.path().join(INVENTORY);
        let (before, of_file) = (inspect(images.path()).unwrap(), fs::read(&inventory).unwrap());
        mark(images.path()).unwrap();
        mark(images.path()).unwrap();
        let marked = inspect(images.path()).unwrap();
        assert!(marked.is_cut() && !before.is_cut());
        assert_eq!(marked.plugins.unwrap(), [MARK, "xy"]);

        let unmarked = Unmarked::of(images.path(), work.path()).unwrap();
        assert_eq!(inspect(unmarked.path()).unwrap(), before);
        assert_eq!(fs::read(unmarked.path().join(INVENTORY)).unwrap(), of_file);
        assert_eq!(
            fs::read(unmarked.path().join("pstree.img")).unwrap(),
            fs::read(images.path().join("pstree.img")).unwrap()
        );
        assert!(inspect(images.path()).unwrap().is_cut(), "only the copy has lost it");
        let path = unmarked.path().to_owned();
        drop(unmarked);
        assert!(!path.exists());
        assert!(images.path().join("pstree.img").exists());
    }

    #[test]
    fn an_inventory_of_an_older_criu_is_marked_as_well() {
        let images = tempfile::tempdir().unwrap();
        file(&images.path().join(INVENTORY), &[INVENTORY_MAGIC], &[&[0x08, 2]]);
        assert_eq!(inspect(images.path()).unwrap().plugins, None);
        mark(images.path()).unwrap();
        assert!(inspect(images.path()).unwrap().is_cut());
    }

    #[test]
    fn a_link_among_the_images_is_not_followed() {
        let (images, work) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        write_image(images.path());
        std::os::unix::fs::symlink("/etc/passwd", images.path().join("core-1.img")).unwrap();
        Unmarked::of(images.path(), work.path()).unwrap_err();
    }
}
