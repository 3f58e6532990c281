use super::container;
use crate::{MAX_TABLE, Place, Process, Segment, SegmentTable, Statistics, TableError};

const GOLDEN: &[u8] = include_bytes!("../testdata/segments");

fn zero(address: u64, length: u64) -> Segment {
    Segment { address, length, place: Place::Zero }
}

fn stored(address: u64, length: u64, index: u32, offset: u64) -> Segment {
    Segment { address, length, place: Place::Pack { index, offset } }
}

fn one(segments: Vec<Segment>) -> Result<SegmentTable, TableError> {
    SegmentTable::new(vec![65536], vec![Process { pid: container(1), segments }])
}

fn example() -> SegmentTable {
    let first = vec![stored(0x10000, 65536, 0, 0), zero(0x20000, 65536), stored(0x30000, 4096, 1, 8192)];
    let second = vec![stored(0x10000, 65536, 0, 0), stored(0x5000_0000, 8192, 1, 0)];
    let processes =
        vec![Process { pid: container(7), segments: second }, Process { pid: container(1), segments: first }];
    SegmentTable::new(vec![65536, 12288], processes).unwrap()
}

#[test]
fn a_table_is_read_as_it_was_written() {
    let table = example();
    assert_eq!(SegmentTable::parse(&table.encode()).unwrap(), table);
    let empty = SegmentTable::default();
    assert_eq!(SegmentTable::parse(&empty.encode()).unwrap(), empty);
}

#[test]
fn the_format_does_not_change() {
    let bytes = example().encode();
    assert!(bytes == GOLDEN);
}

#[test]
fn memory_is_found_by_pid() {
    let table = example();
    assert_eq!(table.segments(container(7)).len(), 2);
    assert_eq!(table.segments(container(1)).len(), 3);
    assert_eq!(table.segments(container(2)), &[]);
}

#[test]
fn what_goes_on_is_one_segment() {
    let table = one(vec![
        stored(0x2000, 4096, 0, 4096),
        stored(0x1000, 4096, 0, 0),
        stored(0x3000, 4096, 0, 0),
        zero(0x4000, 4096),
        zero(0x5000, 4096),
        zero(0x7000, 4096),
    ]);
    let expected = [stored(0x1000, 8192, 0, 0), stored(0x3000, 4096, 0, 0), zero(0x4000, 8192), zero(0x7000, 4096)];
    assert_eq!(table.unwrap().segments(container(1)), &expected);
}

#[test]
fn statistics_tell_what_is_shared() {
    let expected = Statistics { memory: 65536 * 3 + 4096 * 3, zero: 65536, shared: 65536, stored: 65536 + 12288 };
    assert_eq!(example().statistics(), expected);
    let overlapping =
        one(vec![stored(0, 16384, 0, 0), stored(0x10000, 8192, 0, 12288), stored(0x20000, 4096, 0, 4096)]);
    assert_eq!(overlapping.unwrap().statistics().shared, 8192);
}

#[test]
fn tables_are_joined() {
    let other = SegmentTable::new(
        vec![4096],
        vec![Process { pid: container(1), segments: vec![stored(0x0, 4096, 0, 0), zero(0x40000, 4096)] }],
    )
    .unwrap();
    let both = example().merge(other.clone()).unwrap();
    assert_eq!(both.packs(), &[65536, 12288, 4096]);
    assert_eq!(both.segments(container(1))[0], stored(0, 4096, 2, 0));
    assert_eq!(both.segments(container(1))[4], zero(0x40000, 4096));
    assert_eq!(both.segments(container(7)), example().segments(container(7)));
    assert!(matches!(both.merge(other), Err(TableError::Segment { pid, address: 0, .. }) if pid == container(1)));
}

#[test]
fn impossible_memory_is_refused() {
    for segments in [
        vec![zero(0x1000, 8192), zero(0x2000, 4096)],
        vec![zero(0x1000, 0)],
        vec![zero(0x1000, 4095)],
        vec![zero(0x1001, 4096)],
        vec![zero(u64::MAX - 4095, 4096)],
        vec![zero(0x1000, u64::MAX - 4095)],
        vec![stored(0x1000, 4096, 1, 0)],
        vec![stored(0x1000, 4096, u32::MAX, 0)],
        vec![stored(0x1000, 4096, 0, 65536)],
        vec![stored(0x1000, 8192, 0, 61440)],
        vec![stored(0x1000, 4096, 0, 1)],
        vec![stored(0x1000, 4096, 0, u64::MAX - 4095)],
    ] {
        let error = one(segments.clone());
        assert!(matches!(error, Err(TableError::Segment { .. })), "{segments:?}: {error:?}");
    }
    for length in [0, 1, 4095, (256 << 20) + 4096] {
        assert_eq!(SegmentTable::new(vec![length], vec![]), Err(TableError::Pack { index: 0, length }));
    }
}

#[test]
fn a_flipped_bit_or_a_missing_end_is_found() {
    for at in 0..GOLDEN.len() {
        let mut bytes = GOLDEN.to_vec();
        bytes[at] ^= 1 << (at % 8);
        assert!(SegmentTable::parse(&bytes).is_err(), "byte {at}");
        assert!(SegmentTable::parse(&GOLDEN[..at]).is_err(), "{at} bytes");
    }
    assert!(SegmentTable::parse(&[GOLDEN, &[0]].concat()).is_err());
}

/// The golden table with some bytes replaced, and a checksum that is right.
fn forged(at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut forged = GOLDEN[..GOLDEN.len() - 16].to_vec();
    forged[at..at + bytes.len()].copy_from_slice(bytes);
    let checksum = crate::checksum::Checksum::of(&forged);
    forged.extend(checksum.to_bytes());
    forged
}

#[test]
fn what_a_forger_says_is_checked() {
    assert_eq!(SegmentTable::parse(&forged(8, &[2])), Err(TableError::Version(2)));
    // Numbers of packs, of processes, of segments: nothing is allocated for them.
    for at in [16, 20, 36] {
        let error = SegmentTable::parse(&forged(at, &[0xff; 4]));
        assert!(matches!(error, Err(TableError::Damaged(_))), "{at}: {error:?}");
    }
    // The first process gets the second one's pid.
    assert_eq!(SegmentTable::parse(&forged(32, &[7])), Err(TableError::Process(7)));
    for pid in [0, -1_i32] {
        assert_eq!(SegmentTable::parse(&forged(32, &pid.to_le_bytes())), Err(TableError::Process(pid)));
    }
    // Its second segment begins in its first.
    let error = SegmentTable::parse(&forged(64, &0x1f000_u64.to_le_bytes()));
    assert!(
        matches!(error, Err(TableError::Segment { pid, address: 0x1f000, .. }) if pid == container(1)),
        "{error:?}"
    );
    let large = vec![0; usize::try_from(MAX_TABLE).unwrap() + 1];
    assert_eq!(SegmentTable::parse(&large), Err(TableError::TooLarge(MAX_TABLE + 1)));
}

#[test]
fn whatever_a_forger_says_is_refused_or_as_written() {
    let mut state = 1_u64;
    let mut random = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(state >> 33).unwrap() % below
    };
    let mut accepted = 0;
    for _ in 0..20_000 {
        let bytes = forged(random(GOLDEN.len() - 16), &[[0, 1, 0x7f, 0x80, 0xff, 0x10][random(6)]]);
        if let Ok(table) = SegmentTable::parse(&bytes) {
            assert!(table.encode() == bytes);
            assert!(table.statistics().memory >= table.statistics().zero);
            accepted += 1;
        }
    }
    assert!(accepted > 0);
}

#[test]
fn sums_of_what_a_forger_says_do_not_overflow() {
    let all = |pid| Process { pid: container(pid), segments: vec![zero(0, 1 << 56)] };
    let table = SegmentTable::new(vec![], (1..300).map(all).collect()).unwrap();
    assert_eq!(table.statistics(), Statistics { memory: u64::MAX, zero: u64::MAX, ..Statistics::default() });
}
