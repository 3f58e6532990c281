use std::time::Duration;

use super::child::Other;
use super::*;
use crate::Prune;

#[test]
fn several_processes_publish_at_once_and_nobody_loses_a_name() {
    let world = World::new();
    let writers: Vec<Other> = (0..4).map(|n| Other::start(&format!("w{n}"), &world.store)).collect();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Garbage is collected without grace meanwhile, and no named snapshot is ever damaged.
        scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                world.store.prune(Prune { grace: Duration::ZERO, unnamed: Some(Duration::ZERO) }).unwrap();
                assert_eq!(world.problems(), [""; 0]);
            }
        });
        for writer in writers {
            writer.wait();
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    let mut expected: Vec<String> = (0..4).flat_map(|w| (0..20).map(move |n| format!("w{w}/{n}"))).collect();
    let mut names = world.names();
    expected.sort();
    names.sort();
    assert_eq!(names, expected);
    let usage = world.store.usage().unwrap();
    assert!(usage.garbage == 0 && usage.blobs * 4 < usage.unshared, "{usage:?}");
}

#[test]
fn several_threads_may_open_a_new_store_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("new/store");
    std::thread::scope(|scope| {
        for n in 0..8 {
            let root = &root;
            scope.spawn(move || drop(publish(&Store::open(root).unwrap(), &format!("t/{n}"), &[b"x"]).unwrap()));
        }
    });
    let store = Store::open(&root).unwrap();
    assert_eq!((names(&store).len(), problems(&store)), (8, vec![]));
}
