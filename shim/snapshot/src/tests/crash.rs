use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use super::child::{Other, prepare_archive};
use super::*;
use crate::{IfInUse, Prune, RemoveError};

const NOW: Prune = Prune { grace: Duration::ZERO, unnamed: None };

/// A random moment within the next `most`.
fn moment(most: Duration) -> Duration {
    let parts = RandomState::new().hash_one(0) % 10_000;
    most * u32::try_from(parts).unwrap() / 10_000
}

/// Kills a process that does `what` at 50 moments. All reported steps are done, and all snapshots
/// are whole.
fn killed_at_any_moment(what: &str) {
    let world = World::new();
    let kept = world.publish("kept/archive", &[b"kept", &[5; 200_000]]).digest();
    prepare_archive(&world.store);
    let mut published: BTreeMap<String, String> = BTreeMap::new();
    for round in 0..50 {
        let mut other = Other::start(what, &world.store);
        while other.next().is_some_and(|said| said != "ready") {}
        // Some rounds let the process finish a step first.
        let first = if round % 5 == 0 { other.next() } else { None };
        std::thread::sleep(moment(Duration::from_millis(40)));
        for said in first.into_iter().chain(other.kill()) {
            if let Some((name, digest)) = said.split_once(' ') {
                published.insert(name.to_owned(), digest.to_owned());
            }
        }
        assert_eq!(world.problems(), [""; 0], "round {round}");
        assert_eq!(world.store.open_snapshot(&reference("kept/archive")).unwrap().digest(), kept);
        for name in published.keys() {
            // The name may have moved on in the last instant.
            drop(world.store.open_snapshot(&reference(name)).unwrap());
        }
        if round % 10 == 9 {
            world.store.prune(NOW).unwrap();
            assert_eq!(world.store.folders.drafts.names().unwrap(), [""; 0]);
            assert_eq!((world.store.usage().unwrap().garbage, world.problems()), (0, vec![]));
        }
    }
    assert!(what != "publish" || !published.is_empty());
}

/// Kills a process before each change that `what` makes on the disk, up to the last change.
fn killed_at_every_step(what: &str) {
    for step in 0.. {
        let world = World::new();
        let kept = world.publish("kept/archive", &[b"kept", &[5; 2000]]);
        prepare_archive(&world.store);
        let said = Other::start_until(what, &world.store, step).wait();
        let store = Store::open(world.store.root()).unwrap();
        assert_eq!(problems(&store), [""; 0], "step {step}");
        drop(store.open_snapshot(&kept.digest().into()).unwrap());
        let removed = store.prune(NOW).unwrap();
        assert!(removed.unreadable.is_empty());
        assert_eq!((store.usage().unwrap().garbage, problems(&store)), (0, vec![]), "step {step}");
        assert_eq!(store.folders.drafts.names().unwrap(), [""; 0]);
        drop(publish(&store, "default/after", &[b"goes on"]).unwrap());
        if said.last().is_some_and(|said| said == "done") {
            assert!(step > 10, "it has only {step} steps");
            return;
        }
    }
}

#[test]
fn a_process_killed_at_any_step_of_a_publication_leaves_whole_snapshots_only() {
    killed_at_every_step("publish once");
}

#[test]
fn a_process_killed_at_any_step_of_making_a_store_leaves_one_that_can_be_opened() {
    for step in 0.. {
        let world = World::new();
        let said = Other::start_until("open once", &world.store, step).wait();
        let store = Store::open(&world.store.root().with_file_name("new")).unwrap();
        assert_eq!(problems(&store), [""; 0], "step {step}");
        if said.last().is_some_and(|said| said == "done") {
            return assert_eq!(names(&store), ["default/a"]);
        }
        drop(publish(&store, "default/after", &[b"goes on"]).unwrap());
    }
}

#[test]
fn a_process_killed_at_any_step_of_an_import_leaves_whole_snapshots_only() {
    killed_at_every_step("import once");
}

#[test]
fn a_process_killed_at_any_step_of_a_removal_leaves_whole_snapshots_only() {
    killed_at_every_step("remove once");
}

#[test]
fn a_process_killed_while_it_publishes_leaves_whole_snapshots_only() {
    killed_at_any_moment("publish");
}

#[test]
fn a_process_killed_while_it_imports_leaves_whole_snapshots_only() {
    killed_at_any_moment("import");
}

#[test]
fn a_process_killed_while_it_removes_leaves_whole_snapshots_only() {
    killed_at_any_moment("remove");
}

#[test]
fn a_snapshot_is_in_use_as_long_as_the_process_that_uses_it_lives() {
    let world = World::new();
    drop(world.publish("kept/archive", &[b"kept"]));
    let mut user = Other::start("use", &world.store);
    while user.next().is_some_and(|said| !said.starts_with("sha256:")) {}
    let asked = reference("kept/archive");
    assert!(matches!(world.store.remove(&asked, IfInUse::Refuse), Err(RemoveError::InUse { .. })));
    user.kill();
    assert_eq!(world.store.remove(&asked, IfInUse::Refuse).unwrap().snapshots.len(), 1);
}
