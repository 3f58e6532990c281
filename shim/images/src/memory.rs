//! Memory in a directory of images: what of it can be kept elsewhere, and images without it.
//!
//! CRIU reads memory back with one thread for each process. Memory that is taken out of the images is there all the
//! same after the restore, empty, and can be filled by process_vm_writev by as many threads as one likes, while the
//! processes are stopped. That holds for **plain** memory only: private, anonymous, writable, neither a stack that grows nor
//! hugetlbfs. Everything else stays in the images:
//!
//! - what is not writable, since process_vm_writev respects a mapping's protection;
//! - pages that hold a thread's `struct rseq`: the kernel writes to it whenever it lets a restored thread go on, and a
//!   newer kernel does not write again what it takes to be there;
//! - pages in a parent image, and pages left to a lazy restore.
//!
//! Nothing else of a process's memory is read or written between its restore and the fill, as long as it is stopped in the
//! meantime: CRIU's restorer has its stack, its code and the signal frame from which it returns in mappings of its own
//! (criu/pie/restorer.c), robust lists and the `clear_child_tid` of threads are addresses that the kernel follows when a
//! thread ends, and frames of signals that were pending are written when it runs.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use proc::ContainerPid;

use crate::format::{COMMON_MAGIC, CORE_MAGIC, ImageError};
use crate::pages::{Extent, Pagemap, page_size, pagemap_path, pages_path};
use crate::sharing::{InheritedMapping, Stored, same_pages, within};
use crate::tree::{Process, core_path, processes};
use crate::vma::{Vma, mm_path, read_mm, vmas};
use crate::wire::{Field, Value, fields, first_entry};

/// A core is some 4 KiB, and longer where timers are many.
const MAX_CORE: u32 = 16 << 20;

/// Memory of a process that is in the images, one piece of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// The process, by its number in the dumped tree's pid namespace.
    pub pid: ContainerPid,
    /// Where it starts in the process's memory.
    pub address: u64,
    /// In bytes; whole pages.
    pub length: u64,
    /// The file that has it.
    pub file: Arc<Path>,
    /// Where it starts in the file, in bytes.
    pub offset: u64,
}

/// What becomes of pages that are the same in a parent and its child, where CRIU restores the mapping as an inherited one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inherited {
    /// They stay in the images, so that there is one page for both after a restore as there was before. All inherited memory
    /// is read for that, by as many threads as the machine has processors.
    Leave,
    /// They are in the runs of both. Once filled, each process has a page of its own: the tree needs more memory than before.
    Take,
}

/// All runs of at least `least` bytes that can be taken out of the images and filled after the restore. In the order of the
/// tree's processes, ascending in each.
///
/// # Errors
/// When the images cannot be read or are damaged.
pub fn runs(images: &Path, least: u64, inherited: Inherited) -> Result<Vec<Run>, ImageError> {
    let processes = processes(images)?;
    let (mut mms, mut stored) = (BTreeMap::new(), BTreeMap::new());
    for process in &processes {
        let path = mm_path(images, process.pid);
        match read_mm(&path) {
            Ok(mm) => mms.insert(process.pid, (path, mm)),
            // A zombie has no memory.
            Err(ImageError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        stored.insert(process.pid, read_pagemap(images, process.pid)?);
    }
    let mut mappings = BTreeMap::new();
    for (pid, (path, mm)) in &mms {
        mappings.insert(*pid, vmas(path, mm)?);
    }
    let same = match inherited {
        Inherited::Leave => same_pages(&stored, &inherited_mappings(&processes, &mappings))?,
        Inherited::Take => BTreeMap::new(),
    };
    let mut runs = vec![];
    for process in &processes {
        let (Some(vmas), Some(stored)) = (mappings.get(&process.pid), stored.get(&process.pid)) else { continue };
        let mut holes = same.get(&process.pid).cloned().unwrap_or_default();
        holes.extend(rseq_pages(images, process)?);
        let holes = merged(holes);
        let file: Arc<Path> = stored.file.as_path().into();
        for vma in vmas.iter().filter(|vma| vma.is_plain() && vma.is_writable()) {
            for extent in within(&stored.extents, vma.start, vma.end) {
                let pieces = without(extent, &holes).into_iter().filter(|piece| piece.length >= least);
                runs.extend(pieces.map(|piece| run(process.pid, piece, &file)));
            }
        }
    }
    Ok(runs)
}

/// All memory of a process that is in the images between two addresses, whatever mappings it is in. For a range that is to
/// become [`crate::Staging`] these are the pages that were written to since the files were mapped there.
///
/// # Errors
/// When the images cannot be read or are damaged.
pub fn present(images: &Path, pid: ContainerPid, range: Range<u64>) -> Result<Vec<Run>, ImageError> {
    let stored = read_pagemap(images, pid)?;
    let file: Arc<Path> = stored.file.as_path().into();
    Ok(within(&stored.extents, range.start, range.end).map(|extent| run(pid, extent, &file)).collect())
}

fn run(pid: ContainerPid, extent: Extent, file: &Arc<Path>) -> Run {
    let Extent { address, length, offset } = extent;
    Run { pid, address, length, file: Arc::clone(file), offset }
}

fn read_pagemap(images: &Path, pid: ContainerPid) -> Result<Stored, ImageError> {
    let path = pagemap_path(images, pid);
    let pagemap = Pagemap::open(&path)?;
    Ok(Stored { file: pages_path(images, pagemap.pages_id), extents: pagemap.extents()? })
}

/// Ranges in ascending order, none of which touch.
fn merged(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_by_key(|range| range.start);
    ranges.dedup_by(|next, range| {
        let touch = next.start <= range.end;
        if touch {
            range.end = range.end.max(next.end);
        }
        touch
    });
    ranges
}

/// What is left of an extent without `holes`, which are merged.
fn without(extent: Extent, holes: &[Range<u64>]) -> Vec<Extent> {
    let mut left = vec![];
    let mut from = extent.address;
    let first = holes.partition_point(|hole| hole.end <= extent.address);
    for hole in holes[first..].iter().take_while(|hole| hole.start < extent.end()) {
        left.extend(extent.within(from, hole.start));
        from = hole.end;
    }
    left.extend(extent.within(from, extent.end()));
    left
}

/// The mappings of plain memory that CRIU restores as inherited (`check_cow_vmas` in criu/mem.c).
fn inherited_mappings(processes: &[Process], mappings: &BTreeMap<ContainerPid, Vec<Vma<'_>>>) -> Vec<InheritedMapping> {
    let mut inherited = vec![];
    for Process { pid, parent, .. } in processes {
        let Some(parent) = parent else { continue };
        let (Some(own), Some(parents)) = (mappings.get(pid), mappings.get(parent)) else { continue };
        let plain = |vma: &&Vma<'_>| vma.is_plain();
        let parents: BTreeMap<u64, u64> = parents.iter().filter(plain).map(|vma| (vma.start, vma.end)).collect();
        let both = own.iter().filter(plain).filter(|vma| parents.get(&vma.start) == Some(&vma.end));
        inherited.extend(both.map(|vma| (*pid, *parent, vma.start..vma.end)));
    }
    inherited
}

/// The pages that hold a `struct rseq` of the process's threads.
fn rseq_pages(images: &Path, process: &Process) -> Result<Vec<Range<u64>>, ImageError> {
    let page = page_size();
    let mut pages = vec![];
    for thread in &process.threads {
        let path = core_path(images, *thread);
        let core = first_entry(&path, &[COMMON_MAGIC, CORE_MAGIC], MAX_CORE)?;
        let (mut address, mut length) = (0_u64, 0_u64);
        // core_entry.thread_core.rseq_entry (images/core.proto, images/rseq.proto).
        inside(&path, &core, 5, &mut |thread_core| {
            inside(&path, thread_core, 15, &mut |rseq| {
                fields(&path, rseq, |Field { number, value, .. }| {
                    match (number, value) {
                        (1, Value::Number(value)) => address = value,
                        (2, Value::Number(value)) => length = value,
                        _ => {}
                    }
                    Ok(())
                })
            })
        })?;
        if length > 0 {
            let start = address - address % page;
            let end = address.saturating_add(length).checked_next_multiple_of(page).unwrap_or(u64::MAX);
            pages.push(start..end);
        }
    }
    Ok(pages)
}

/// Calls `each` for the messages in a message's field.
fn inside(
    path: &Path,
    message: &[u8],
    field: u32,
    each: &mut dyn FnMut(&[u8]) -> Result<(), ImageError>,
) -> Result<(), ImageError> {
    fields(path, message, |found| match found.value {
        Value::Bytes(message) if found.number == field => each(message),
        _ => Ok(()),
    })
}
