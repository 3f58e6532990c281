//! A folder of CRIU's images, also with memory taken out; CRIU's log.

#![no_main]

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use gpusnap_fuzz::{parts, pieces};
use images::{Changes, Inherited, Run, Staging, Unmarked, check, inspect, present, rewrite, runs};
use libfuzzer_sys::fuzz_target;
use proc::ContainerPid;

/// Names of files, with their leading magic numbers (criu/include/magic.h).
const FILES: [(&str, &[u32]); 14] = [
    ("inventory.img", &[0x5831_3116]),
    ("pstree.img", &[COMMON, 0x5027_3030]),
    ("mm-1.img", MM),
    ("pagemap-1.img", PAGEMAP),
    ("pages-1.img", PAGES),
    ("core-1.img", CORE),
    ("mm-2.img", MM),
    ("pagemap-2.img", PAGEMAP),
    ("pages-2.img", PAGES),
    ("core-2.img", CORE),
    ("stats-dump", &[0x5510_5940, 0x5709_3306]),
    ("pagemap-shmem-1.img", PAGEMAP),
    ("pages-3.img", PAGES),
    ("dump.log", PAGES),
];
const COMMON: u32 = 0x5456_4319;
const MM: &[u32] = &[COMMON, 0x5749_2820];
const PAGEMAP: &[u32] = &[COMMON, 0x5608_4025];
const CORE: &[u32] = &[COMMON, 0x5505_3847];
/// Magic numbers of a file without entries.
const PAGES: &[u32] = &[];
/// Flag of a part used as a file's bytes; other parts are framed here, as no mutation finds lengths
/// and magic numbers.
const AS_IS: u8 = 0x80;
/// Kind of the part with the memory to take out.
const WISHES: u8 = 15;
const MOST_PAGES: usize = 64;

fuzz_target!(|data: &[u8]| {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let mut wishes: &[u8] = &[];
    // Memory is taken out of images with an inventory only.
    let inventory = framed(FILES[0].1, &[2, 0, 8, 2]);
    std::fs::write(folder.path().join(FILES[0].0), inventory).expect("the folder can be written to");
    for (kind, part) in parts(data) {
        match FILES.get(usize::from(kind & 0xf)) {
            Some((name, magic)) => {
                let bytes = if kind & AS_IS != 0 { part.to_vec() } else { framed(magic, part) };
                std::fs::write(folder.path().join(name), bytes).expect("the folder can be written to");
            }
            None if kind & 0xf == WISHES => wishes = part,
            None => {}
        }
    }
    look(folder.path());
    take_out(folder.path(), wishes);
});

fn framed(magic: &[u32], part: &[u8]) -> Vec<u8> {
    if magic.is_empty() {
        // Pages that differ in one byte.
        return part.iter().take(MOST_PAGES).flat_map(|byte| std::iter::repeat_n(*byte, page())).collect();
    }
    let mut bytes: Vec<u8> = magic.iter().flat_map(|word| word.to_le_bytes()).collect();
    for entry in pieces(part) {
        bytes.extend(u32::try_from(entry.len()).expect("a piece is short").to_le_bytes());
        bytes.extend(entry);
    }
    bytes
}

fn look(images: &Path) {
    let checked = check(images);
    if let Ok(image) = inspect(images) {
        assert!((1..=2).contains(&image.version));
        assert!(image.plugins.is_none_or(|plugins| plugins.len() <= 64));
    } else {
        assert!(checked.is_err(), "a check is more than a look");
    }
    drop(criu::explain(&images.join("dump.log")));
    let least = 2 * page() as u64;
    let all = runs(images, least, Inherited::Take);
    if let Ok(all) = &all {
        check_runs(all, least);
        for run in all.iter().filter(|_| checked.is_ok()) {
            let length = std::fs::metadata(&run.file).map_or(0, |metadata| metadata.len());
            assert!(run.offset.checked_add(run.length).is_some_and(|end| end <= length), "its file has it");
        }
    }
    if let Ok(fewer) = runs(images, least, Inherited::Leave) {
        check_runs(&fewer, least);
        let all = all.expect("less is read for all runs");
        let within = |run: &Run| {
            let place = |run: &Run| (run.pid, run.offset.wrapping_sub(run.address));
            all.iter().any(|whole| place(whole) == place(run) && whole.address <= run.address && end(run) <= end(whole))
        };
        assert!(fewer.iter().all(within), "what is left is a part of all");
    }
}

fn check_runs(runs: &[Run], least: u64) {
    let mut reached = BTreeMap::<ContainerPid, u64>::new();
    for run in runs {
        let reached = reached.entry(run.pid).or_default();
        assert!(run.address >= *reached, "memory is there once");
        assert!(run.length >= least && run.length.is_multiple_of(page() as u64), "{run:?}");
        *reached = end(run);
    }
}

fn one() -> ContainerPid {
    ContainerPid::new(1).expect("a pid")
}

fn end(run: &Run) -> u64 {
    run.address.checked_add(run.length).expect("a run ends in memory")
}

/// Takes out runs of process 1, one for each bit of the first wishes, and stages the range of the
/// others.
fn take_out(images: &Path, wishes: &[u8]) {
    let Some((bits, staging)) = wishes.split_first() else { return };
    let Ok(runs) = runs(images, 1, Inherited::Take) else { return };
    let own = runs.iter().filter(|run| run.pid == one());
    let chosen = own.enumerate().filter(|(index, _)| bits & 1 << (index % 8) != 0);
    let without: Vec<Range<u64>> = chosen.map(|(_, run)| run.address..end(run)).collect();
    let staging: Vec<Staging> = staging
        .as_chunks::<2>()
        .0
        .iter()
        .map(|[from, to]| Staging {
            range: u64::from(*from) * page() as u64..u64::from(*to) * page() as u64,
            huge: true,
        })
        .collect();
    let gone: Vec<Range<u64>> = without.iter().cloned().chain(staging.iter().map(|of| of.range.clone())).collect();
    let was_whole = check(images).is_ok();
    let before = contents(images);
    if rewrite(images, &[Changes { pid: one(), without, staging }]).is_err() {
        return;
    }
    assert!(!was_whole || check(images).is_ok(), "images stay whole");
    if !gone.is_empty() {
        assert!(inspect(images).is_ok_and(|image| image.is_cut()), "CRIU refuses them");
        let unmarked = Unmarked::of(images, images).expect("its files can be read");
        assert!(inspect(unmarked.path()).is_ok_and(|image| !image.is_cut()), "CRIU takes them");
    }
    let after = contents(images);
    let is_gone = |address: u64| gone.iter().any(|range| range.contains(&address));
    let expected: BTreeMap<u64, u8> = before.into_iter().filter(|(address, _)| !is_gone(*address)).collect();
    assert_eq!(after, expected, "what is not taken out stays as it was");
}

/// The first byte of each page of process 1, up to the last page in the file.
fn contents(images: &Path) -> BTreeMap<u64, u8> {
    let mut contents = BTreeMap::new();
    for run in present(images, one(), 0..u64::MAX).unwrap_or_default() {
        let Ok(file) = std::fs::File::open(&run.file) else { continue };
        let length = file.metadata().map_or(0, |metadata| metadata.len());
        for at in (0..run.length).step_by(page()).take_while(|at| run.offset + at + page() as u64 <= length) {
            let mut byte = [0];
            file.read_exact_at(&mut byte, run.offset + at).expect("the file is long enough");
            contents.insert(run.address + at, byte[0]);
        }
    }
    contents
}

fn page() -> usize {
    rustix::param::page_size()
}
