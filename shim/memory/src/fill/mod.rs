//! Packs into memory.

mod prefetch;
mod source;

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use proc::{ContainerPid, HostPid, ProcessIds};

use crate::buffer::{Buffer, SIZE};
use crate::control::Control;
use crate::error::FillError;
use crate::pack::{CHUNK, CHUNK_BYTES, Pack};
use crate::remote::Remote;
use crate::table::{Place, Process, Segment, SegmentTable};
use crate::units;
pub use prefetch::prefetch;
use source::Source;

/// Memory is handed out by addresses that are multiples of this: no two threads fault in the same huge page.
const PORTION: u64 = 2 << 20;

/// Threads when packs have to come from a disk: it gives its full rate only to several requests at a time, and a
/// thread that waits for one needs no processor.
const DISK_THREADS: NonZeroUsize = NonZeroUsize::new(16).expect("16 is not 0");

/// Whose memory is filled, and who hears of it.
pub struct Destination<'a> {
    /// Processes of the table, each once, in the order in which they are wanted. All of the table must be here; others
    /// are passed over.
    pub processes: &'a [ProcessIds],
    /// Called with a process' pid in the table when all its memory is in place; from any thread, which does nothing else
    /// meanwhile.
    pub ready: &'a (dyn Fn(ContainerPid) + Sync),
}

/// What is left of a process.
struct Progress {
    /// In the table.
    pid: ContainerPid,
    /// On this host; none if nothing of it is filled.
    host: Option<Arc<Remote>>,
    /// Bytes that are not in place yet.
    left: AtomicU64,
}

/// A stored segment, which is handed out in portions.
struct Stored {
    process: usize,
    address: u64,
    length: u64,
    pack: usize,
    offset: u64,
    /// How many portions those before it have.
    before: usize,
}

/// A part of a segment.
struct Portion {
    process: usize,
    address: u64,
    length: u64,
    pack: usize,
    offset: u64,
}

/// All portions, in order. They are not listed: a table that says that all memory is the same pack has too many.
#[derive(Default)]
struct Plan {
    stored: Vec<Stored>,
    portions: usize,
}

/// Writes all memory of a table into processes whose memory is mapped and still all zero, and which stand still. Every
/// chunk is checked before any of it is written.
///
/// What the page cache has comes from there; what it has not is read past it, where the disk can do that.
///
/// # Errors
/// When packs are not those of the table or are damaged, a process of the table is not given, has ended or does not have
/// the memory, or it is cancelled.
pub fn fill(table: &SegmentTable, packs: &[Pack], into: &Destination<'_>, control: &Control) -> Result<(), FillError> {
    check_packs(table, packs)?;
    let sources: Vec<Source<'_>> = packs.iter().map(Source::new).collect();
    let (progress, plan) = plan(table, into.processes)?;
    for progress in &progress {
        progress.landed(0, into.ready);
    }
    let cached = sources.iter().all(Source::begins_in_cache);
    let threads = if cached { control.threads() } else { control.threads().max(DISK_THREADS) };
    control.each(threads, plan.portions, Buffer::new, |buffer, index| {
        let portion = plan.portion(index);
        let progress = &progress[portion.process];
        if let Some(host) = &progress.host {
            copy(&portion, &sources[portion.pack], host, buffer, control)?;
        }
        progress.landed(portion.length, into.ready);
        Ok(())
    })
}

impl Progress {
    fn landed(&self, bytes: u64, ready: &(dyn Fn(ContainerPid) + Sync)) {
        // What other threads wrote is in place for whoever is told.
        let left = self.left.fetch_sub(bytes, Ordering::AcqRel);
        if left == bytes {
            ready(self.pid);
        }
    }
}

impl Plan {
    /// Adds a segment. Returns how many of its bytes are stored.
    fn add(&mut self, process: usize, segment: &Segment) -> u64 {
        let Place::Pack { index, offset } = segment.place else { return 0 };
        let Segment { address, length, .. } = *segment;
        // A number that is no usize is none of a pack: the table is checked.
        let pack = usize::try_from(index).unwrap_or(usize::MAX);
        self.stored.push(Stored { process, address, length, pack, offset, before: self.portions });
        self.portions += units::bytes((address + length).div_ceil(PORTION) - address / PORTION);
        length
    }

    fn portion(&self, index: usize) -> Portion {
        let stored = &self.stored[self.stored.partition_point(|stored| stored.before <= index) - 1];
        let number = stored.address / PORTION + units::wide(index - stored.before);
        let begin = stored.address.max(number * PORTION);
        let end = (stored.address + stored.length).min((number + 1) * PORTION);
        Portion {
            process: stored.process,
            address: begin,
            length: end - begin,
            pack: stored.pack,
            offset: stored.offset + (begin - stored.address),
        }
    }
}

fn check_packs(table: &SegmentTable, packs: &[Pack]) -> Result<(), FillError> {
    if table.packs().len() != packs.len() {
        return Err(FillError::Packs { expected: table.packs().len(), found: packs.len() });
    }
    for (pack, expected) in packs.iter().zip(table.packs().iter().copied()) {
        let found = pack.data_length();
        if found != expected {
            return Err(FillError::Length { path: pack.path().to_owned(), expected, found });
        }
    }
    Ok(())
}

fn plan(table: &SegmentTable, order: &[ProcessIds]) -> Result<(Vec<Progress>, Plan), FillError> {
    if let Some(Process { pid, .. }) =
        table.processes().iter().find(|process| !order.iter().any(|ids| ids.container == process.pid))
    {
        return Err(FillError::Unknown { pid: *pid });
    }
    let mut plan = Plan::default();
    let mut progress = Vec::new();
    let mut hosts: BTreeMap<HostPid, Arc<Remote>> = BTreeMap::new();
    for ProcessIds { host, container: pid } in order.iter().copied() {
        let left: u64 = table.segments(pid).iter().map(|segment| plan.add(progress.len(), segment)).sum();
        let first = table.segments(pid).first().filter(|_| left > 0);
        let host = match (first, hosts.get(&host)) {
            (None, _) => None,
            (Some(_), Some(opened)) => Some(Arc::clone(opened)),
            (Some(first), None) => {
                let opened = Remote::open(host, first.address).map_err(|error| FillError::process(host, error))?;
                Some(Arc::clone(hosts.entry(host).or_insert(Arc::new(opened))))
            }
        };
        progress.push(Progress { pid, host, left: AtomicU64::new(left) });
    }
    Ok((progress, plan))
}

fn copy(
    portion: &Portion,
    source: &Source<'_>,
    host: &Remote,
    buffer: &mut Buffer,
    control: &Control,
) -> Result<(), FillError> {
    let end = portion.offset + portion.length;
    let mut begin = portion.offset / CHUNK * CHUNK;
    while begin < end {
        control.check()?;
        let pack = source.pack();
        let length = (end - begin).next_multiple_of(CHUNK).min(units::wide(SIZE)).min(pack.data_length() - begin);
        let bytes = &mut buffer[..units::bytes(length)];
        source.read(bytes, begin).map_err(|source| FillError::Read { path: pack.path().to_owned(), source })?;
        if let Some(chunk) = pack.damaged(units::bytes(begin) / CHUNK_BYTES, bytes) {
            return Err(FillError::Corrupt { path: pack.path().to_owned(), pack: portion.pack, chunk });
        }
        let from = portion.offset.max(begin);
        let to = end.min(begin + length);
        let wanted = &bytes[units::bytes(from - begin)..units::bytes(to - begin)];
        host.write(portion.address + (from - portion.offset), wanted)
            .map_err(|error| FillError::process(host.pid(), error))?;
        control.add(to - from);
        begin += length;
    }
    Ok(())
}
