use std::os::unix::fs::symlink;

use super::*;
use crate::{IfInUse, OpenError, SnapshotError};

/// A store with one snapshot and some damage, and the report of a verification.
fn after(damage: impl Fn(&World, Digest)) -> (World, Vec<String>) {
    let world = World::new();
    let digest = world.publish("default/a", &[b"first layer", b"second layer"]).digest();
    damage(&world, digest);
    let problems = world.problems();
    (world, problems)
}

fn open(world: &World) -> Result<Snapshot, SnapshotError> {
    world.store.open_snapshot(&reference("default/a"))
}

#[test]
fn a_flipped_bit_in_any_file_is_found() {
    let world = World::new();
    let snapshot = world.publish("default/a", &[b"first layer", b"second layer"]).digest();
    for name in world.store.folders.blobs.names().unwrap() {
        let path = world.store.folders.blobs.join(&name);
        let right = std::fs::read(&path).unwrap();
        for (at, bit) in [(0, 1), (right.len() / 2, 0x80), (right.len() - 1, 0x10)] {
            let mut wrong = right.clone();
            wrong[at] ^= bit;
            std::fs::write(&path, wrong).unwrap();
            let problems = world.problems();
            assert_eq!(problems.len(), 1, "{problems:?}");
            assert!(problems[0].contains("digest mismatch"), "{problems:?}");
            let affected = name.to_str() == Some(&snapshot.hex()) || problems[0].contains(&snapshot.short());
            assert!(affected, "{problems:?}");
        }
        std::fs::write(&path, right).unwrap();
    }
    assert_eq!(world.problems(), [""; 0]);
}

#[test]
fn a_missing_or_cut_off_layer_is_noticed_when_the_snapshot_is_opened() {
    let layer = Digest::of(b"second layer");
    let (world, problems) = after(|world, _| std::fs::write(world.blob(layer), "second").unwrap());
    assert!(matches!(open(&world).unwrap_err(), SnapshotError::Size { found: 6, expected: 12, .. }));
    assert!(problems.len() == 1 && problems[0].contains("6 bytes"), "{problems:?}");
    let (world, problems) = after(|world, _| std::fs::remove_file(world.blob(layer)).unwrap());
    assert!(matches!(open(&world).unwrap_err(), SnapshotError::Missing { .. }));
    assert!(problems.len() == 1 && problems[0].contains("No such file"), "{problems:?}");
    world.store.remove(&reference("default/a"), IfInUse::Refuse).unwrap();
    assert_eq!(world.store.usage().unwrap().blobs, 0);
}

#[test]
fn a_link_among_the_blobs_is_not_followed() {
    let layer = Digest::of(b"first layer");
    let outside = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(outside.path(), "first layer").unwrap();
    let (world, problems) = after(|world, _| {
        std::fs::remove_file(world.blob(layer)).unwrap();
        symlink(outside.path(), world.blob(layer)).unwrap();
    });
    assert_eq!(problems.len(), 2, "{problems:?}");
    assert!(problems.iter().any(|problem| problem.contains("no regular file")), "{problems:?}");
    assert!(matches!(open(&world).unwrap_err(), SnapshotError::File(_)));
    drop(world.publish("default/b", &[b"first layer"]));
    assert_eq!(world.problems(), [""; 0], "the right bytes take the place of the link");
    assert_eq!(std::fs::read(outside.path()).unwrap(), b"first layer");

    let (world, problems) = after(|world, _| {
        symlink("/etc/passwd", world.store.folders.blobs.join("passwd")).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            world.store.folders.blobs.join("fifo"),
            rustix::fs::FileType::Fifo,
            0o600.into(),
            0,
        )
        .unwrap();
    });
    assert!(problems.len() == 2 && problems.iter().all(|problem| problem.contains("no blob")), "{problems:?}");
    drop(open(&world).unwrap());

    let (world, _) = after(|world, _| {
        let root = world.store.root();
        std::fs::rename(root.join("blobs"), root.join("uses/blobs")).unwrap();
        symlink("uses/blobs", root.join("blobs")).unwrap();
    });
    assert!(Store::open(world.store.root()).is_err());
}

#[test]
fn a_fifo_in_the_place_of_a_manifest_stops_nobody() {
    let (world, problems) = after(|world, digest| {
        std::fs::remove_file(world.blob(digest)).unwrap();
        let fifo = rustix::fs::FileType::Fifo;
        rustix::fs::mknodat(rustix::fs::CWD, world.blob(digest), fifo, 0o600.into(), 0).unwrap();
    });
    assert_eq!(problems.len(), 2, "{problems:?}");
    assert!(open(&world).is_err());
}

#[test]
fn a_manifest_of_ten_gigabytes_is_refused_unread() {
    let grow = |path: PathBuf| std::fs::File::options().write(true).open(path).unwrap().set_len(10 << 30).unwrap();
    let (world, problems) = after(|world, digest| grow(world.blob(digest)));
    assert!(problems.len() == 1 && problems[0].contains("larger than 4194304 bytes"), "{problems:?}");
    assert!(crate::chain(&open(&world).unwrap_err()).contains("larger than"));
    let (world, problems) = after(|world, _| grow(world.store.root().join("index.json")));
    assert!(problems.len() == 1 && problems[0].contains("larger than 4194304 bytes"), "{problems:?}");
    assert!(open(&world).is_err() && world.store.list().is_err());
    let (world, problems) = after(|world, _| {
        let config = open(world).unwrap().manifest().config().digest;
        grow(world.blob(config));
    });
    assert!(problems.len() == 1 && problems[0].contains("config"), "{problems:?}");
    assert!(open(&world).is_err());
}

/// Puts another manifest in the place of the one that `default/a` names.
fn with_manifest(world: &World, digest: Digest, from: &str, to: &str) {
    let manifest = std::fs::read_to_string(world.blob(digest)).unwrap();
    assert!(manifest.contains(from), "{manifest}");
    let manifest = manifest.replace(from, to);
    let new = Digest::of(manifest.as_bytes());
    std::fs::write(world.blob(new), &manifest).unwrap();
    let index = world.store.root().join("index.json");
    let text = std::fs::read_to_string(&index).unwrap().replace(&digest.to_string(), &new.to_string());
    std::fs::write(index, text).unwrap();
}

#[test]
fn what_is_of_a_later_version_is_refused_by_its_version() {
    let (world, _) = after(|world, digest| with_manifest(world, digest, "snapshot.v1+json", "snapshot.v2+json"));
    let error = crate::chain(&open(&world).unwrap_err());
    assert!(error.contains("snapshot.v2+json") && error.contains("this gpusnap knows"), "{error}");
    assert!(world.store.list().unwrap()[0].content.is_err());
    let (world, problems) = after(|world, digest| {
        let config = open(world).unwrap().manifest().config().clone();
        let text = std::fs::read_to_string(world.blob(config.digest)).unwrap();
        let later = text.replace("\"version\":1", "\"version\":7");
        let new = Digest::of(later.as_bytes());
        std::fs::write(world.blob(new), later).unwrap();
        with_manifest(world, digest, &config.digest.to_string(), &new.to_string());
    });
    let error = crate::chain(&open(&world).unwrap_err());
    assert!(error.contains("version 7") && error.contains("use a newer one"), "{error}");
    assert!(problems.len() == 1 && problems[0].contains("version 7"), "{problems:?}");
}

#[test]
fn digests_and_names_that_lead_elsewhere_are_not_followed() {
    let layer = Digest::of(b"first layer").to_string();
    for odd in ["sha256:../../../../etc/passwd", "sha512:../../x", "../blob", "md5:abc"] {
        let (world, problems) = after(|world, digest| with_manifest(world, digest, &layer, odd));
        assert_eq!(problems.len(), 1, "{odd}: {problems:?}");
        assert!(open(&world).is_err(), "{odd}");
    }
    let (world, _) = after(|world, _| {
        let index = world.store.root().join("index.json");
        let text = std::fs::read_to_string(&index).unwrap().replace("default/a", "../../etc/passwd");
        std::fs::write(index, text).unwrap();
    });
    assert!(matches!(open(&world), Err(SnapshotError::Resolve(_))));
    let listed = world.store.list().unwrap();
    assert!(listed.len() == 1 && listed[0].names.is_empty() && listed[0].content.is_ok());
}

#[test]
fn an_index_that_contradicts_itself_is_found() {
    let replace = |world: &World, from: &str, to: &str| {
        let index = world.store.root().join("index.json");
        let text = std::fs::read_to_string(&index).unwrap();
        assert!(text.contains(from), "{text}");
        std::fs::write(index, text.replace(from, to)).unwrap();
    };
    let (_, problems) = after(|world, _| replace(world, "\"size\":", "\"size\":1"));
    assert!(problems.len() == 1 && problems[0].contains("where the index says"), "{problems:?}");
    let (_, problems) = after(|world, _| {
        drop(world.publish("default/b", &[b"x"]));
        replace(world, "default/b", "default/a");
    });
    assert!(problems.len() == 1 && problems[0].contains("several snapshots"), "{problems:?}");
    let (_, problems) = after(|world, _| std::fs::write(world.store.root().join("index.json"), "{").unwrap());
    assert!(problems.len() == 1 && problems[0].contains("index.json"), "{problems:?}");
}

#[test]
fn checksums_inside_of_layers_can_be_checked_too() {
    let world = World::new();
    drop(world.publish("default/a", &[b"good", b"bad"]));
    let inner = |layer: &crate::Layer, file: &std::fs::File| {
        let text = std::io::read_to_string(file).unwrap();
        assert_eq!(layer.size, text.len() as u64);
        if text == "bad" { Err("chunk 0 is wrong".to_owned()) } else { Ok(()) }
    };
    let report = world.store.verify(Some(&reference("default/a")), Some(&inner), &|_| {}).unwrap();
    assert_eq!((report.snapshots, report.blobs, report.bytes, report.problems.len()), (1, 2, 7, 1));
    assert!(report.problems[0].to_string().contains("chunk 0 is wrong"));
    assert!(matches!(world.store.verify(Some(&reference("default/b")), None, &|_| {}), Err(SnapshotError::Resolve(_))));
}

#[test]
fn who_only_reads_makes_no_store_and_changes_no_permissions() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let empty = folder.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    std::fs::set_permissions(&empty, PermissionsExt::from_mode(0o755)).unwrap();
    for path in [empty.clone(), folder.path().join("none")] {
        assert!(matches!(Store::open_to_read(&path), Err(OpenError::Missing { .. })));
    }
    assert_eq!(std::fs::read_dir(&empty).unwrap().count(), 0);
    assert_eq!(std::fs::metadata(&empty).unwrap().permissions().mode() & 0o777, 0o755);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);

    let root = folder.path().join("store");
    drop(Store::open(&root).unwrap());
    std::fs::remove_file(root.join("reserve")).unwrap();
    std::fs::set_permissions(&root, PermissionsExt::from_mode(0o755)).unwrap();
    let store = Store::open_to_read(&root).unwrap();
    assert!(store.list().unwrap().is_empty());
    assert!(!root.join("reserve").exists());
    assert_eq!(std::fs::metadata(&root).unwrap().permissions().mode() & 0o777, 0o755);

    std::fs::remove_file(root.join("index.json")).unwrap();
    assert!(matches!(Store::open_to_read(&root), Err(OpenError::Damaged { .. })));
    std::fs::write(root.join("oci-layout"), r#"{"imageLayoutVersion":"9.0.0"}"#).unwrap();
    assert!(matches!(Store::open_to_read(&root), Err(OpenError::Layout { .. })));
}
