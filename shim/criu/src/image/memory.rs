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

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use crate::image::pages::{Extent, Pagemap, page_size, pagemap_path, pages_path};
pub use crate::image::rewrite::{Changes, RewriteError, Staging, rewrite};
use crate::image::vma::{Vma, mm_path, read_mm, vmas};
use crate::image::wire::{Field, MAX_ENTRY, Reader, Value, fields, first_entry};
use crate::image::{COMMON_MAGIC, CORE_MAGIC, ImageError, PSTREE, PSTREE_MAGIC, damaged};

/// `PID_MAX_LIMIT` of Linux.
const MAX_TASKS: usize = 1 << 22;
/// A core is some 4 KiB, and longer where timers are many.
const MAX_CORE: u32 = 16 << 20;

/// Memory of a process that is in the images, one piece of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// The process, by its number in the dumped tree's pid namespace.
    pub pid: i32,
    /// Where it starts in the process's memory.
    pub address: u64,
    /// In bytes; whole pages.
    pub length: u64,
    /// The file that has it.
    pub file: Arc<Path>,
    /// Where it starts in the file, in bytes.
    pub offset: u64,
    /// It is in a mapping that CRIU restores as one that a child has inherited from its parent: pages that are the same in
    /// both are there once. Filled from outside they are there twice.
    pub inherited: bool,
}

struct Process {
    pid: i32,
    parent: i32,
    threads: Vec<u64>,
}

/// All runs of at least `least` bytes that can be taken out of the images and filled after the restore. In the order of the
/// tree's processes, ascending in each.
///
/// # Errors
/// When the images cannot be read or are damaged.
pub fn runs(images: &Path, least: u64) -> Result<Vec<Run>, ImageError> {
    let processes = processes(images)?;
    let mut mms = BTreeMap::new();
    for process in &processes {
        let path = mm_path(images, process.pid);
        match read_mm(&path) {
            Ok(mm) => mms.insert(process.pid, (path, mm)),
            // A zombie has no memory.
            Err(ImageError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
    }
    let mut mappings = BTreeMap::new();
    for (pid, (path, mm)) in &mms {
        mappings.insert(*pid, vmas(path, mm)?);
    }
    let inherited = inherited(&processes, &mappings);
    let mut runs = vec![];
    for process in &processes {
        let Some(vmas) = mappings.get(&process.pid) else { continue };
        let path = pagemap_path(images, process.pid);
        let pagemap = Pagemap::open(&path)?;
        let file: Arc<Path> = pages_path(images, pagemap.pages_id).into();
        let extents = pagemap.extents()?;
        let rseqs = rseq_pages(images, process)?;
        for vma in vmas.iter().filter(|vma| vma.is_plain() && vma.is_writable()) {
            let inherited = inherited.contains(&(process.pid, vma.start));
            for extent in within(&extents, vma.start, vma.end) {
                let pieces = without(extent, &rseqs).filter(|piece| piece.length >= least);
                runs.extend(pieces.map(|piece| Run { inherited, ..run(process.pid, piece, &file) }));
            }
        }
    }
    Ok(runs)
}

/// All memory of a process that is in the images between two addresses, whatever mappings it is in. For a range that is to
/// become [`Staging`] these are the pages that were written to since the files were mapped there.
///
/// # Errors
/// When the images cannot be read or are damaged.
pub fn present(images: &Path, pid: i32, range: Range<u64>) -> Result<Vec<Run>, ImageError> {
    let path = pagemap_path(images, pid);
    let pagemap = Pagemap::open(&path)?;
    let file: Arc<Path> = pages_path(images, pagemap.pages_id).into();
    let extents = pagemap.extents()?;
    Ok(within(&extents, range.start, range.end).map(|extent| run(pid, extent, &file)).collect())
}

fn run(pid: i32, extent: Extent, file: &Arc<Path>) -> Run {
    let Extent { address, length, offset } = extent;
    Run { pid, address, length, file: Arc::clone(file), offset, inherited: false }
}

/// The parts of extents between two addresses.
fn within(extents: &[Extent], start: u64, end: u64) -> impl Iterator<Item = Extent> {
    let first = extents.partition_point(|extent| extent.end() <= start);
    extents[first..].iter().map_while(move |extent| extent.within(start, end))
}

/// What is left of an extent without the pages at `holes`, which ascend.
fn without(extent: Extent, holes: &BTreeSet<u64>) -> impl Iterator<Item = Extent> {
    let page = page_size();
    let holes = holes.range(extent.address..extent.end()).copied();
    let starts = std::iter::once(extent.address).chain(holes.clone().map(move |hole| hole.saturating_add(page)));
    starts.zip(holes.chain([extent.end()])).filter_map(move |(start, end)| extent.within(start, end))
}

fn processes(images: &Path) -> Result<Vec<Process>, ImageError> {
    let path = images.join(PSTREE);
    let mut reader = Reader::open(&path, &[COMMON_MAGIC, PSTREE_MAGIC])?;
    let mut processes = vec![];
    let mut tasks = 0;
    while let Some(entry) = reader.entry(MAX_ENTRY)? {
        let mut process = Process { pid: 0, parent: 0, threads: vec![] };
        let number = |value| i32::try_from(value).map_err(|_| damaged(&path, "a process has an impossible number"));
        fields(&path, &entry, |Field { number: field, value, .. }| {
            match (field, value) {
                (1, Value::Number(value)) => process.pid = number(value)?,
                (2, Value::Number(value)) => process.parent = number(value)?,
                (5, Value::Number(value)) => process.threads.push(value),
                _ => {}
            }
            Ok(())
        })?;
        tasks += 1 + process.threads.len();
        if tasks > MAX_TASKS {
            return Err(damaged(&path, "it has too many processes"));
        }
        processes.push(process);
    }
    Ok(processes)
}

/// The mappings, by process and start, that CRIU restores as inherited, in the child and in the parent.
fn inherited(processes: &[Process], mappings: &BTreeMap<i32, Vec<Vma<'_>>>) -> BTreeSet<(i32, u64)> {
    let mut inherited = BTreeSet::new();
    for process in processes {
        let (Some(own), Some(parents)) = (mappings.get(&process.pid), mappings.get(&process.parent)) else { continue };
        let parents: BTreeMap<u64, &Vma<'_>> = parents.iter().map(|vma| (vma.start, vma)).collect();
        for vma in own {
            if parents.get(&vma.start).is_some_and(|parent| vma.may_be_inherited(parent)) {
                inherited.extend([(process.pid, vma.start), (process.parent, vma.start)]);
            }
        }
    }
    inherited
}

/// The pages that hold a `struct rseq` of the process's threads.
fn rseq_pages(images: &Path, process: &Process) -> Result<BTreeSet<u64>, ImageError> {
    let page = page_size();
    let mut pages = BTreeSet::new();
    for thread in &process.threads {
        let path = images.join(format!("core-{thread}.img"));
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
        if let Some(last) = length.checked_sub(1).and_then(|rest| address.checked_add(rest)) {
            // It is some 32 bytes, aligned to as many: it never spans more than two pages.
            pages.extend([address - address % page, last - last % page]);
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
