use super::*;
use crate::{ExportError, Import, ImportError};

fn archive(world: &World, name: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let snapshot = world.store.open_snapshot(&reference(name)).unwrap();
    snapshot.export(Some(&super::name(name)), &mut bytes, &|_| {}).unwrap();
    bytes
}

fn import(world: &World, bytes: &[u8]) -> Result<Snapshot, ImportError> {
    world.store.import(bytes, Import::default(), &|_| {})
}

/// Copies an archive, with entries changed, left out or added.
fn rewrite(bytes: &[u8], change: impl Fn(&str, Vec<u8>) -> Vec<(String, Vec<u8>)>) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for entry in tar::Archive::new(bytes).entries().unwrap() {
        let mut entry = entry.unwrap();
        let path = entry.path().unwrap().to_str().unwrap().to_owned();
        let mut content = Vec::new();
        std::io::Read::read_to_end(&mut entry, &mut content).unwrap();
        for (path, content) in change(&path, content) {
            builder.append(&header(&path, tar::EntryType::Regular, content.len() as u64), &*content).unwrap();
        }
    }
    builder.into_inner().unwrap()
}

/// A header with a path that the library refuses to write.
fn header(path: &str, kind: tar::EntryType, size: u64) -> tar::Header {
    let mut header = tar::Header::new_ustar();
    header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_mode(0o600);
    header.set_cksum();
    header
}

/// An archive with one more entry at the beginning.
fn with_entry(bytes: &[u8], header: &tar::Header, content: &[u8]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    builder.append(header, content).unwrap();
    let mut all = builder.into_inner().unwrap();
    all.truncate(all.len() - 1024);
    all.extend_from_slice(bytes);
    all
}

#[test]
fn a_snapshot_comes_back_from_an_archive_as_it_was() {
    let (world, elsewhere) = (World::new(), World::new());
    let digest = world.publish("default/a", &[b"one", &[7; 100_000], b"one"]).digest();
    drop(world.publish("default/b", &[b"another"]));
    let bytes = archive(&world, "default/a");
    assert_eq!(bytes, archive(&world, "default/a"), "equal snapshots give equal archives");
    let imported = import(&elsewhere, &bytes).unwrap();
    assert_eq!((imported.digest(), imported.names()), (digest, &[name("default/a")][..]));
    assert_eq!(elsewhere.problems(), [""; 0]);
    assert_eq!(mode(&elsewhere.blob(Digest::of(b"one"))), 0o600);

    let renamed = Import { name: Some(name("k8s.io/team/x")), if_taken: IfTaken::Refuse };
    drop(elsewhere.store.import(&*bytes, renamed, &|_| {}).unwrap());
    assert_eq!(elsewhere.names(), ["default/a", "k8s.io/team/x"]);
}

#[test]
fn an_archive_in_another_order_and_with_the_folders_of_others_is_understood() {
    let (world, elsewhere) = (World::new(), World::new());
    drop(world.publish("default/a", &[b"one"]));
    let bytes = archive(&world, "default/a");
    let mut entries = Vec::new();
    rewrite(&bytes, |_, _| vec![]);
    for entry in tar::Archive::new(&*bytes).entries().unwrap() {
        let mut entry = entry.unwrap();
        let mut content = Vec::new();
        std::io::Read::read_to_end(&mut entry, &mut content).unwrap();
        entries.push((entry.path().unwrap().to_str().unwrap().to_owned(), content));
    }
    let mut builder = tar::Builder::new(Vec::new());
    for folder in ["./", "./blobs/", "./blobs/sha256/"] {
        builder.append(&header(folder, tar::EntryType::Directory, 0), &[][..]).unwrap();
    }
    let comment = b"21 comment=from a tool\n";
    builder.append(&header("pax", tar::EntryType::XGlobalHeader, comment.len() as u64), &comment[..]).unwrap();
    for (path, content) in entries.iter().rev() {
        let path = format!("./{path}");
        builder.append(&header(&path, tar::EntryType::Regular, content.len() as u64), &**content).unwrap();
    }
    drop(import(&elsewhere, &builder.into_inner().unwrap()).unwrap());
    assert_eq!(elsewhere.problems(), [""; 0]);
}

#[test]
fn what_does_not_belong_in_an_archive_is_refused_and_nothing_is_left() {
    let (world, elsewhere) = (World::new(), World::new());
    drop(world.publish("default/a", &[b"one"]));
    let bytes = archive(&world, "default/a");
    let blob = format!("blobs/sha256/{}", Digest::of(b"one").hex());
    let file = tar::EntryType::Regular;
    let other = Digest::of(b"evil").hex();
    for path in [
        "../index.json",
        "/etc/passwd",
        "blobs/sha256/../../x",
        "blobs/sha256/../../../x",
        "blobs/sha256/x",
        "blobs/sha512/x",
        "other.json",
        "blobs//sha256/x",
        &blob,
        &blob.to_uppercase(),
        &format!("blobs/sha256/{other}/x"),
        "index.json",
        "oci-layout",
    ] {
        let odd = with_entry(&bytes, &header(path, file, 3), b"one");
        let error = import(&elsewhere, &odd).unwrap_err();
        assert!(matches!(error, ImportError::Odd { .. }), "{path}: {error}");
    }
    let kinds = [
        tar::EntryType::Symlink,
        tar::EntryType::Link,
        tar::EntryType::Fifo,
        tar::EntryType::Char,
        tar::EntryType::Block,
        tar::EntryType::GNUSparse,
        tar::EntryType::GNULongName,
        tar::EntryType::GNULongLink,
    ];
    for kind in kinds {
        let mut link = header(&format!("blobs/sha256/{other}"), kind, 0);
        link.set_link_name("/etc/passwd").unwrap();
        link.set_cksum();
        let error = import(&elsewhere, &with_entry(&bytes, &link, b"")).unwrap_err();
        assert!(matches!(error, ImportError::Odd { .. }), "{kind:?}: {error}");
    }
    for pax in [&b"12 path=abc\n"[..], b"13 size=1000\n", b"22 GNU.sparse.major=1\n", &[b'x'; 100_000]] {
        let extended = header("pax", tar::EntryType::XHeader, pax.len() as u64);
        assert!(matches!(import(&elsewhere, &with_entry(&bytes, &extended, pax)), Err(ImportError::Odd { .. })));
    }
    for folder in ["../", "drafts/", "blobs/sha256/x/", "/"] {
        let folder = header(folder, tar::EntryType::Directory, 0);
        let result = import(&elsewhere, &with_entry(&bytes, &folder, b""));
        assert!(result.is_err() || elsewhere.problems().is_empty());
    }
    for name in ["index.json", "oci-layout"] {
        let huge = rewrite(&bytes, |path, content| {
            let content = if path == name { vec![b' '; crate::DOCUMENT_LIMIT + 1] } else { content };
            vec![(path.to_owned(), content)]
        });
        assert!(matches!(import(&elsewhere, &huge), Err(ImportError::Odd { .. })), "{name}");
    }
    assert!(import(&elsewhere, b"not a tar archive, but long enough to be read as one".repeat(20).as_slice()).is_err());
    assert!(matches!(import(&elsewhere, b""), Err(ImportError::Missing { .. })));
    assert!(elsewhere.names().iter().all(|name| name == "default/a"));
    assert_eq!(elsewhere.store.folders.drafts.names().unwrap(), [""; 0]);
    assert_eq!((elsewhere.store.usage().unwrap().garbage, elsewhere.problems()), (0, vec![]));
}

#[test]
fn an_archive_that_is_not_whole_leaves_nothing() {
    let (world, elsewhere) = (World::new(), World::new());
    drop(world.publish("default/a", &[b"one", &[3; 5000]]));
    let bytes = archive(&world, "default/a");
    let end = bytes.len() - 1024;
    for at in (0..end).step_by(256) {
        assert!(import(&elsewhere, &bytes[..at]).is_err(), "cut off at {at}");
    }
    let count = tar::Archive::new(&*bytes).entries().unwrap().count();
    for left_out in 0..count {
        let number = std::cell::Cell::new(0);
        let fewer = rewrite(&bytes, |path, content| {
            let this = number.replace(number.get() + 1);
            if this == left_out { vec![] } else { vec![(path.to_owned(), content)] }
        });
        assert!(matches!(import(&elsewhere, &fewer).unwrap_err(), ImportError::Missing { .. }));
    }
    for at in (0..end).step_by(61) {
        let mut wrong = bytes.clone();
        wrong[at] ^= 4;
        // A header's time or owner may be anything; a change of the snapshot's bytes is detected.
        if let Ok(snapshot) = import(&elsewhere, &wrong) {
            assert_eq!(snapshot.digest(), world.store.list().unwrap()[0].digest);
            let digest = snapshot.digest();
            drop(snapshot);
            elsewhere.store.remove(&digest.into(), crate::IfInUse::Refuse).unwrap();
        }
    }
    assert_eq!(elsewhere.store.usage().unwrap().blobs, 0);
    assert_eq!(elsewhere.store.folders.drafts.names().unwrap(), [""; 0]);
}

#[test]
fn an_archive_says_which_snapshot_it_has() {
    let (world, elsewhere) = (World::new(), World::new());
    drop(world.publish("default/a", &[b"one"]));
    let bytes = archive(&world, "default/a");
    let with_index = |from: &str, to: &str| {
        rewrite(&bytes, |path, content| {
            let text = if path == "index.json" {
                String::from_utf8(content).unwrap().replace(from, to).into_bytes()
            } else {
                content
            };
            vec![(path.to_owned(), text)]
        })
    };
    assert!(matches!(import(&elsewhere, &with_index("default/a", "../a")), Err(ImportError::Name(_))));
    assert!(matches!(
        import(&elsewhere, &with_index("\"schemaVersion\":2", "\"schemaVersion\":3")),
        Err(ImportError::Index(_))
    ));
    assert!(matches!(
        import(&elsewhere, &with_index("gpusnap.snapshot", "else")),
        Err(ImportError::Count { count: 0 })
    ));
    let digest = world.store.list().unwrap()[0].digest.hex();
    let other = Digest::of(b"none").hex();
    assert!(matches!(import(&elsewhere, &with_index(&digest, &other)), Err(ImportError::Missing { .. })));
}

#[test]
fn a_damaged_snapshot_is_not_exported() {
    let world = World::new();
    drop(world.publish("default/a", &[b"content"]));
    std::fs::write(world.blob(Digest::of(b"content")), "CONTENT").unwrap();
    let snapshot = world.store.open_snapshot(&reference("default/a")).unwrap();
    let error = snapshot.export(None, std::io::sink(), &|_| {}).unwrap_err();
    assert!(matches!(error, ExportError::Damaged { digest } if digest == Digest::of(b"content")));
}
