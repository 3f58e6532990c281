//! Trees that are restored, and trees changed by others meanwhile.

use std::fs::{self, File};
use std::io::{Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{CWD, Mode, OFlags, RenameFlags};
use tempfile::TempDir;

use super::load::LeftOut;
use super::save::{Padded, append_file};
use super::tree::{Entry, Tree};
use super::*;

fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn save(from: &Path, images: &Path) -> io::Result<()> {
    Shm { folder: from.into() }.save(images)
}

fn load(images: &Path, to: &Path) -> io::Result<()> {
    Shm { folder: to.into() }.load(images)
}

/// An archive with entries of these kinds, names and contents (a link's content is its target).
fn archive(images: &Path, entries: &[(tar::EntryType, &str, &str)]) {
    let mut archive = tar::Builder::new(File::create(images.join(FILE)).unwrap());
    for (kind, name, content) in entries {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(*kind);
        header.set_mode(0o6755);
        header.set_uid(rustix::process::geteuid().as_raw().into());
        header.set_gid(rustix::process::getegid().as_raw().into());
        header.set_mtime(0);
        if kind.is_symlink() || kind.is_hard_link() {
            header.set_size(0);
            archive.append_link(&mut header, name, content).unwrap();
        } else {
            header.set_size(content.len() as u64);
            // By its bytes: the archiver itself refuses names that lead outside.
            header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
            header.set_cksum();
            archive.append(&header, content.as_bytes()).unwrap();
        }
    }
    archive.finish().unwrap();
}

#[test]
fn contents_come_back_as_they_were() {
    let (from, images, to) = (folder(), folder(), folder());
    fs::create_dir(from.path().join("d")).unwrap();
    fs::write(from.path().join("d/f"), [7; 5000]).unwrap();
    fs::set_permissions(from.path().join("d/f"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::hard_link(from.path().join("d/f"), from.path().join("d/g")).unwrap();
    symlink("/etc/passwd", from.path().join("link")).unwrap();
    rustix::fs::mkfifoat(CWD, from.path().join("fifo"), Mode::from_raw_mode(0o640)).unwrap();
    let sparse = File::create(from.path().join("sparse")).unwrap();
    sparse.set_len(64 << 20).unwrap();
    let mut holes = File::create(from.path().join("holes")).unwrap();
    holes.set_len(64 << 20).unwrap();
    holes.seek(io::SeekFrom::Start(32 << 20)).unwrap();
    holes.write_all(b"in the middle").unwrap();

    save(from.path(), images.path()).unwrap();
    assert!(Shm::is_saved(images.path()));
    assert!(fs::metadata(images.path().join(FILE)).unwrap().len() < 1 << 20, "holes are not stored");
    fs::write(to.path().join("sparse"), "there before").unwrap();
    load(images.path(), to.path()).unwrap();

    let metadata = |name: &str| fs::symlink_metadata(to.path().join(name)).unwrap();
    assert_eq!(fs::read(to.path().join("d/f")).unwrap(), [7; 5000]);
    assert_eq!(metadata("d/f").mode() & 0o7777, 0o600);
    assert_eq!(metadata("d/f").ino(), metadata("d/g").ino(), "both are one file");
    assert_eq!(metadata("d").mode() & 0o7777, fs::metadata(from.path().join("d")).unwrap().mode() & 0o7777);
    assert!(metadata("fifo").file_type().is_fifo() && metadata("fifo").mode() & 0o7777 == 0o640);
    assert_eq!(fs::read_link(to.path().join("link")).unwrap(), Path::new("/etc/passwd"));
    assert_eq!(fs::read(to.path().join("sparse")).unwrap(), b"there before");
    assert_eq!(fs::read(to.path().join("holes")).unwrap(), fs::read(from.path().join("holes")).unwrap());
    assert!(metadata("holes").blocks() * 512 < 1 << 20, "holes are holes again");
}

#[test]
fn a_file_that_shrinks_keeps_its_length_and_what_vanishes_is_left_out() {
    let (from, images, to) = (folder(), folder(), folder());
    let path = from.path().join("shrinks");
    fs::write(&path, [7; 100]).unwrap();
    let file = File::open(&path).unwrap();
    let mut archive = tar::Builder::new(File::create(images.path().join(FILE)).unwrap());
    let mut header = tar::Header::new_gnu();
    header.set_metadata(&file.metadata().unwrap());
    let mut padded = Padded { file: &file, left: 100 };
    File::options().write(true).open(&path).unwrap().set_len(40).unwrap();
    archive.append_data(&mut header, "shrinks", &mut padded).unwrap();
    append_file(&mut archive, Path::new("whole"), &File::open(&path).unwrap()).unwrap();
    archive.finish().unwrap();
    drop(archive);
    load(images.path(), to.path()).unwrap();
    let saved = fs::read(to.path().join("shrinks")).unwrap();
    assert_eq!((&saved[..40], &saved[40..]), (&[7; 40][..], &[0; 60][..]));
    assert_eq!(fs::read(to.path().join("whole")).unwrap(), [7; 40]);
    let tree = Tree::open(from.path()).unwrap();
    assert!(save::is_gone(&tree.folder(Path::new("none")).unwrap_err()));
    assert!(save::is_gone(&tree.folder(Path::new("shrinks")).unwrap_err()));
}

#[test]
fn an_archive_cannot_lead_out() {
    use tar::EntryType::{Directory, Link, Regular, Symlink};
    let outside = folder();
    let place = outside.path().to_str().unwrap();
    let out = format!("{place}/out");
    let hostile: [&[(tar::EntryType, &str, &str)]; 5] = [
        &[(Symlink, "way", place), (Regular, "way/out", "x")],
        &[(Regular, &out, "x")],
        &[(Directory, "d", ""), (Regular, "d/../../out", "x")],
        &[(Symlink, "out", &out), (Regular, "out", "x")],
        &[(Symlink, "way", place), (Link, "l", "way/victim")],
    ];
    fs::write(outside.path().join("victim"), "secret").unwrap();
    for entries in hostile {
        let (images, to) = (folder(), folder());
        archive(images.path(), entries);
        let _ = load(images.path(), to.path());
        assert!(!outside.path().join("out").exists(), "{entries:?}");
        assert!(!to.path().join("l").exists());
    }
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
}

#[test]
fn setuid_does_not_come_back() {
    let (images, to) = (folder(), folder());
    archive(images.path(), &[(tar::EntryType::Regular, "f", "x"), (tar::EntryType::Directory, "d", "")]);
    load(images.path(), to.path()).unwrap();
    let mode = |name| fs::metadata(to.path().join(name)).unwrap().mode() & 0o7777;
    assert_eq!((mode("f"), mode("d")), (0o755, 0o2755));
}

#[test]
fn a_name_of_gigabytes_is_not_read() {
    let (images, to) = (folder(), folder());
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::GNULongName);
    header.set_size(8 << 30);
    header.set_cksum();
    let mut file = File::create(images.path().join(FILE)).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len(9 << 30).unwrap();
    assert!(load(images.path(), to.path()).unwrap_err().to_string().contains("too long"));
}

#[test]
fn nothing_is_saved_of_an_empty_one() {
    let (from, images) = (folder(), folder());
    save(from.path(), images.path()).unwrap();
    assert!(!Shm::is_saved(images.path()));
}

/// Exchanges `d` and `l` in a folder as fast as possible while `work` runs.
fn exchanging(folder: &Path, work: impl FnOnce()) {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let [d, l] = ["d", "l"].map(|name| folder.join(name));
            while !done.load(Ordering::Relaxed) {
                let _ = rustix::fs::renameat_with(CWD, &d, CWD, &l, RenameFlags::EXCHANGE);
            }
        });
        work();
        done.store(true, Ordering::Relaxed);
    });
}

#[test]
fn what_a_folder_is_exchanged_for_is_not_saved() {
    let (from, outside) = (folder(), folder());
    fs::create_dir(from.path().join("d")).unwrap();
    fs::write(from.path().join("d/own"), "own").unwrap();
    fs::write(outside.path().join("secret"), "secret").unwrap();
    symlink(outside.path(), from.path().join("l")).unwrap();
    exchanging(from.path(), || {
        for _ in 0..500 {
            let images = folder();
            save(from.path(), images.path()).unwrap();
            let saved = fs::read(images.path().join(FILE)).unwrap_or_default();
            assert!(!saved.windows(6).any(|bytes| bytes == b"secret"));
        }
    });
}

#[test]
fn nothing_is_written_where_a_folder_is_exchanged_for_a_link() {
    use tar::EntryType::{Directory, Fifo, Regular, Symlink};
    let (images, to, outside) = (folder(), folder(), folder());
    let names: Vec<String> = (0..40).map(|n| format!("d/f{n}")).collect();
    let mut entries = vec![(Directory, "d", ""), (Directory, "d/d", ""), (Fifo, "d/p", ""), (Symlink, "d/s", "x")];
    entries.extend(names.iter().map(|name| (Regular, name.as_str(), "x")));
    archive(images.path(), &entries);
    fs::create_dir(to.path().join("d")).unwrap();
    symlink(outside.path(), to.path().join("l")).unwrap();
    exchanging(to.path(), || {
        for _ in 0..50 {
            load(images.path(), to.path()).unwrap();
            assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
            for name in ["d", "l"] {
                for made in fs::read_dir(to.path().join(name)).unwrap().flatten() {
                    let _ = fs::remove_file(made.path()).or_else(|_| fs::remove_dir(made.path()));
                }
            }
        }
    });
}

/// Folders `a/a/a/...`, moved up one by one for the removal: no other way removes so many.
struct Deep {
    top: TempDir,
}

impl Deep {
    fn new(levels: usize) -> Self {
        let top = folder();
        let open = |folder: &OwnedFd| {
            rustix::fs::openat(folder, "a", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
                .unwrap()
        };
        let mut at: OwnedFd = File::open(top.path()).unwrap().into();
        for _ in 0..levels {
            rustix::fs::mkdirat(&at, "a", Mode::RWXU).unwrap();
            at = open(&at);
        }
        Self { top }
    }

    fn levels(top: &Path) -> usize {
        let (a, b) = (top.join("a"), top.join("b"));
        let mut levels = 0;
        while a.exists() {
            let below = a.join("a").exists();
            if below {
                fs::rename(a.join("a"), &b).unwrap();
            }
            fs::remove_dir(&a).unwrap();
            if below {
                fs::rename(&b, &a).unwrap();
            }
            levels += 1;
        }
        levels
    }
}

impl Drop for Deep {
    fn drop(&mut self) {
        Self::levels(self.top.path());
    }
}

#[test]
fn folders_that_are_nested_deep_come_back() {
    let (from, images, to) = (Deep::new(1900), folder(), folder());
    save(from.top.path(), images.path()).unwrap();
    load(images.path(), to.path()).unwrap();
    assert_eq!(Deep::levels(to.path()), 1900);
}

#[test]
fn folders_that_are_nested_too_deep_are_told() {
    let (from, images) = (Deep::new(2500), folder());
    let error = save(from.top.path(), images.path()).unwrap_err().to_string();
    assert!(error.contains("levels deep"), "{error}");
}

#[test]
fn an_entry_stays_the_same_when_its_name_is_anothers() {
    let place = folder();
    fs::write(place.path().join("a"), "first").unwrap();
    let opened: OwnedFd = File::open(place.path()).unwrap().into();
    let entry = Entry::at(&opened, "a".as_ref()).unwrap();
    fs::rename(place.path().join("a"), place.path().join("b")).unwrap();
    symlink("/etc/passwd", place.path().join("a")).unwrap();
    assert_eq!(io::read_to_string(entry.file().unwrap()).unwrap(), "first");
    assert_eq!(Entry::at(&opened, "a".as_ref()).unwrap().target().unwrap(), "/etc/passwd");
}

#[test]
fn entries_that_are_not_restored_are_told_in_one_warning() {
    let mut left_out = LeftOut::default();
    assert_eq!(left_out.warning(), None);
    left_out.add("torch/a".into());
    let said = left_out.warning().unwrap();
    assert!(said.starts_with("torch/a not restored"), "{said}");
    for name in ["torch/b", "torch/c"] {
        left_out.add(name.into());
    }
    let said = left_out.warning().unwrap();
    assert!(said.starts_with("torch/a and 2 more not restored"), "{said}");
}

#[test]
fn a_file_in_the_place_of_a_folder_stays_and_keeps_nothing_else_from_coming_back() {
    let (images, to) = (folder(), folder());
    let file = tar::EntryType::Regular;
    archive(images.path(), &[(file, "taken/a", "a"), (file, "taken/b", "b"), (file, "free", "c")]);
    fs::write(to.path().join("taken"), "of another container").unwrap();
    load(images.path(), to.path()).unwrap();
    assert_eq!(fs::read(to.path().join("taken")).unwrap(), b"of another container");
    assert_eq!(fs::read(to.path().join("free")).unwrap(), b"c");
}
