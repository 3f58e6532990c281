//! Staging memory of a restored container, in huge pages while the driver reads it already.
//!
//! CRIU leaves staging memory empty. To fill it takes a fourth of the time for which the driver then reads it, with one
//! thread, in order. Neither has to wait for the other:
//!
//! ```text
//!   staging memory   [ file ][ file ][ file ] ...     mapped at once; the driver begins to read, page by page, slowly
//!                       ▲       ▲ mremap, while the driver's threads stand still
//!   elsewhere        [ huge pages, filled by many threads, each chunk checked ]
//! ```
//!
//! At any moment the driver finds what it has saved, and whatever becomes of this process it goes on to. When it has read
//! all, it unmaps the memory, and may map something else there: so its threads stand still for each move, and what is not
//! the mapping any more that was made here is left alone.
//!
//! To be in time is a matter of speed. To be checked is not: [`Backfill::finish`] waits until every chunk was.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::mpsc::{self, Receiver};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use memory::{
    Control, Destination, FillError, Layout, Pack, PackError, Place, Process, ProcessLayout, Segment, SegmentTable,
    TableError, VerifyError,
};
use proc::{ContainerPid, HostPid, Mapping, ProcessIds, Range};

#[cfg(test)]
mod tests;

use crate::remap::{RemapError, map_in_empty};
use tracee::hold::{Hold, HoldError, Scope};
use tracee::inject::{InjectError, Team, argument};

/// Length of the parts of the address space, in bytes, of whole huge pages. A move stays in one part.
const WINDOW: u64 = if cfg!(test) { 1 << 20 } else { 1 << 30 };
/// The size of huge pages, in bytes, as x86-64 and most of arm64 have them.
const HUGE_PAGE: u64 = 2 << 20;
/// A run of pages that is shorter than this, in bytes, is not worth a call, during which the driver waits.
const LEAST_RUN: u64 = if cfg!(test) { 64 << 10 } else { 16 << 20 };
/// The driver's threads are stopped about as often as this.
const BATCHES: u64 = 8;
/// Longest time for the threads to stop. Most wait, and one copies. A thread that does not stop is tried again.
const HALT: Duration = Duration::from_millis(100);
/// Pause between two looks for memory that is ready to be moved.
const LOOK: Duration = Duration::from_millis(5);

/// Environment variable that switches this off, with the value `off`: memory is filled before the driver reads it. Seen with
/// driver 580.159.
const SWITCH: &str = "GPUSNAP_BACKFILL";

/// Why staging memory could not be mapped, or is not what was saved.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BackfillError {
    #[error(transparent)]
    Map(#[from] RemapError),
    #[error("cannot use a file of the snapshot")]
    Pack(#[from] PackError),
    #[error("the snapshot's files are not what they should be")]
    Table(#[from] TableError),
    #[error("cannot fill it")]
    Fill(#[from] FillError),
    #[error("cannot check it")]
    Verify(#[from] VerifyError),
    #[error("cannot look at a file of the snapshot")]
    File(#[source] io::Error),
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
    #[error("the thread that reads the snapshot's memory died")]
    Died,
}

/// Work beside the driver's restore.
#[derive(Debug)]
pub(crate) struct Backfill {
    windows: Vec<Window>,
    /// The threads that make calls, one of each process.
    teams: BTreeMap<HostPid, Team>,
    /// Inodes of the files.
    inodes: BTreeSet<u64>,
    filling: JoinHandle<Result<(), BackfillError>>,
    /// Windows that are filled.
    filled: Receiver<usize>,
    /// Of them those that are not moved yet.
    waiting: Vec<usize>,
    /// Processes whose driver's threads were told to stop and are not all let go.
    stopped: BTreeSet<HostPid>,
    /// Bytes that are worth a stop.
    batch: u64,
    /// The driver has taken the memory back, or something does not work: what is not moved by now stays where it is.
    is_over: bool,
}

/// Memory of one process that is moved at once.
#[derive(Debug)]
struct Window {
    pid: HostPid,
    /// In order of addresses, contiguous where they can be.
    runs: Vec<Run>,
    /// The memory that is filled in its stead.
    elsewhere: Range,
}

/// Contiguous memory that is in files.
#[derive(Debug)]
struct Run {
    range: Range,
    segments: Vec<Segment>,
    is_moved: bool,
}

impl Window {
    /// Returns the memory that a process has in packs, in windows.
    fn of(of: &ProcessLayout) -> Vec<Self> {
        let mut segments: Vec<Segment> =
            of.segments.iter().filter(|segment| segment.stored().is_some()).copied().collect();
        segments.sort_unstable_by_key(|segment| segment.address);
        let mut windows: Vec<Self> = Vec::new();
        for segment in segments.into_iter().flat_map(split) {
            let is_same = |window: &&mut Self| window.start() / WINDOW == segment.address / WINDOW;
            let Some(window) = windows.last_mut().filter(is_same) else {
                let runs = vec![Run::of(segment)];
                windows.push(Self { pid: of.process.host, runs, elsewhere: Range { start: 0, end: 0 } });
                continue;
            };
            match window.runs.last_mut().filter(|run| run.range.end == segment.address) {
                Some(run) => run.add(segment),
                None => window.runs.push(Run::of(segment)),
            }
        }
        windows
    }

    fn start(&self) -> u64 {
        self.runs.first().map_or(0, |run| run.range.start)
    }

    fn len(&self) -> u64 {
        self.runs.last().map_or(0, |run| run.range.end) - self.start()
    }

    fn bytes(&self) -> u64 {
        self.runs.iter().map(|run| run.range.len()).sum()
    }

    /// Place that is filled for an address.
    fn elsewhere_of(&self, address: u64) -> u64 {
        self.elsewhere.start + (address - self.start())
    }

    /// Memory elsewhere that is still there.
    fn rest(&self) -> Vec<Range> {
        let mut rest = Vec::new();
        let mut start = self.elsewhere.start;
        for run in self.runs.iter().filter(|run| run.is_moved) {
            rest.push(Range { start, end: self.elsewhere_of(run.range.start) });
            start = self.elsewhere_of(run.range.end);
        }
        rest.push(Range { start, end: self.elsewhere.end });
        rest.retain(|range| !range.is_empty());
        rest
    }
}

/// Returns a segment in parts each of which is in one window.
fn split(segment: Segment) -> impl Iterator<Item = Segment> {
    let end = segment.address + segment.length;
    let starts = std::iter::once(segment.address).chain((segment.address / WINDOW + 1..).map(|number| number * WINDOW));
    starts.take_while(move |start| *start < end).map(move |start| {
        let length = end.min((start / WINDOW + 1) * WINDOW) - start;
        let mut place = segment.place;
        if let Place::Pack { offset, .. } = &mut place {
            *offset += start - segment.address;
        }
        Segment { address: start, length, place }
    })
}

impl Run {
    fn of(segment: Segment) -> Self {
        Self { range: segment.range(), segments: vec![segment], is_moved: false }
    }

    fn add(&mut self, segment: Segment) {
        self.range.end += segment.length;
        self.segments.push(segment);
    }

    /// Whether all of it is still mapped from these files.
    fn is_in_files(&self, mappings: &[Mapping], inodes: &BTreeSet<u64>) -> bool {
        let mut at = self.range.start;
        for mapping in &mappings[mappings.partition_point(|mapping| mapping.range.end <= at)..] {
            if at >= self.range.end || mapping.range.start > at || !inodes.contains(&mapping.inode) {
                break;
            }
            at = mapping.range.end;
        }
        at >= self.range.end
    }
}

impl Backfill {
    /// Maps files over the empty staging memory of processes whose program is held, and begins to fill what is to take
    /// their place.
    pub(crate) fn begin(hold: &mut Hold, layout: &Layout, deadline: Instant) -> Result<Self, BackfillError> {
        let packs = layout.packs.iter().map(|path| Pack::open(path)).collect::<Result<Vec<_>, _>>()?;
        let mut inodes = BTreeSet::new();
        for pack in &packs {
            inodes.insert(pack.file().metadata().map_err(BackfillError::File)?.ino());
        }
        let mut windows = Vec::new();
        for of in &layout.processes {
            let (process, mut segments) = (of.process, of.segments.clone());
            segments.retain(|segment| segment.stored().is_some());
            let of = ProcessLayout { process, segments };
            let left = if crate::is_off(SWITCH) {
                of.segments.iter().map(Segment::range).collect()
            } else {
                map_in_empty(hold, &layout.packs, &of, deadline)?
            };
            let is_left = |segment: &Segment| {
                left.iter().any(|range| range.start <= segment.address && segment.address < range.end)
            };
            let (left, mapped) = of.segments.into_iter().partition(is_left);
            // What has to be small memory is there before the driver asks for it.
            fill_in_place(&packs, &ProcessLayout { process, segments: left })?;
            windows.extend(Window::of(&ProcessLayout { process, segments: mapped }));
        }
        let mut teams = BTreeMap::new();
        for pid in layout.processes.iter().map(|of| of.process.host) {
            match Team::gather(hold, pid, 1) {
                Ok(mut team) => {
                    let of_it = windows.iter_mut().filter(|window| window.pid == pid);
                    if let Err(error) = make_room(&mut team, of_it) {
                        not_ahead(pid, &error);
                    }
                    teams.insert(pid, team);
                }
                Err(error) => not_ahead(pid, &error),
            }
        }
        let total: u64 = windows.iter().map(Window::bytes).sum();
        let (filled, filling) = fill(packs, &windows)?;
        let (batch, is_over) = ((total / BATCHES).max(1), teams.is_empty());
        let (waiting, stopped) = (Vec::new(), BTreeSet::new());
        Ok(Self { windows, teams, inodes, filling, filled, waiting, stopped, batch, is_over })
    }

    /// To be run all the time, after as long as it says each time.
    pub(crate) fn tick(&mut self, hold: &mut Hold) -> Duration {
        self.release(hold);
        self.waiting.extend(self.filled.try_iter());
        let ready: u64 = self.waiting.iter().map(|index| self.windows[*index].bytes()).sum();
        let is_enough = ready >= self.batch || (ready > 0 && self.filling.is_finished());
        if !is_enough || self.is_over || !self.stopped.is_empty() {
            return LOOK;
        }
        for index in std::mem::take(&mut self.waiting) {
            match self.move_window(hold, index) {
                Ok(()) => {}
                Err(error @ MoveError::Hold(_)) => {
                    not_ahead(self.windows[index].pid, &error);
                    self.waiting.push(index);
                }
                Err(error) => {
                    not_ahead(self.windows[index].pid, &error);
                    self.is_over = true;
                }
            }
        }
        self.release(hold);
        LOOK
    }

    /// Lets the driver's threads go on. One that has not stopped yet is let go when it has, the next time.
    fn release(&mut self, hold: &mut Hold) {
        self.stopped.retain(|pid| match hold.let_spared_go(*pid) {
            Ok(()) => false,
            Err(error) => {
                not_ahead(*pid, &error);
                true
            }
        });
    }

    /// Puts a filled window in its place. The driver's threads of its process are held afterwards.
    fn move_window(&mut self, hold: &mut Hold, index: usize) -> Result<(), MoveError> {
        let Self { windows, teams, inodes, stopped, is_over, .. } = self;
        let window = &mut windows[index];
        let pid = window.pid;
        let Some(team) = teams.get_mut(&pid) else { return Ok(()) };
        if *is_over {
            return Ok(());
        }
        stopped.insert(pid);
        hold.take_scope(pid, Scope::All)?;
        hold.settle_only(pid, Instant::now() + HALT)?;
        let mappings = proc::mappings(pid).map_err(MoveError::Mappings)?;
        for at in 0..window.runs.len() {
            let run = &window.runs[at];
            if run.range.len() < LEAST_RUN {
                continue;
            }
            if !run.is_in_files(&mappings, inodes) {
                *is_over = true;
                return Ok(());
            }
            let (from, length, to) = (window.elsewhere_of(run.range.start), run.range.len(), run.range.start);
            let flags = argument(libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED);
            if let Err(error) = team.call(libc::SYS_mremap, [from, length, length, flags, to, 0]) {
                // It may come about yet, and what is mapped there then is not ours to unmap.
                window.elsewhere = Range { start: 0, end: 0 };
                return Err(error.into());
            }
            window.runs[at].is_moved = true;
        }
        Ok(())
    }

    /// Waits until everything is filled and checked, and puts all back that was made for it.
    pub(crate) fn finish(mut self, hold: &mut Hold, deadline: Instant) -> Result<(), BackfillError> {
        while !self.filling.is_finished() || (!self.stopped.is_empty() && Instant::now() < deadline) {
            std::thread::sleep(LOOK);
            self.release(hold);
            // As with calls of the driver: nobody else learns of the death of what is held.
            if let Err(error) = hold.watch() {
                tracing::debug!(error = &error as &dyn std::error::Error, "a thread cannot be held");
            }
        }
        for window in self.windows.iter().filter(|window| !window.elsewhere.is_empty()) {
            let Some(team) = self.teams.get_mut(&window.pid) else { continue };
            for range in window.rest() {
                if let Err(error) = team.call(libc::SYS_munmap, [range.start, range.len(), 0, 0, 0, 0]) {
                    not_ahead(window.pid, &error);
                }
            }
        }
        for team in self.teams.into_values() {
            team.disband(hold, deadline);
        }
        self.filling.join().map_err(|_| BackfillError::Died)?
    }
}

/// Why a window was not moved. The driver finds its data in files.
#[derive(Debug, thiserror::Error)]
enum MoveError {
    #[error("cannot hold the driver's threads")]
    Hold(#[from] HoldError),
    #[error("cannot read the mappings")]
    Mappings(#[source] io::Error),
    #[error("cannot move memory")]
    Call(#[from] InjectError),
}

fn not_ahead(pid: HostPid, error: &(dyn std::error::Error + 'static)) {
    tracing::debug!(pid = pid.raw(), error, "the driver reads its memory in small pages");
}

/// Makes the memory in which windows are filled, in which huge pages are where they will be. What gets none is read from
/// files.
fn make_room<'w>(team: &mut Team, windows: impl Iterator<Item = &'w mut Window>) -> Result<(), InjectError> {
    let access = argument(libc::PROT_READ | libc::PROT_WRITE);
    let flags = argument(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
    for window in windows {
        let length = window.len() + HUGE_PAGE;
        let start = team.call(libc::SYS_mmap, [0, length, access, flags, argument(-1), 0])?;
        let like = (HUGE_PAGE + window.start() % HUGE_PAGE - start % HUGE_PAGE) % HUGE_PAGE;
        let begin = start + like;
        window.elsewhere = Range { start: begin, end: begin + window.len() };
        let around = [(start, like), (begin + window.len(), HUGE_PAGE - like)];
        for (start, length) in around.into_iter().filter(|(_, length)| *length > 0) {
            team.call(libc::SYS_munmap, [start, length, 0, 0, 0, 0])?;
        }
        let advice = argument(libc::MADV_HUGEPAGE);
        // A kernel without huge pages has small ones.
        drop(team.call(libc::SYS_madvise, [begin, window.len(), advice, 0, 0, 0]));
    }
    Ok(())
}

fn table(packs: &[Pack], processes: Vec<Process>) -> Result<SegmentTable, BackfillError> {
    Ok(SegmentTable::new(packs.iter().map(Pack::data_length).collect(), processes)?)
}

fn fill_in_place(packs: &[Pack], of: &ProcessLayout) -> Result<(), BackfillError> {
    if of.segments.is_empty() {
        return Ok(());
    }
    let table = table(packs, vec![Process { pid: of.process.container, segments: of.segments.clone() }])?;
    let into = Destination { processes: &[of.process], ready: &|_| () };
    Ok(memory::fill(&table, packs, &into, &Control::new())?)
}

type Filling = (Receiver<usize>, JoinHandle<Result<(), BackfillError>>);

/// Fills windows, in their order, by threads of their own. Each stands for a process of the table, so that it is told when
/// one is filled. What has no memory elsewhere is read and checked all the same.
fn fill(packs: Vec<Pack>, windows: &[Window]) -> Result<Filling, BackfillError> {
    let mut processes = Vec::new();
    let mut order = Vec::new();
    let filled = windows.iter().zip(1..).filter(|(window, _)| !window.elsewhere.is_empty());
    for (window, container) in filled.filter_map(|(window, number)| Some((window, ContainerPid::new(number)?))) {
        let segments = window.runs.iter().flat_map(|run| &run.segments);
        let elsewhere = |segment: &Segment| Segment { address: window.elsewhere_of(segment.address), ..*segment };
        processes.push(Process { pid: container, segments: segments.map(elsewhere).collect() });
        order.push(ProcessIds { host: window.pid, container });
    }
    let is_all = order.len() == windows.len();
    let table = table(&packs, processes)?;
    let (say, filled) = mpsc::channel();
    let work = move || {
        let ready = |pid: ContainerPid| {
            // Nobody listens who has given up.
            let _ = say.send(usize::try_from(pid.raw() - 1).unwrap_or(usize::MAX));
        };
        let control = Control::new();
        memory::fill(&table, &packs, &Destination { processes: &order, ready: &ready }, &control)?;
        if is_all { Ok(()) } else { Ok(memory::verify(&packs, &control)?) }
    };
    let filling = std::thread::Builder::new().name("backfill".into()).spawn(work).map_err(BackfillError::Thread)?;
    Ok((filled, filling))
}
