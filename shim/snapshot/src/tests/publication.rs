use std::io::{Read, Seek};
use std::os::unix::fs::MetadataExt;

use super::*;
use crate::{Draft, OpenError, PublishError, Received};

#[test]
fn a_snapshot_is_there_with_all_that_was_published() {
    let world = World::new();
    let published = world.publish("default/vit", &[b"one", b"two"]);
    let (digest, config) = (published.digest(), published.config().clone());
    drop(published);
    for asked in ["default/vit".to_owned(), digest.to_string(), digest.short()] {
        let snapshot = world.store.open_snapshot(&reference(&asked)).unwrap();
        assert_eq!((snapshot.digest(), snapshot.config()), (digest, &config));
        assert_eq!(snapshot.names(), [name("default/vit")]);
        let layers: Vec<_> = snapshot.layers_of(crate::GPU_MEMORY_TYPE).collect();
        let mut content = String::new();
        snapshot.open(layers[1]).unwrap().read_to_string(&mut content).unwrap();
        assert_eq!((content.as_str(), layers.len(), layers[0].digest), ("two", 2, Digest::of(b"one")));
    }
    assert_eq!(world.problems(), [""; 0]);
    assert_eq!(world.store.folders.drafts.names().unwrap(), [""; 0]);
}

#[test]
fn the_store_is_a_layout_that_others_read_and_its_files_are_for_root_alone() {
    let world = World::new();
    let snapshot = world.publish("default/vit", &[b"one"]);
    let root = world.store.root();
    let json =
        |name: &str| serde_json::from_slice::<serde_json::Value>(&std::fs::read(root.join(name)).unwrap()).unwrap();
    assert_eq!(json("oci-layout")["imageLayoutVersion"], "1.0.0");
    assert_eq!(json("index.json")["manifests"][0]["annotations"]["org.opencontainers.image.ref.name"], "default/vit");
    assert_eq!(json("index.json")["manifests"][0]["digest"], snapshot.digest().to_string());
    assert_eq!(json("index.json")["manifests"][0]["size"], snapshot.manifest().bytes().len());
    assert_eq!(mode(root), 0o700);
    for blob in world.store.folders.blobs.names().unwrap() {
        assert_eq!(mode(&world.store.folders.blobs.join(blob)), 0o600);
    }
    assert_eq!((mode(&root.join("index.json")), mode(&root.join("drafts"))), (0o600, 0o700));
    assert_eq!(mode(world.store.draft().unwrap().folder()), 0o700);
}

#[test]
fn equal_layers_are_stored_once_and_the_first_one_stays() {
    let world = World::new();
    let first = world.publish("default/a", &[b"shared", b"own a", b"shared"]);
    let shared = Digest::of(b"shared");
    let inode = std::fs::metadata(world.blob(shared)).unwrap().ino();
    let second = world.publish("default/b", &[b"own b!", b"shared"]);
    assert_eq!(std::fs::metadata(world.blob(shared)).unwrap().ino(), inode);
    assert_ne!(first.digest(), second.digest());
    let listed = world.store.list().unwrap();
    let documents = |n: usize| {
        let (manifest, _) = listed[n].content.as_ref().unwrap();
        manifest.bytes().len() as u64
    };
    // Both snapshots have the same config.
    assert_eq!((listed[0].unique, listed[1].unique), (5 + documents(0), 6 + documents(1)));
    assert_eq!(listed[0].size, first.manifest().size());
    let usage = world.store.usage().unwrap();
    assert_eq!((usage.unshared, usage.garbage), (listed[0].size + listed[1].size, 0));
    assert!(usage.blobs < usage.unshared);
}

#[test]
fn a_file_that_is_open_keeps_its_bytes_through_publication_and_removal() {
    let world = World::new();
    world.publish("default/a", &[b"mapped by somebody"]);
    let draft = world.store.draft().unwrap();
    std::fs::write(draft.folder().join("pack"), b"mapped by somebody").unwrap();
    let mut twin = std::fs::File::open(draft.folder().join("pack")).unwrap();
    std::fs::write(draft.folder().join("other"), b"published").unwrap();
    let mut moved = std::fs::File::open(draft.folder().join("other")).unwrap();
    drop(draft.publish(new("default/b", vec!["pack".into(), "other".into()]), &|_| {}).unwrap());
    world.store.remove(&reference("default/b"), crate::IfInUse::Refuse).unwrap();
    let mut text = String::new();
    twin.read_to_string(&mut text).unwrap();
    moved.rewind().unwrap();
    moved.read_to_string(&mut text).unwrap();
    assert_eq!(text, "mapped by somebodypublished");
}

#[test]
fn a_name_in_use_moves_or_is_refused_as_asked() {
    let world = World::new();
    let old = world.publish("default/a", &[b"old"]).digest();
    let draft = world.store.draft().unwrap();
    std::fs::write(draft.folder().join("p"), "new").unwrap();
    let mut refused = new("default/a", vec!["p".into()]);
    refused.if_taken = IfTaken::Refuse;
    let error = draft.publish(refused, &|_| {}).unwrap_err();
    assert!(matches!(&error, PublishError::Taken { digest, .. } if *digest == old), "{error}");
    assert_eq!(world.store.usage().unwrap().garbage, 0);

    let new = world.publish("default/a", &[b"new"]).digest();
    assert_eq!(world.store.open_snapshot(&reference("default/a")).unwrap().digest(), new);
    assert_eq!(world.store.open_snapshot(&old.into()).unwrap().names(), []);
    assert_eq!(world.problems(), [""; 0]);
}

#[test]
fn a_layer_outside_of_the_draft_is_not_published() {
    let world = World::new();
    let outside = tempfile::NamedTempFile::new().unwrap();
    let attempt = |path: &Path, prepare: &dyn Fn(&Draft)| {
        let draft = world.store.draft().unwrap();
        prepare(&draft);
        draft.publish(new("default/a", vec![path.to_owned()]), &|_| {}).unwrap_err()
    };
    let link = |draft: &Draft| std::os::unix::fs::symlink(outside.path(), draft.folder().join("link")).unwrap();
    let folder = |draft: &Draft| std::fs::create_dir(draft.folder().join("folder")).unwrap();
    assert!(matches!(attempt(outside.path(), &|_| {}), PublishError::Outside { .. }));
    assert!(matches!(attempt(Path::new("../../index.json"), &|_| {}), PublishError::Outside { .. }));
    assert!(matches!(attempt(Path::new("link"), &link), PublishError::Outside { .. }));
    assert!(matches!(attempt(Path::new("folder"), &folder), PublishError::File(_)));
    assert!(matches!(attempt(Path::new("none"), &|_| {}), PublishError::File(_)));
    assert_eq!(world.names(), [""; 0]);
    assert_eq!(world.store.usage().unwrap().blobs, 0);
}

#[test]
fn what_is_received_has_to_be_whole() {
    let world = World::new();
    let there = world.publish("default/a", &[b"one", b"two"]);
    let (manifest, config) = (there.manifest().clone(), there.manifest().config().clone());
    let elsewhere = World::new();
    let receive = |blobs: &[(&str, Digest)], content: &[u8]| {
        let draft = elsewhere.store.draft().unwrap();
        std::fs::copy(world.blob(config.digest), draft.folder().join("config")).unwrap();
        std::fs::write(draft.folder().join("one"), content).unwrap();
        std::fs::write(draft.folder().join("two"), b"two").unwrap();
        let mut blobs: BTreeMap<Digest, PathBuf> = blobs.iter().map(|(path, digest)| (*digest, path.into())).collect();
        blobs.insert(config.digest, "config".into());
        let received = Received { name: Some(name("x/y")), if_taken: IfTaken::Move, manifest: manifest.clone(), blobs };
        draft.publish_received(received)
    };
    let (one, two) = (("one", Digest::of(b"one")), ("two", Digest::of(b"two")));
    assert!(matches!(receive(&[one], b"one").unwrap_err(), PublishError::Missing { digest } if digest == two.1));
    assert!(matches!(receive(&[one, two], b"o").unwrap_err(), PublishError::Size { found: 1, .. }));
    assert_eq!(elsewhere.store.usage().unwrap().blobs, 0);
    assert_eq!(receive(&[one, two], b"one").unwrap().digest(), there.digest());
    assert_eq!(elsewhere.problems(), [""; 0]);

    elsewhere.store.remove(&reference("x/y"), crate::IfInUse::Refuse).unwrap();
    let other = publish(&elsewhere.store, "x/z", &[b"two"]).unwrap().digest();
    let draft = elsewhere.store.draft().unwrap();
    assert!(draft.reuse(&two.1, 3).unwrap());
    assert!(!draft.reuse(&two.1, 4).unwrap() && !draft.reuse(&one.1, 3).unwrap());
    assert!(draft.reuse(&two.1, 3).unwrap());
    elsewhere.store.remove(&other.into(), crate::IfInUse::Refuse).unwrap();
    assert_eq!(std::fs::read(draft.folder().join(two.1.hex())).unwrap(), b"two");
}

#[test]
fn a_damaged_blob_is_replaced_by_a_right_one() {
    let world = World::new();
    drop(world.publish("default/a", &[b"content"]));
    std::fs::write(world.blob(Digest::of(b"content")), "cont").unwrap();
    assert_eq!(world.problems().len(), 1);
    drop(world.publish("default/b", &[b"content"]));
    assert_eq!(world.problems(), [""; 0]);
}

#[test]
fn layers_flushed_to_the_disk_are_published_all_the_same() {
    let world = World::new();
    let store = world.store.clone().with_durability(crate::Durability::Machine);
    drop(publish(&store, "default/a", &[b"one"]).unwrap());
    assert_eq!((world.problems(), world.names()), (vec![], vec!["default/a".to_owned()]));
}

#[test]
fn a_folder_of_something_else_is_no_store() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("mine.txt"), "").unwrap();
    let before = mode(folder.path());
    assert!(
        matches!(Store::open(folder.path()).unwrap_err(), OpenError::NotAStore { found, .. } if found == "mine.txt")
    );
    assert_eq!(mode(folder.path()), before);
}

#[test]
fn a_store_that_lost_its_index_is_not_taken_for_an_empty_one() {
    let world = World::new();
    drop(world.publish("default/a", &[b"one"]));
    let root = world.store.root();
    std::fs::remove_file(root.join("index.json")).unwrap();
    assert!(matches!(Store::open(root), Err(OpenError::Damaged { .. })));
    std::fs::remove_file(root.join("oci-layout")).unwrap();
    assert!(matches!(Store::open(root), Err(OpenError::Damaged { .. })));

    let world = World::new();
    let root = world.store.root();
    std::fs::remove_file(root.join("oci-layout")).unwrap();
    Store::open(root).unwrap();
    std::fs::write(root.join("oci-layout"), r#"{"imageLayoutVersion":"2.0.0"}"#).unwrap();
    assert!(matches!(Store::open(root), Err(OpenError::Layout { .. })));
}

#[test]
fn progress_is_told_of_every_byte_that_is_hashed() {
    let world = World::new();
    let draft = world.store.draft().unwrap();
    std::fs::write(draft.folder().join("a"), vec![1; 3 << 20]).unwrap();
    std::fs::write(draft.folder().join("b"), "known").unwrap();
    let mut snapshot = new("", vec!["a".into(), "b".into()]);
    snapshot.layers[1].digest = Some(Digest::of(b"known"));
    let told = std::sync::atomic::AtomicU64::new(0);
    let add = |bytes| {
        told.fetch_add(bytes, std::sync::atomic::Ordering::Relaxed);
    };
    drop(draft.publish(snapshot, &add).unwrap());
    assert_eq!(told.into_inner(), 3 << 20);
    assert_eq!(world.problems(), [""; 0]);
}
