//! The target's memory: the contents of every page are known, for verification by the target.

use std::fs::File;
use std::io::Write;
use std::os::unix::process::parent_id;
use std::time::Duration;

use crate::sys::{Memory, fork};
use crate::target::{open, write_count};

const MIB: usize = 1 << 20;
const PAGE: usize = 4096;

/// Memory with expected contents: a number per page, repeated in all words, 0 for an empty page.
pub(crate) struct Pages {
    memory: Memory,
    expected: Vec<u64>,
}

impl Pages {
    fn new(length: usize) -> Self {
        Self { memory: Memory::new(length), expected: vec![0; length / PAGE] }
    }

    /// Writes to a part, with contents unique to the `salt`.
    fn write(&mut self, offset: usize, length: usize, salt: u64) {
        let pages = offset / PAGE..(offset + length) / PAGE;
        for page in pages {
            let value = value(page, salt);
            self.expected[page] = value;
            self.memory.words()[page * (PAGE / 8)..][..PAGE / 8].fill(value);
        }
    }

    fn forget(&mut self, offset: usize, length: usize) {
        self.memory.forget(offset, length);
        self.expected[offset / PAGE..(offset + length) / PAGE].fill(0);
    }

    /// Panics on a wrong page, which ends the process.
    pub(crate) fn verify(&mut self) {
        for (page, (words, expected)) in self.memory.words().chunks_exact(PAGE / 8).zip(&self.expected).enumerate() {
            assert_eq!(words, [*expected; PAGE / 8], "page {page}");
        }
    }

    /// Verifies while the parent runs, and counts.
    // A forked child must not clean up its parent's things.
    #[allow(clippy::disallowed_methods)]
    fn watch(&mut self, count: &File) -> ! {
        let parent = parent_id();
        for number in (0_u64..).take_while(|_| parent_id() == parent) {
            self.verify();
            write_count(count, number);
            std::thread::sleep(Duration::from_millis(5));
        }
        std::process::exit(0)
    }
}

fn value(page: usize, salt: u64) -> u64 {
    u64::try_from(page + 1).unwrap().wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ salt
}

/// Makes a family: a process, its child and the child's child share 64 MiB. Each has written to
/// parts, and emptied others.
pub(crate) fn family(named: &dyn Fn(&str) -> String) -> Pages {
    let mut pages = Pages::new(64 * MIB);
    pages.write(0, 64 * MIB, 0);
    let (child, grandchild) = (open(&named("child")), open(&named("grandchild")));
    if fork() {
        // A large part, and the first page.
        pages.write(8 * MIB, 8 * MIB, 1);
        pages.write(0, PAGE, 1);
        // Emptied in the child, kept in the parent.
        pages.forget(16 * MIB, 4 * MIB);
        // A small part in the child, the whole in the parent.
        pages.forget(24 * MIB, 4 * MIB);
        pages.write(25 * MIB, 32 * PAGE, 1);
        if fork() {
            pages.write(12 * MIB, 8 * MIB, 2);
            pages.forget(48 * MIB, 2 * MIB);
            pages.watch(&grandchild);
        }
        pages.write(50 * MIB, 2 * MIB, 3);
        pages.watch(&child);
    }
    // Emptied in the parent, kept in the child.
    pages.forget(32 * MIB, 4 * MIB);
    // A small part in the parent, the whole in the child.
    pages.forget(40 * MIB, 4 * MIB);
    pages.write(41 * MIB, 32 * PAGE, 4);
    pages.write(56 * MIB, 4 * MIB, 4);
    pages
}

/// Starts a thread with much on its stack. The end of the process ends the thread.
pub(crate) fn deep_thread(named: &dyn Fn(&str) -> String) {
    let place = named("deep");
    let deep = move || {
        let stack = std::hint::black_box([7_u8; 2 * MIB]);
        std::fs::write(place, format!("{}\n", stack.as_ptr().addr())).unwrap();
        loop {
            if !std::hint::black_box(&stack).iter().all(|byte| *byte == 7) {
                std::process::abort();
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    std::thread::Builder::new().stack_size(16 * MIB).spawn(deep).unwrap();
}

/// Makes 16 MiB, of which 12 are a file's and 4 empty, with a few pages written since.
pub(crate) fn staging(named: &dyn Fn(&str) -> String) -> Pages {
    let mut pages = Pages::new(16 * MIB);
    pages.write(0, 8 * MIB, 5);
    pages.write(12 * MIB, 4 * MIB, 5);
    let name = named("packs") + "/pack";
    for part in [0..8 * MIB, 12 * MIB..16 * MIB] {
        let words = &pages.memory.words()[part.start / 8..part.end / 8];
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        File::options().create(true).append(true).open(&name).unwrap().write_all(&bytes).unwrap();
    }
    let pack = File::open(name).unwrap();
    pages.memory.map(0, 8 * MIB, Some((&pack, 0)));
    pages.memory.map(8 * MIB, 4 * MIB, None);
    pages.memory.map(12 * MIB, 4 * MIB, Some((&pack, 8 << 20)));
    pages.write(MIB, PAGE, 6);
    pages.write(10 * MIB, 3 * PAGE, 6);
    let range = format!("{} {}", pages.memory.address(), 16 * MIB);
    std::fs::write(named("range"), range).unwrap();
    pages
}
