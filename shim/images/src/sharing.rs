//! Pages shared by parent and child.
//!
//! CRIU maps possibly inherited memory once and lets the child be forked with it. Then CRIU
//! compares each page of both and writes different ones; pages of the parent alone are emptied in
//! the child (`restore_priv_vma_content` in criu/mem.c). So any page may be taken out of either's
//! images without harm to the other. But a shared page, filled in each of both, becomes two.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::thread;

use proc::ContainerPid;

use crate::format::{ImageError, damaged};
use crate::pages::{Extent, page_size};
use crate::wire::open;

/// Bytes read at a time, by each thread from each file.
const BLOCK: u64 = 1 << 20;

/// A process's memory in the images.
pub(crate) struct Stored {
    pub(crate) file: PathBuf,
    /// Ascending.
    pub(crate) extents: Vec<Extent>,
}

/// The same addresses of a parent and a child.
struct Pair<'a> {
    pids: [ContainerPid; 2],
    address: u64,
    length: u64,
    /// The files with the contents, and the offsets inside.
    places: [(&'a Path, u64); 2],
}

/// Candidates for shared pages: a child, its parent, and the addresses of a mapping of both.
pub(crate) type InheritedMapping = (ContainerPid, ContainerPid, Range<u64>);

/// Returns the addresses of pages equal in a process and in its parent or a child, by process, in
/// any order.
pub(crate) fn same_pages(
    stored: &BTreeMap<ContainerPid, Stored>,
    inherited: &[InheritedMapping],
) -> Result<BTreeMap<ContainerPid, Vec<Range<u64>>>, ImageError> {
    let pairs = Mutex::new(inherited.iter().flat_map(|inherited| pairs(stored, inherited)));
    let same = Mutex::new(BTreeMap::<ContainerPid, Vec<Range<u64>>>::new());
    let work = || -> Result<(), ImageError> {
        let next = || pairs.lock().ok()?.next();
        while let Some(pair) = next() {
            let ranges = compare(&pair)?;
            if let Ok(mut same) = same.lock() {
                for pid in pair.pids {
                    same.entry(pid).or_default().extend(ranges.iter().cloned());
                }
            }
        }
        Ok(())
    };
    let threads = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        threads.into_iter().try_for_each(|thread| match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })?;
    Ok(same.into_inner().unwrap_or_default())
}

/// Returns the common part of a mapping, in blocks.
fn pairs<'a>(
    stored: &'a BTreeMap<ContainerPid, Stored>,
    inherited: &InheritedMapping,
) -> impl Iterator<Item = Pair<'a>> + use<'a> {
    let (child, parent, Range { start, end }) = inherited.clone();
    let both = stored.get(&child).zip(stored.get(&parent));
    both.into_iter().flat_map(move |(of_child, of_parent)| {
        within(&of_child.extents, start, end).flat_map(move |own| {
            within(&of_parent.extents, own.address, own.end()).flat_map(move |parents| {
                let blocks = (0..parents.length).step_by(usize::try_from(BLOCK).unwrap_or(usize::MAX));
                blocks.filter_map(move |at| {
                    let address = parents.address.saturating_add(at);
                    let parents = parents.within(address, address.saturating_add(BLOCK))?;
                    let own = own.within(parents.address, parents.end())?;
                    let places = [(of_child.file.as_path(), own.offset), (of_parent.file.as_path(), parents.offset)];
                    Some(Pair { pids: [child, parent], address, length: own.length, places })
                })
            })
        })
    })
}

/// Returns the parts of extents between two addresses.
pub(crate) fn within(extents: &[Extent], start: u64, end: u64) -> impl Iterator<Item = Extent> + use<'_> {
    let first = extents.partition_point(|extent| extent.end() <= start);
    extents[first..].iter().map_while(move |extent| extent.within(start, end))
}

fn compare(pair: &Pair<'_>) -> Result<Vec<Range<u64>>, ImageError> {
    let mut blocks = [vec![], vec![]];
    for (block, (path, offset)) in blocks.iter_mut().zip(pair.places) {
        *block = vec![0; usize::try_from(pair.length).unwrap_or(usize::MAX)];
        // Opened each time: the tree may have more processes than the limit on open files.
        open(path)?.read_exact_at(block, offset).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => damaged(path, "it is cut off"),
            _ => ImageError::Read { path: path.to_path_buf(), source: error },
        })?;
    }
    let page = usize::try_from(page_size()).unwrap_or(usize::MAX);
    let mut same: Vec<Range<u64>> = vec![];
    let pages = blocks[0].chunks(page).zip(blocks[1].chunks(page));
    for (start, (own, parents)) in (pair.address..).step_by(page).zip(pages) {
        let end = start.saturating_add(page_size());
        match same.last_mut() {
            _ if own != parents => {}
            Some(last) if last.end == start => last.end = end,
            _ => same.push(start..end),
        }
    }
    Ok(same)
}
