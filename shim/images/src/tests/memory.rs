//! Memory in images, on images of a few pages.

// An array with one range of pages is intended.
#![allow(clippy::single_range_in_vec_init)]

use std::ops::Range;
use std::path::Path;

use tempfile::TempDir;

use proc::ContainerPid;

use crate::tests::formats::{file, write_image};
use crate::wire::{Value, fields, first_entry, put_message, put_number};
use crate::{Changes, ImageError, Inherited, Run, Staging, check_pages, present, rewrite, runs};

const COMMON: u32 = 0x5456_4319;
const PSTREE: [u32; 2] = [COMMON, 0x5027_3030];
const PAGEMAP: [u32; 2] = [COMMON, 0x5608_4025];
const MM: [u32; 2] = [COMMON, 0x5749_2820];
const CORE: [u32; 2] = [COMMON, 0x5505_3847];
const PAGE: u64 = 4096;

const READ: u64 = 1;
const READ_WRITE: u64 = 3;
/// MAP_PRIVATE | MAP_ANONYMOUS.
const ANONYMOUS: u64 = 0x22;
const FILE: u64 = 0x02;
/// CRIU's marks: regular, with private anonymous memory or a private file.
const PLAIN: u64 = 0x201;
const PRIVATE_FILE: u64 = 0x41;
/// PE_PARENT, PE_LAZY, PE_PRESENT.
const IN_PARENT: u64 = 1;
const LAZY: u64 = 2;
const PRESENT: u64 = 4;

fn container(pid: i32) -> ContainerPid {
    ContainerPid::new(pid).unwrap()
}

/// Returns a message of numbers, and of an unknown field.
fn numbers(numbers: &[(u32, u64)]) -> Vec<u8> {
    let mut message = vec![];
    for (number, value) in numbers {
        put_number(&mut message, *number, *value);
    }
    put_message(&mut message, 99, b"unknown");
    message
}

/// A mapping of pages: protection, flags, status.
type Mapping = (Range<u64>, u64, u64, u64);

fn mapping((pages, protection, flags, status): &Mapping) -> Vec<u8> {
    let (start, end) = (pages.start * PAGE, pages.end * PAGE);
    numbers(&[(1, start), (2, end), (3, 0), (4, 7), (5, *protection), (6, *flags), (7, *status), (8, 1)])
}

struct Images(TempDir);

impl Images {
    /// Makes images of processes, with parents and threads.
    fn new(processes: &[(u64, u64, &[u64])]) -> Self {
        let images = Self(TempDir::new().unwrap());
        write_image(images.path());
        let entries: Vec<Vec<u8>> = processes
            .iter()
            .map(|(pid, parent, threads)| {
                let threads = threads.iter().map(|thread| (5, *thread));
                numbers(&[(1, *pid), (2, *parent)].into_iter().chain(threads).collect::<Vec<_>>())
            })
            .collect();
        images.write("pstree.img", &PSTREE, &entries);
        images
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn write(&self, name: &str, magic: &[u32], entries: &[Vec<u8>]) {
        file(&self.path().join(name), magic, &entries.iter().map(Vec::as_slice).collect::<Vec<_>>());
    }

    /// Adds a process's mappings, and its entries of pages with flags. Each page holds the low byte
    /// of its page number.
    fn process(&self, pid: u64, mappings: &[Mapping], entries: &[(Range<u64>, u64)]) {
        let mut mm = numbers(&[(1, 5), (12, 6)]);
        for found in mappings {
            put_message(&mut mm, 14, &mapping(found));
        }
        put_number(&mut mm, 15, 1);
        self.write(&format!("mm-{pid}.img"), &MM, &[mm]);
        let head = numbers(&[(1, pid + 100)]);
        let of = |(pages, flags): &(Range<u64>, u64)| {
            numbers(&[(1, pages.start * PAGE), (2, 0), (4, *flags), (5, pages.end - pages.start)])
        };
        let all: Vec<Vec<u8>> = std::iter::once(head).chain(entries.iter().map(of)).collect();
        self.write(&format!("pagemap-{pid}.img"), &PAGEMAP, &all);
        let present = entries.iter().filter(|(_, flags)| flags & PRESENT != 0);
        let pages = present.flat_map(|(pages, _)| pages.clone());
        let bytes: Vec<u8> = pages.flat_map(|page| [u8::try_from(page & 0xff).unwrap(); 4096]).collect();
        std::fs::write(self.path().join(format!("pages-{}.img", pid + 100)), bytes).unwrap();
    }

    fn rewrite(&self, without: &[Range<u64>], staging: &[Range<u64>]) -> Result<(), String> {
        let bytes = |pages: &Range<u64>| pages.start * PAGE..pages.end * PAGE;
        let without = without.iter().map(bytes).collect();
        let staging = staging.iter().map(|pages| Staging { range: bytes(pages), huge: true }).collect();
        rewrite(self.path(), &[Changes { pid: container(1), without, staging }]).map_err(|error| error.to_string())
    }

    /// Returns the contents of a message's repeated field.
    fn entries(&self, name: &str, magic: &[u32], number: u32) -> Vec<Vec<u8>> {
        let path = self.path().join(name);
        let mut found = vec![];
        fields(&path, &first_entry(&path, magic, 1 << 20).unwrap(), |field| {
            if let (true, Value::Bytes(bytes)) = (field.number == number, field.value) {
                found.push(bytes.to_vec());
            }
            Ok(())
        })
        .unwrap();
        found
    }

    fn runs(&self, inherited: Inherited) -> Vec<(i32, Range<u64>, u64)> {
        let pages =
            |run: &Run| (run.pid.raw(), run.address / PAGE..(run.address + run.length) / PAGE, run.offset / PAGE);
        runs(self.path(), 4 * PAGE, inherited).unwrap().iter().map(pages).collect()
    }
}

fn core(images: &Images, thread: u64, rseq: Option<(u64, u64)>) {
    let mut thread_core = numbers(&[]);
    if let Some((address, length)) = rseq {
        put_message(&mut thread_core, 15, &numbers(&[(1, address), (2, length), (3, 0)]));
    }
    let mut core = numbers(&[(1, 1)]);
    put_message(&mut core, 5, &thread_core);
    images.write(&format!("core-{thread}.img"), &CORE, &[core]);
}

#[test]
fn runs_are_found_across_entries_and_cut_at_mappings_and_rseq_areas() {
    // Process 3 is a zombie.
    let images = Images::new(&[(1, 0, &[1, 2]), (3, 1, &[3])]);
    core(&images, 1, None);
    core(&images, 2, Some((24 * PAGE - 16, 32)));
    core(&images, 3, None);
    let mappings = [(0..8, READ_WRITE, ANONYMOUS, PLAIN), (8..40, READ_WRITE, ANONYMOUS, PLAIN | 1 << 5)];
    // Two adjacent entries, a parent's and a lazy one, one over the border, one with an rseq area,
    // one too small.
    let entries = [
        (0..2, PRESENT),
        (2..4, PRESENT | LAZY),
        (4..5, IN_PARENT),
        (5..6, LAZY),
        (6..12, PRESENT),
        (16..32, PRESENT),
        (36..39, PRESENT),
    ];
    images.process(1, &mappings, &entries);
    let found = images.runs(Inherited::Leave);
    assert_eq!(found, [(1, 0..4, 0), (1, 8..12, 6), (1, 16..23, 10), (1, 25..32, 19)]);
    let run = &runs(images.path(), PAGE, Inherited::Take).unwrap()[0];
    assert_eq!(run.file.file_name().unwrap(), "pages-101.img");
    let present = present(images.path(), container(1), 10 * PAGE..17 * PAGE).unwrap();
    let pages = |run: &Run| (run.address / PAGE, run.length / PAGE, run.offset / PAGE);
    assert_eq!(present.iter().map(pages).collect::<Vec<_>>(), [(10, 2, 8), (16, 1, 10)]);
}

#[test]
fn a_process_or_a_thread_that_is_there_twice_is_refused() {
    let trees: [&[(u64, u64, &[u64])]; 4] = [
        &[(1, 0, &[1]), (1, 0, &[])],
        &[(1, 0, &[1, 1])],
        &[(1, 0, &[1]), (2, 1, &[1])],
        &[(1, 0, &[1]), (2, 1, &[2])],
    ];
    for (tree, is_good) in trees.into_iter().zip([false, false, false, true]) {
        let images = Images::new(tree);
        core(&images, 1, None);
        core(&images, 2, None);
        images.process(1, &[(0..8, READ_WRITE, ANONYMOUS, PLAIN)], &[(0..8, PRESENT)]);
        let found = runs(images.path(), PAGE, Inherited::Take).map_err(|error| error.to_string());
        match found {
            Ok(found) => assert!(is_good && found.len() == 1, "{tree:?}: {found:?}"),
            Err(error) => assert!(!is_good && error.ends_with("a process is there twice"), "{tree:?}: {error}"),
        }
    }
}

#[test]
fn a_mapping_that_is_not_made_of_pages_is_refused() {
    for (start, end) in [(0, 8 * PAGE - 1), (1, 8 * PAGE)] {
        let images = Images::new(&[(1, 0, &[])]);
        images.process(1, &[], &[(0..8, PRESENT)]);
        let mut mm = vec![];
        put_message(&mut mm, 14, &numbers(&[(1, start), (2, end), (5, READ_WRITE), (6, ANONYMOUS), (7, PLAIN)]));
        images.write("mm-1.img", &MM, &[mm]);
        let error = runs(images.path(), PAGE, Inherited::Take).unwrap_err().to_string();
        assert!(error.ends_with("mm-1.img is damaged: a mapping is not made of pages"), "{error}");
    }
}

#[test]
fn only_plain_writable_memory_has_runs() {
    for (protection, flags, status, has) in [
        (READ_WRITE, ANONYMOUS, PLAIN, true),
        // Locked, without reserve, a program's own stack, the heap.
        (READ_WRITE, ANONYMOUS | 0x2_6000, PLAIN | 1 << 5, true),
        (READ, ANONYMOUS, PLAIN, false),
        (READ_WRITE, FILE, PRIVATE_FILE, false),
        // Growing downwards, hugetlbfs, shared.
        (READ_WRITE, ANONYMOUS | 0x100, PLAIN, false),
        (READ_WRITE, ANONYMOUS | 0x4_0000, PLAIN, false),
        (READ_WRITE, 0x21, 0x101, false),
        // vdso, vvar, System V, AIO ring, memfd, shadow stack, the kernel's.
        (READ_WRITE, ANONYMOUS, PLAIN | 1 << 3, false),
        (READ_WRITE, ANONYMOUS, PLAIN | 1 << 12, false),
        (READ_WRITE, ANONYMOUS, PLAIN | 1 << 10, false),
        (READ_WRITE, ANONYMOUS, 1 << 13, false),
        (READ_WRITE, FILE, PRIVATE_FILE | 1 << 14, false),
        (READ_WRITE, ANONYMOUS, PLAIN | 1 << 15, false),
        (READ_WRITE, ANONYMOUS, PLAIN | 1 << 17, false),
    ] {
        let images = Images::new(&[(1, 0, &[])]);
        images.process(1, &[(0..8, protection, flags, status)], &[(0..8, PRESENT)]);
        assert_eq!(!images.runs(Inherited::Leave).is_empty(), has, "{flags:#x} {status:#x}");
        assert_eq!(images.rewrite(&[0..4], &[]).is_ok(), has, "{flags:#x} {status:#x}");
    }
}

#[test]
fn pages_shared_by_parent_and_child_are_left_on_request() {
    let images = Images::new(&[(1, 0, &[]), (2, 1, &[])]);
    let plain = |pages| (pages, READ_WRITE, ANONYMOUS, PLAIN);
    // The last mapping has another end: to CRIU it is a different one.
    images.process(1, &[plain(0..2048), plain(3000..3020)], &[(0..1000, PRESENT), (3000..3010, PRESENT)]);
    images.process(2, &[plain(0..2048), plain(3000..3021)], &[(500..1500, PRESENT), (3000..3010, PRESENT)]);
    let pages = images.path().join("pages-102.img");
    let mut bytes = std::fs::read(&pages).unwrap();
    bytes[200 * 4096..210 * 4096].fill(255);
    std::fs::write(&pages, bytes).unwrap();
    assert_eq!(
        images.runs(Inherited::Leave),
        [
            (1, 0..500, 0),
            (1, 700..710, 700),
            (1, 3000..3010, 1000),
            (2, 700..710, 200),
            (2, 1000..1500, 500),
            (2, 3000..3010, 1000)
        ]
    );
    assert_eq!(images.runs(Inherited::Take).len(), 4);
    std::fs::write(&pages, b"").unwrap();
    assert!(matches!(runs(images.path(), PAGE, Inherited::Leave), Err(ImageError::Damaged { .. })));
}

#[test]
fn memory_taken_out_is_gone_and_everything_else_is_unchanged() {
    let images = Images::new(&[(1, 0, &[])]);
    let mappings = [(0..32, READ_WRITE, ANONYMOUS, PLAIN)];
    images.process(1, &mappings, &[(0..8, PRESENT), (8..12, PRESENT | LAZY), (12..13, IN_PARENT), (16..24, PRESENT)]);
    let mm = std::fs::read(images.path().join("mm-1.img")).unwrap();
    images.rewrite(&[18..20, 2..4, 6..10, 22..30], &[]).unwrap();
    check_pages(images.path()).unwrap();
    assert_eq!(std::fs::read(images.path().join("mm-1.img")).unwrap(), mm);
    let pages = std::fs::read(images.path().join("pages-102.img")).unwrap();
    let numbers_of: Vec<u8> = pages.chunks(4096).map(|page| page[0]).collect();
    assert_eq!(numbers_of, [0, 1, 4, 5, 10, 11, 16, 17, 20, 21]);
    assert!(!images.path().join("pages-101.img").exists());
    let expected = Images::new(&[(1, 0, &[])]);
    expected.process(
        1,
        &mappings,
        &[
            (0..2, PRESENT),
            (4..6, PRESENT),
            (10..12, PRESENT | LAZY),
            (12..13, IN_PARENT),
            (16..18, PRESENT),
            (20..22, PRESENT),
        ],
    );
    let read = |images: &Images| std::fs::read(images.path().join("pagemap-1.img")).unwrap();
    // Equal except for the number of the file of pages.
    assert_eq!(read(&images)[13], 102);
    let mut rewritten = read(&images);
    rewritten[13] = 101;
    assert_eq!(rewritten, read(&expected));
    let names = std::fs::read_dir(images.path()).unwrap().count();
    assert_eq!(names, 5);
}

#[test]
fn staging_ranges_become_anonymous_and_what_is_around_them_stays() {
    let images = Images::new(&[(1, 0, &[])]);
    let mappings = [
        (0..4, READ, FILE, PRIVATE_FILE),
        (4..10, READ_WRITE, ANONYMOUS, PLAIN),
        (10..16, READ_WRITE, FILE, PRIVATE_FILE),
        (16..30, READ_WRITE, ANONYMOUS, PLAIN),
        (40..44, READ_WRITE, ANONYMOUS, PLAIN),
        (41..42, 0, 0, 1 << 16),
    ];
    images.process(1, &mappings, &[(5..6, PRESENT), (9..11, PRESENT), (19..21, PRESENT)]);
    images.rewrite(&[19..20], &[24..26, 8..18]).unwrap();
    let fresh = |pages: Range<u64>| {
        let mut message = vec![];
        let (start, end) = (pages.start * PAGE, pages.end * PAGE);
        for (number, value) in
            [(1, start), (2, end), (3, 0), (4, 0), (5, 3), (6, 0x22), (7, 0x201), (8, 1), (9, 1 << 14)]
        {
            put_number(&mut message, number, value);
        }
        message
    };
    let old = |pages| mapping(&(pages, READ_WRITE, ANONYMOUS, PLAIN));
    let expected = [
        mapping(&mappings[0]),
        old(4..8),
        fresh(8..18),
        old(18..24),
        fresh(24..26),
        old(26..30),
        mapping(&mappings[4]),
        mapping(&mappings[5]),
    ];
    assert_eq!(images.entries("mm-1.img", &MM, 14), expected);
    assert_eq!(images.entries("mm-1.img", &MM, 99), [b"unknown"]);
    let pages = std::fs::read(images.path().join("pages-102.img")).unwrap();
    assert_eq!(pages.chunks(4096).map(|page| page[0]).collect::<Vec<_>>(), [5, 20]);
    check_pages(images.path()).unwrap();
}

#[test]
fn ranges_that_do_not_fit_are_refused() {
    let mappings = [
        (0..8, READ_WRITE, ANONYMOUS, PLAIN),
        (8..16, READ_WRITE, FILE, PRIVATE_FILE),
        (16..20, READ, FILE, PRIVATE_FILE),
        (24..32, READ_WRITE, ANONYMOUS, PLAIN),
        (32..40, READ_WRITE, ANONYMOUS, PLAIN),
        (33..34, 0, 0, 1 << 16),
    ];
    let memory = "is not plain writable memory";
    let private = "is not private memory, readable and writable";
    for (without, staging, said) in [
        (&[0..9][..], &[][..], memory),
        (&[20..21], &[], memory),
        (&[30..34], &[], memory),
        (&[2..4, 3..5], &[], "is named twice"),
        (&[2..4], &[0..8], "is named twice"),
        (&[4..4], &[], "is not made of pages"),
        // A part of a file's mapping, a gap, read-only memory, guards.
        (&[], &[4..12], private),
        (&[], &[0..28], private),
        (&[], &[8..20], private),
        (&[], &[32..40], private),
        (&[26..28], &[], "is not all in these images"),
        (&[0..8], &[24..26], "nothing would be left in it"),
    ] {
        let images = Images::new(&[(1, 0, &[])]);
        let entries = match said {
            "nothing would be left in it" => vec![(2..6, PRESENT)],
            _ => vec![(2..6, PRESENT), (24..28, IN_PARENT)],
        };
        images.process(1, &mappings, &entries);
        let error = images.rewrite(without, staging).unwrap_err();
        assert!(error.contains(said), "{without:?} {staging:?}: {error}");
    }
    let images = Images::new(&[(1, 0, &[])]);
    images.process(1, &mappings, &[(2..6, PRESENT)]);
    let range = 1..PAGE;
    let changes = Changes { pid: container(1), without: vec![range], staging: vec![] };
    assert!(rewrite(images.path(), &[changes]).unwrap_err().to_string().contains("0x1-0x1000 is not made of pages"));
}

#[test]
fn damaged_memory_is_told() {
    let mappings = [(0..40, READ_WRITE, ANONYMOUS, PLAIN)];
    let said = |entries: &[(Range<u64>, u64)], damage: &dyn Fn(&Path)| {
        let images = Images::new(&[(1, 0, &[])]);
        images.process(1, &mappings, entries);
        damage(images.path());
        let error = images.rewrite(&[4..8], &[]).unwrap_err();
        let found = runs(images.path(), PAGE, Inherited::Take);
        (error, found.map_err(|error| error.to_string()))
    };
    let (error, found) = said(&[(8..16, PRESENT), (2..4, PRESENT)], &|_| {});
    assert!(error.ends_with("its entries are not in order"), "{error}");
    assert_eq!(found.unwrap_err(), error);
    let cut = |images: &Path| std::fs::write(images.join("pages-101.img"), b"x").unwrap();
    let (error, _) = said(&[(0..16, PRESENT)], &cut);
    assert!(error.ends_with("pages-101.img is damaged: it is cut off"), "{error}");
    let link = |images: &Path| {
        std::fs::remove_file(images.join("pages-101.img")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", images.join("pages-101.img")).unwrap();
    };
    let (error, _) = said(&[(0..16, PRESENT)], &link);
    assert!(error.starts_with("cannot read "), "{error}");
    let twice = |images: &Path| {
        std::fs::copy(images.join("pagemap-1.img"), images.join("pagemap-shmem-9.img")).unwrap();
    };
    let (error, _) = said(&[(0..16, PRESENT)], &twice);
    assert!(error.ends_with("another pagemap has the same file of pages"), "{error}");
    let endless = |pages| {
        move |images: &Path| {
            let entry = numbers(&[(1, 0), (2, 0), (4, PRESENT), (5, pages)]);
            file(&images.join("pagemap-1.img"), &PAGEMAP, &[&numbers(&[(1, 101)]), &entry]);
        }
    };
    let (error, _) = said(&[], &endless(1 << 40));
    assert!(error.ends_with("pages-101.img is damaged: it is cut off"), "{error}");
    let (error, found) = said(&[], &endless(u64::MAX));
    assert!(error.ends_with("an entry is beyond all memory"), "{error}");
    assert_eq!(found.unwrap_err(), error);
}
