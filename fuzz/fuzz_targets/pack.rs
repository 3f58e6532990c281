//! A pack of bulk memory: its frame, and the verification of its chunks.

#![no_main]

use std::fs::File;
use std::io::Write as _;
use std::num::NonZeroUsize;

use gpusnap_fuzz::checksum;
use libfuzzer_sys::fuzz_target;
use memory::{CHUNK, Control, MAX_PACK_DATA, PAGE, Pack, Trailer, verify};

const CHECKSUM: usize = 16;

fuzz_target!(|data: &[u8]| {
    check(data);
    // No mutation finds a checksum, and a forger computes it: first the checksum of the checksums,
    // then those of the chunks too.
    let mut bytes = data.to_vec();
    if let Some(split) = split(data) {
        forge_table(&mut bytes, split);
        check(&bytes);
        let trailer = bytes.len() - Trailer::BYTES;
        let (memory, table) = bytes[..trailer].split_at_mut(split);
        for (chunk, place) in memory.chunks(chunk()).zip(table.chunks_exact_mut(CHECKSUM)) {
            place.copy_from_slice(&checksum(chunk));
        }
        forge_table(&mut bytes, split);
        check(&bytes);
    }
});

/// Begin of the checksums, according to the trailer.
fn split(data: &[u8]) -> Option<usize> {
    let (rest, trailer) = data.split_last_chunk::<{ Trailer::BYTES }>()?;
    let data = usize::try_from(u64::from_le_bytes(*trailer[16..].first_chunk()?)).ok()?;
    (data <= rest.len()).then_some(data)
}

fn forge_table(bytes: &mut [u8], split: usize) {
    let trailer = bytes.len() - Trailer::BYTES;
    let table = checksum(&bytes[split..trailer]);
    bytes[trailer + 32..trailer + 48].copy_from_slice(&table);
}

fn check(bytes: &[u8]) {
    let Ok(pack) = open(bytes) else { return };
    let (length, data) = (bytes.len() as u64, pack.data_length());
    assert!((PAGE..=MAX_PACK_DATA).contains(&data) && data.is_multiple_of(PAGE));
    assert_eq!(length, data + data.div_ceil(CHUNK) * CHECKSUM as u64 + Trailer::BYTES as u64);
    let (memory, rest) = bytes.split_at(usize::try_from(data).expect("it is shorter than the input"));
    let whole = memory.chunks(chunk()).zip(rest.chunks(CHECKSUM)).all(|(chunk, sum)| checksum(chunk) == sum);
    assert_eq!(is_good(pack), whole, "verification is right");
    if whole {
        // At another place with each input.
        let at = usize::from_le_bytes(*checksum(bytes).first_chunk().expect("8 of 16 bytes")) % bytes.len();
        let mut flipped = bytes.to_vec();
        flipped[at] ^= 1 << (at % 8);
        assert!(!open(&flipped).is_ok_and(is_good), "a bit that is flipped is found");
    }
}

fn open(bytes: &[u8]) -> Result<Pack, memory::PackError> {
    let file = rustix::fs::memfd_create("pack", rustix::fs::MemfdFlags::CLOEXEC).expect("the kernel has memfd");
    let mut file = File::from(file);
    file.write_all(bytes).expect("memory can be written");
    Pack::from_file("pack".into(), file)
}

fn is_good(pack: Pack) -> bool {
    verify(&[pack], &Control::with_threads(NonZeroUsize::MIN)).is_ok()
}

fn chunk() -> usize {
    usize::try_from(CHUNK).expect("64 KiB fit")
}
