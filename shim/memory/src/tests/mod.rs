//! Memory of real processes, and files that were tampered with.

mod fill;
mod pack;
mod save;
mod shared;
#[allow(unsafe_code)]
mod sys;
mod table;

use std::num::NonZeroUsize;
use std::path::Path;

use proc::ContainerPid;

use crate::{CHUNK, Control, Draft, Pack, Regions, SaveError, Saved, save_processes};
use sys::Holder;

/// Bytes that are the same for the same seed, and in which no page is zero.
fn noise(length: u64, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut words = std::iter::from_fn(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        Some(state)
    });
    (0..length / 8).flat_map(|_| words.next().unwrap().to_le_bytes()).collect()
}

fn threads(number: usize) -> Control {
    Control::with_threads(NonZeroUsize::new(number).unwrap())
}

fn draft(folder: &Path) -> Draft {
    Draft { folder: folder.to_owned(), prefix: "pack".into() }
}

fn save(holders: &[&Holder], folder: &Path) -> Result<Saved, SaveError> {
    save_processes(&targets(holders), CHUNK, &draft(folder), &threads(2))
}

/// All memory of processes, which are 1, 2, ... in the table.
fn targets(holders: &[&Holder]) -> Vec<Regions> {
    let target = |(pid, holder): (i32, &&Holder)| Regions { process: holder.ids(pid), ranges: vec![holder.range()] };
    (1..).zip(holders).map(target).collect()
}

fn open(saved: &Saved) -> Vec<Pack> {
    saved.packs.iter().map(|path| Pack::open(path).unwrap()).collect()
}

fn container(pid: i32) -> ContainerPid {
    ContainerPid::new(pid).unwrap()
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}
