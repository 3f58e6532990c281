use rustix::mount::{MountFlags, UnmountFlags};

use super::*;
use crate::{Digest, IfInUse, Import};

/// A small file system.
struct Small {
    folder: tempfile::TempDir,
}

impl Small {
    const SIZE: usize = 2 << 20;

    /// Mounts the file system; reports and returns `None` if mounting is not possible.
    fn new() -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let options = format!("size={}", Self::SIZE);
        let options = std::ffi::CString::new(options).unwrap();
        match rustix::mount::mount("tmpfs", folder.path(), "tmpfs", MountFlags::NODEV, Some(options.as_c_str())) {
            Ok(()) => Some(Self { folder }),
            Err(error) => {
                eprintln!("skipped: a file system cannot be mounted here: {error}");
                None
            }
        }
    }

    fn store(&self) -> Store {
        Store::open(&self.folder.path().join("store")).unwrap()
    }

    /// Fills the file system up to `spare` pages.
    fn fill(&self, spare: usize) {
        let path = self.folder.path().join("filler");
        let free = rustix::fs::statvfs(self.folder.path()).unwrap();
        let pages = usize::try_from(free.f_bfree).unwrap().saturating_sub(spare);
        std::fs::write(path, vec![1; pages * usize::try_from(free.f_bsize).unwrap()]).unwrap();
    }

    fn relieve(&self) {
        std::fs::remove_file(self.folder.path().join("filler")).unwrap();
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        rustix::mount::unmount(self.folder.path(), UnmountFlags::DETACH).unwrap();
    }
}

/// Tries with more and more room up to the first success; each failure leaves the store unchanged.
fn with_ever_more_room(attempt: impl Fn(&Store) -> Option<Digest>) {
    let Some(small) = Small::new() else { return };
    let store = small.store();
    drop(publish(&store, "kept/a", &[b"kept", &[1; 20_000]]).unwrap());
    for spare in 0..200 {
        small.fill(spare);
        let done = attempt(&store);
        small.relieve();
        assert_eq!(problems(&store), [""; 0], "{spare} pages");
        let names = names(&store);
        if done.is_some() {
            assert_eq!(names, ["kept/a", "new/b"]);
            assert!(spare > 0, "it was tried with no room");
            return;
        }
        assert_eq!(names, ["kept/a"], "{spare} pages");
        assert_eq!(store.usage().unwrap().garbage, 0, "{spare} pages");
        assert_eq!(store.folders.drafts.names().unwrap(), [""; 0]);
    }
    panic!("it never went well");
}

#[test]
fn a_disk_that_is_full_at_any_point_of_a_publication_changes_nothing() {
    with_ever_more_room(|store| Some(publish(store, "new/b", &[&[2; 50_000], b"kept", &[3; 9000]]).ok()?.digest()));
}

#[test]
fn a_disk_that_is_full_at_any_point_of_an_import_changes_nothing() {
    let world = World::new();
    let mut archive = Vec::new();
    let snapshot = world.publish("new/b", &[&[2; 50_000], &[3; 9000]]);
    snapshot.export(Some(&name("new/b")), &mut archive, &|_| {}).unwrap();
    with_ever_more_room(|store| Some(store.import(&*archive, Import::default(), &|_| {}).ok()?.digest()));
}

#[test]
fn a_snapshot_can_be_removed_from_a_full_disk() {
    let Some(small) = Small::new() else { return };
    let store = small.store();
    drop(publish(&store, "default/a", &[&[1; 100_000]]).unwrap());
    drop(publish(&store, "default/b", &[&[2; 100_000]]).unwrap());
    small.fill(0);
    let full = Store::open(store.root()).unwrap();
    full.remove(&reference("default/a"), IfInUse::Refuse).unwrap();
    assert_eq!((names(&full), problems(&full)), (vec!["default/b".to_owned()], vec![]));
    full.enforce_quota(0).unwrap();
    assert_eq!(full.usage().unwrap().blobs, 0);
}
