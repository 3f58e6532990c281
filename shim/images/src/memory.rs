//! Memory in a directory of images: parts suitable for another place, and images without such
//! parts.
//!
//! CRIU reads memory back with one thread for each process. Memory taken out of the images still
//! exists after the restore, empty. Any number of threads can fill such memory by
//! process_vm_writev, while the processes are stopped. This holds for **plain** memory only:
//! private, anonymous, writable, neither a growing stack nor hugetlbfs. Everything else stays in
//! the images:
//!
//! - memory without write permission, since process_vm_writev respects a mapping's protection;
//! - pages with a thread's `struct rseq`: the kernel writes there when a restored thread goes on,
//!   and a newer kernel does not repeat a write assumed done;
//! - pages in a parent image, and pages left to a lazy restore.
//!
//! No other memory of a process is read or written between the restore and the fill, as long as the
//! process is stopped. CRIU's restorer has a stack, code and the last signal frame in separate
//! mappings (criu/pie/restorer.c). The kernel follows the addresses of robust lists and of
//! `clear_child_tid` only at a thread's end, and writes frames of pending signals only when the
//! thread runs.

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

/// Largest core, in bytes. A core has some 4 KiB, more with many timers.
const MAX_CORE: u32 = 16 << 20;

/// A contiguous piece of a process's memory in the images.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// The process, by its number in the dumped tree's pid namespace.
    pub pid: ContainerPid,
    /// Start address in the process's memory.
    pub address: u64,
    /// Length in bytes; whole pages.
    pub length: u64,
    /// File with the contents.
    pub file: Arc<Path>,
    /// Offset in the file, in bytes.
    pub offset: u64,
}

/// Treatment of pages shared by a parent and its child, if CRIU restores the mapping as an
/// inherited one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inherited {
    /// Leave such pages in the images: one page serves both after a restore, as before. All
    /// inherited memory is read to find them, by as many threads as the machine has processors.
    Leave,
    /// Put such pages into the runs of both. Once filled, each process has its own copy: the tree
    /// needs more memory than before.
    Take,
}

/// Returns all runs of at least `least` bytes suitable for a fill after the restore, in the order
/// of the tree's processes, ascending in each.
///
/// # Errors
/// Fails if the images cannot be read or are damaged.
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

/// Returns all memory of a process in the images between two addresses, in whatever mappings. For a
/// future [`crate::Staging`] range: the pages written since the files were mapped there.
///
/// # Errors
/// Fails if the images cannot be read or are damaged.
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

/// Returns the ranges in ascending order, merged if they touch.
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

/// Returns the rest of an extent without `holes`, already merged.
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

/// Returns the mappings of plain memory that CRIU restores as inherited (`check_cow_vmas` in
/// criu/mem.c).
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

/// Returns the pages with a `struct rseq` of the process's threads.
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
