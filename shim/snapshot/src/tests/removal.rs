use std::time::{Duration, SystemTime};

use super::*;
use crate::{IfInUse, Prune, RemoveError, ResolveError};

const NOW: Prune = Prune { grace: Duration::ZERO, unnamed: Some(Duration::ZERO) };

/// Makes a snapshot look as if last used `seconds` ago.
fn age(world: &World, digest: Digest, seconds: u64) {
    let time = SystemTime::now() - Duration::from_secs(seconds);
    let file = std::fs::File::options().write(true).open(world.store.folders.uses.join(digest.hex())).unwrap();
    file.set_modified(time).unwrap();
}

#[test]
fn a_removed_snapshot_takes_with_it_what_no_other_needs() {
    let world = World::new();
    drop(world.publish("default/a", &[b"shared", b"own"]));
    let b = world.publish("default/b", &[b"shared"]).digest();
    let removed = world.store.remove(&reference("default/a"), IfInUse::Refuse).unwrap();
    assert_eq!((removed.blobs, removed.snapshots.len()), (2, 1));
    assert!(!world.blob(Digest::of(b"own")).exists() && world.blob(Digest::of(b"shared")).exists());
    assert_eq!((world.problems(), world.names()), (vec![], vec!["default/b".to_owned()]));
    assert_eq!(removed.left, world.store.usage().unwrap().blobs);
    world.store.remove(&b.into(), IfInUse::Refuse).unwrap();
    assert_eq!(world.store.folders.blobs.names().unwrap().len() + world.store.folders.uses.names().unwrap().len(), 0);
    let gone = world.store.remove(&b.into(), IfInUse::Refuse).unwrap_err();
    assert!(matches!(gone, RemoveError::Resolve(ResolveError::Missing { .. })));
}

#[test]
fn one_name_of_several_goes_alone() {
    let world = World::new();
    let digest = world.publish("default/a", &[b"x"]).digest();
    assert_eq!(world.publish("default/b", &[b"x"]).digest(), digest);
    assert!(world.store.remove(&reference("default/a"), IfInUse::Refuse).unwrap().snapshots.is_empty());
    assert_eq!(world.names(), ["default/b"]);
    world.store.remove(&reference("default/b"), IfInUse::Refuse).unwrap();
    assert!(world.store.list().unwrap().is_empty());
}

#[test]
fn a_snapshot_in_use_stays_whoever_wants_it_gone() {
    let world = World::new();
    let used = world.publish("default/a", &[b"x"]);
    let other = Store::open(world.store.root()).unwrap();
    let refused = other.remove(&reference("default/a"), IfInUse::Refuse).unwrap_err();
    assert!(matches!(refused, RemoveError::InUse { .. }), "{refused}");
    assert_eq!(other.enforce_quota(0).unwrap().in_use, [used.digest()]);
    // The name moves on; the snapshot stays.
    drop(world.publish("default/a", &[b"y"]));
    assert_eq!(other.prune(NOW).unwrap().in_use, [used.digest()]);
    assert!(other.list().unwrap().iter().any(|listed| listed.digest == used.digest() && listed.in_use));
    assert_eq!(world.problems(), [""; 0]);
    let digest = used.digest();
    drop(used);
    assert_eq!(other.prune(NOW).unwrap().snapshots, [digest]);
}

#[test]
fn a_removal_can_wait_until_the_snapshot_is_free() {
    let world = World::new();
    let used = world.publish("default/a", &[b"x"]);
    let store = world.store.clone();
    std::thread::scope(|scope| {
        let removal = scope.spawn(|| store.remove(&reference("default/a"), IfInUse::Wait).unwrap());
        // Others can use the snapshot meanwhile.
        let second = world.store.open_snapshot(&reference("default/a")).unwrap();
        drop(used);
        assert_eq!(std::fs::read(second.path(&Digest::of(b"x"))).unwrap(), b"x");
        drop(second);
        assert_eq!(removal.join().unwrap().snapshots.len(), 1);
    });
    assert!(world.store.list().unwrap().is_empty());
}

#[test]
fn a_quota_takes_what_was_not_used_for_the_longest_time() {
    let world = World::new();
    let content: Vec<Vec<u8>> = (0..4_u8).map(|n| vec![n; 10_000]).collect();
    let digests: Vec<Digest> =
        (0..4).map(|n| world.publish(&format!("default/s{n}"), &[&content[n], b"shared"]).digest()).collect();
    for (n, seconds) in [(0, 400), (1, 500), (2, 100), (3, 200)] {
        age(&world, digests[n], seconds);
    }
    // A use makes the snapshot the newest.
    drop(world.store.open_snapshot(&reference("default/s1")).unwrap());
    let removed = world.store.enforce_quota(25_000).unwrap();
    assert_eq!(removed.snapshots, [digests[0], digests[3]]);
    assert!(removed.left <= 25_000 && removed.left == world.store.usage().unwrap().blobs);
    assert_eq!((world.names(), world.problems()), (vec!["default/s1".to_owned(), "default/s2".to_owned()], vec![]));
    assert!(world.store.enforce_quota(25_000).unwrap().snapshots.is_empty());
    assert_eq!(world.store.enforce_quota(0).unwrap().left, 0);
}

#[test]
fn looking_is_no_use() {
    let world = World::new();
    let digest = world.publish("default/a", &[b"x"]).digest();
    age(&world, digest, 1000);
    let before = world.store.list().unwrap()[0].last_used;
    world.problems();
    assert_eq!(world.store.list().unwrap()[0].last_used, before);
    drop(world.store.open_snapshot(&digest.into()).unwrap());
    assert!(world.store.list().unwrap()[0].last_used > before);
}

#[test]
fn a_prune_takes_garbage_and_spares_what_is_new_and_whose_maker_lives() {
    let world = World::new();
    let old = world.publish("default/a", &[b"old"]).digest();
    drop(world.publish("default/a", &[b"new"]));
    let garbage = Digest::of(b"garbage");
    std::fs::write(world.blob(garbage), "garbage").unwrap();
    let live = world.store.draft().unwrap();
    let dead = world.store.folders.drafts.join("dead");
    std::fs::create_dir(&dead).unwrap();
    std::fs::write(dead.join("pack"), "x").unwrap();
    std::os::unix::fs::symlink("/etc", world.store.folders.drafts.join("link")).unwrap();
    std::fs::write(world.store.folders.uses.join(garbage.hex()), "").unwrap();

    let day = Duration::from_secs(86400);
    let removed = world.store.prune(Prune { grace: day, unnamed: Some(day) }).unwrap();
    assert_eq!((removed.drafts, removed.blobs, removed.snapshots.len()), (2, 0, 0));
    assert!(live.folder().exists() && !dead.exists() && Path::new("/etc").exists());
    assert!(!world.store.folders.uses.join(garbage.hex()).exists());

    let removed = world.store.prune(Prune { grace: Duration::ZERO, unnamed: None }).unwrap();
    assert_eq!((removed.blobs, removed.bytes), (1, 7));
    assert_eq!(world.store.prune(NOW).unwrap().snapshots, [old]);
    assert_eq!((world.names(), world.problems()), (vec!["default/a".to_owned()], vec![]));
}

#[test]
fn nothing_goes_while_nobody_knows_what_a_damaged_manifest_needs() {
    let world = World::new();
    let damaged = world.publish("default/a", &[b"precious"]).digest();
    let fine = world.publish("default/b", &[b"other"]).digest();
    let manifest = world.blob(damaged);
    let right = std::fs::read(&manifest).unwrap();
    std::fs::write(&manifest, "{}").unwrap();
    assert_eq!(world.store.prune(NOW).unwrap().unreadable, [damaged]);
    assert!(world.store.enforce_quota(0).unwrap().snapshots.is_empty());
    assert_eq!(world.store.remove(&fine.into(), IfInUse::Refuse).unwrap().blobs, 0);
    std::fs::write(&manifest, right).unwrap();
    assert_eq!(world.problems(), [""; 0]);

    std::fs::write(&manifest, "{}").unwrap();
    world.store.remove(&damaged.into(), IfInUse::Refuse).unwrap();
    world.store.prune(NOW).unwrap();
    assert_eq!(world.store.usage().unwrap().blobs, 0);
}

#[test]
fn what_other_tools_have_put_there_stays() {
    let world = World::new();
    let layer = Digest::of(b"layer");
    std::fs::write(world.blob(layer), "layer").unwrap();
    let manifest = format!(
        r#"{{"schemaVersion":2,"config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{layer}","size":5}},"layers":[]}}"#
    );
    let image = Digest::of(manifest.as_bytes());
    std::fs::write(world.blob(image), &manifest).unwrap();
    let index = format!(
        r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"{image}","size":{},"annotations":{{"org.opencontainers.image.ref.name":"latest"}}}}]}}"#,
        manifest.len()
    );
    std::fs::write(world.store.root().join("index.json"), index).unwrap();
    drop(world.publish("default/a", &[b"x"]));
    world.store.remove(&reference("default/a"), IfInUse::Refuse).unwrap();
    world.store.prune(NOW).unwrap();
    world.store.enforce_quota(0).unwrap();
    assert!(world.store.list().unwrap().is_empty());
    assert_eq!(world.problems(), [""; 0]);
    assert!(world.blob(layer).exists() && world.blob(image).exists());
}
