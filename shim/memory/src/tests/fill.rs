use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;

use rustix::fs::Advice;

use proc::{ContainerPid, HostPid, ProcessIds};

use super::{Holder, container, noise, open, save, threads};
use crate::{CHUNK, Destination, FillError, PAGE, Pack, Place, Process, Saved, Segment, SegmentTable, fill, prefetch};

const MIB: u64 = 1 << 20;

/// Memory with zeros in it, which begins in the middle of a huge page as a rule.
fn holder(seed: u64) -> Holder {
    Holder::start(
        9 * MIB + PAGE,
        &[(PAGE, &noise(3 * MIB, seed)), (5 * MIB, &noise(CHUNK, seed)), (9 * MIB, &noise(PAGE, seed))],
    )
}

/// Empty memory that is to become that of another process.
fn empty(of: &Holder) -> Holder {
    Holder::start(of.range().end - of.range().start, &[])
}

/// The same table for memory that is elsewhere.
fn moved(saved: &Saved, moves: &[(i32, &Holder, &Holder)]) -> SegmentTable {
    let processes = moves.iter().map(|(pid, from, to)| Process {
        pid: container(*pid),
        segments: saved
            .table
            .segments(container(*pid))
            .iter()
            .map(|segment| Segment { address: segment.address - from.range().start + to.range().start, ..*segment })
            .collect(),
    });
    SegmentTable::new(saved.table.packs().to_vec(), processes.collect()).unwrap()
}

/// Has the page cache forget packs.
fn forget(packs: &[Pack]) {
    for pack in packs {
        pack.file().sync_all().unwrap();
        rustix::fs::fadvise(pack.file(), 0, None, Advice::DontNeed).unwrap();
    }
}

#[test]
fn memory_comes_back_in_other_processes() {
    for number in [1, 3] {
        let folder = tempfile::tempdir().unwrap();
        let (first, second) = (holder(1), holder(2));
        let (third, fourth) = (empty(&first), empty(&second));
        let saved = save(&[&first, &second], folder.path()).unwrap();
        let table = moved(&saved, &[(1, &first, &third), (2, &second, &fourth)]);
        let ready = Mutex::new(Vec::new());
        let is_ready = |pid: ContainerPid| {
            let (source, copy) = if pid == container(1) { (&first, &third) } else { (&second, &fourth) };
            assert!(source.memory() == copy.memory(), "process {pid}");
            ready.lock().unwrap().push(pid);
        };
        let destination = Destination { processes: &[fourth.ids(2), third.ids(1)], ready: &is_ready };
        let control = threads(number);
        fill(&table, &open(&saved), &destination, &control).unwrap();
        let mut ready = ready.into_inner().unwrap();
        if number == 1 {
            assert_eq!(ready, [2, 1].map(container));
        }
        ready.sort_unstable();
        assert_eq!(ready, [1, 2].map(container));
        let statistics = table.statistics();
        assert_eq!(control.done(), statistics.memory - statistics.zero);
    }
}

#[test]
fn packs_come_from_the_disk_and_from_the_page_cache() {
    // Not in /tmp, which may have no disk.
    let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let source = holder(1);
    let saved = save(&[&source], folder.path()).unwrap();
    let packs = open(&saved);
    for limit in [0, MIB, u64::MAX] {
        forget(&packs);
        assert_eq!(prefetch(&packs, limit, &threads(1)), limit.min(packs[0].data_length()));
        let copy = empty(&source);
        let destination = Destination { processes: &[copy.ids(1)], ready: &|_| () };
        fill(&moved(&saved, &[(1, &source, &copy)]), &packs, &destination, &threads(2)).unwrap();
        assert!(copy.memory() == source.memory());
    }
}

#[test]
fn any_part_of_a_pack_can_be_wanted() {
    let folder = tempfile::tempdir().unwrap();
    let content = noise(2 * MIB, 1);
    let source = Holder::start(2 * MIB, &[(0, &content)]);
    let saved = save(&[&source], folder.path()).unwrap();
    let copy = Holder::start(4 * MIB, &[]);
    let mut expected = vec![0; 4 << 20];
    let mut segments = Vec::new();
    for (to, from, pages) in [(1, 3, 1), (2, 17, 100), (200, 0, 512), (800, 511, 1), (900, 15, 18)] {
        let (to, from, length) = (to * PAGE, from * PAGE, pages * PAGE);
        let place = Place::Pack { index: 0, offset: from };
        segments.push(Segment { address: copy.range().start + to, length, place });
        let [to, from, length] = [to, from, length].map(|number| usize::try_from(number).unwrap());
        expected[to..to + length].copy_from_slice(&content[from..from + length]);
    }
    let table = SegmentTable::new(vec![2 * MIB], vec![Process { pid: container(1), segments }]).unwrap();
    fill(&table, &open(&saved), &Destination { processes: &[copy.ids(1)], ready: &|_| () }, &threads(2)).unwrap();
    assert!(copy.memory() == expected);
}

#[test]
fn a_process_without_stored_memory_is_ready_at_once() {
    let segments = vec![Segment { address: 0x1000, length: 4096, place: Place::Zero }];
    let table = SegmentTable::new(vec![], vec![Process { pid: container(5), segments }]).unwrap();
    let ready = Mutex::new(Vec::new());
    let is_ready = |pid| ready.lock().unwrap().push(pid);
    let own = |pid| ProcessIds { host: HostPid::own(), container: container(pid) };
    fill(&table, &[], &Destination { processes: &[own(5), own(6)], ready: &is_ready }, &threads(1)).unwrap();
    assert_eq!(ready.into_inner().unwrap(), [5, 6].map(container));
}

#[test]
fn nothing_of_a_damaged_chunk_is_written() {
    let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let source = Holder::start(MIB, &[(0, &noise(MIB, 1))]);
    let saved = save(&[&source], folder.path()).unwrap();
    let packs = open(&saved);
    let file = File::options().write(true).open(&saved.packs[0]).unwrap();
    file.write_all_at(&[0; 64], 11 * CHUNK + 99).unwrap();
    for cold in [false, true] {
        if cold {
            forget(&packs);
        }
        let copy = empty(&source);
        let table = moved(&saved, &[(1, &source, &copy)]);
        let ready = |_| panic!("it is not");
        let destination = Destination { processes: &[copy.ids(1)], ready: &ready };
        let error = fill(&table, &packs, &destination, &threads(1)).unwrap_err();
        assert!(matches!(error, FillError::Corrupt { pack: 0, chunk: 11, .. }), "{error}");
        let begin = usize::try_from(11 * CHUNK).unwrap();
        assert!(copy.memory()[begin..begin + 65536].iter().all(|byte| *byte == 0));
    }
}

#[test]
fn a_pack_that_was_cut_off_after_it_was_opened_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let source = Holder::start(MIB, &[(0, &noise(MIB, 1))]);
    let saved = save(&[&source], folder.path()).unwrap();
    let packs = open(&saved);
    File::options().write(true).open(&saved.packs[0]).unwrap().set_len(3 * PAGE).unwrap();
    let copy = empty(&source);
    let destination = Destination { processes: &[copy.ids(1)], ready: &|_| () };
    let error = fill(&moved(&saved, &[(1, &source, &copy)]), &packs, &destination, &threads(1)).unwrap_err();
    assert!(matches!(error, FillError::Read { .. }), "{error}");
}

#[test]
fn other_packs_or_processes_than_those_of_the_table_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (Holder::start(MIB, &[(0, &noise(MIB, 1))]), Holder::start(CHUNK, &[(0, &noise(CHUNK, 1))]));
    let saved = save(&[&first, &second], folder.path()).unwrap();
    let run = |packs: &[Pack], processes: &[ProcessIds]| {
        fill(&saved.table, packs, &Destination { processes, ready: &|_| () }, &threads(1)).unwrap_err()
    };
    let mut packs = open(&saved);
    let error = run(&packs, &[first.ids(1)]);
    assert!(matches!(error, FillError::Unknown { pid } if pid == container(2)), "{error}");
    packs.reverse();
    let error = run(&packs, &[first.ids(1), second.ids(2)]);
    assert!(matches!(error, FillError::Length { .. }), "{error}");
    packs.pop();
    let error = run(&packs, &[first.ids(1), second.ids(2)]);
    assert!(matches!(error, FillError::Packs { expected: 2, found: 1 }), "{error}");
}

#[test]
fn a_process_that_ends_meanwhile_or_lacks_the_memory_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (holder(1), holder(2));
    let (third, fourth) = (empty(&first), empty(&second));
    let saved = save(&[&first, &second], folder.path()).unwrap();
    let table = moved(&saved, &[(1, &first, &third), (2, &second, &fourth)]);
    let packs = open(&saved);
    let order = [third.ids(1), fourth.ids(2)];
    let kill = |pid: ContainerPid| {
        if pid == container(1) {
            fourth.end()
        }
    };
    let error = fill(&table, &packs, &Destination { processes: &order, ready: &kill }, &threads(1)).unwrap_err();
    assert!(matches!(error, FillError::Gone { pid, .. } if pid == fourth.pid), "{error}");

    let end = (1 << 47) - 2 * PAGE;
    let segments = vec![Segment { address: end, length: PAGE, place: Place::Pack { index: 0, offset: 0 } }];
    let nowhere = SegmentTable::new(table.packs().to_vec(), vec![Process { pid: container(1), segments }]).unwrap();
    let destination = Destination { processes: &order, ready: &|_| () };
    let error = fill(&nowhere, &packs, &destination, &threads(1)).unwrap_err();
    assert!(matches!(error, FillError::Unmapped { address, .. } if address == end), "{error}");
}

#[test]
fn a_fill_can_be_cancelled() {
    let folder = tempfile::tempdir().unwrap();
    let source = holder(1);
    let saved = save(&[&source], folder.path()).unwrap();
    let copy = empty(&source);
    let control = threads(2);
    control.cancel();
    let destination = Destination { processes: &[copy.ids(1)], ready: &|_| () };
    let error = fill(&moved(&saved, &[(1, &source, &copy)]), &open(&saved), &destination, &control).unwrap_err();
    assert!(matches!(error, FillError::Cancelled), "{error}");
}
