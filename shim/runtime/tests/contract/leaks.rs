//! Leaks of many containers.

use std::fs;

use crate::bed::{Bed, sentences};
use crate::container::until;
use crate::spec::{process, program};

sentences![a_hundred_containers_leave_nothing, a_hundred_execs_leave_nothing];

async fn a_hundred_containers_leave_nothing(bed: &Bed) {
    let bundle = bed.bundle(&program(&["true"]));
    // The first ones may open things for the later ones.
    for _ in 0..3 {
        assert_eq!(bundle.start().await.end().await.code, 0);
        bundle.delete().await;
    }
    let before = bed.traces();
    let (descriptors, memory) = (descriptors(), memory());
    for _ in 0..100 {
        assert_eq!(bundle.start().await.end().await.code, 0);
        bundle.delete().await;
    }
    let left = bed.settle(&before);
    assert!(left.is_empty(), "{left:?}");
    until("descriptors are closed", || self::descriptors() <= descriptors).await;
    let grown = self::memory().saturating_sub(memory);
    assert!(grown < 4 << 20, "{grown} bytes of memory more");
}

async fn a_hundred_execs_leave_nothing(bed: &Bed) {
    let bundle = bed.bundle(&program(&["sleep", "600"]));
    let running = bundle.start().await;
    for _ in 0..3 {
        assert_eq!(bundle.exec(&process(&["true"])).await.unwrap().end().await.code, 0);
    }
    let before = bed.traces();
    let descriptors = descriptors();
    let files = fs::read_dir(&bundle.folder).unwrap().count();
    for _ in 0..100 {
        assert_eq!(bundle.exec(&process(&["true"])).await.unwrap().end().await.code, 0);
    }
    let left: Vec<_> = bed.settle_beside(&before, &bundle.id);
    assert!(left.is_empty(), "{left:?}");
    until("descriptors are closed", || self::descriptors() <= descriptors).await;
    assert_eq!(fs::read_dir(&bundle.folder).unwrap().count(), files, "files in the bundle");
    bundle.kill(running).await;
}

fn descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Returns the bytes of this process's own memory, from /proc/self/status, which counts in KiB.
fn memory() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}
