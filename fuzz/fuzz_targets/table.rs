//! The segment table of bulk memory.

#![no_main]

use gpusnap_fuzz::checksum;
use libfuzzer_sys::fuzz_target;
use memory::{PAGE, Place, SegmentTable};

fuzz_target!(|data: &[u8]| {
    check(data);
    // No mutation finds a checksum, and a forger computes it.
    if let Some((forged, _)) = data.split_last_chunk::<16>() {
        check(&[forged, &checksum(forged)].concat());
    }
});

fn check(bytes: &[u8]) {
    let Ok(table) = SegmentTable::parse(bytes) else { return };
    assert!(table.encode() == bytes, "a table has two encodings");
    let mut last = None;
    for process in table.processes() {
        assert!(Some(process.pid) > last, "pids ascend");
        last = Some(process.pid);
        assert!(table.segments(process.pid) == process.segments, "a process is found by its pid");
        let mut reached = 0;
        for segment in &process.segments {
            assert!(segment.address >= reached && segment.length > 0, "segments ascend");
            assert!(segment.address.is_multiple_of(PAGE) && segment.length.is_multiple_of(PAGE));
            reached = segment.end();
            if let Place::Pack { index, offset } = segment.place {
                let pack = table.packs()[usize::try_from(index).expect("an index of 32 bits fits")];
                assert!(offset.is_multiple_of(PAGE) && offset + segment.length <= pack, "it lies in its pack");
            }
        }
    }
    let statistics = table.statistics();
    assert!(statistics.zero <= statistics.memory && statistics.shared <= statistics.memory);
    assert_eq!(statistics.stored, table.packs().iter().sum::<u64>());
    let merged = table.clone().merge(SegmentTable::default()).expect("nothing is added");
    assert_eq!(merged.statistics(), statistics, "joined segments amount to the same");
    assert!(SegmentTable::parse(&merged.encode()).is_ok_and(|again| again == merged));
    let has_memory = table.processes().iter().any(|process| !process.segments.is_empty());
    assert!(table.clone().merge(table).is_err() == has_memory, "memory is there twice");
}
