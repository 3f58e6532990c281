//! How work is spread over threads, watched and stopped.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

/// More threads than this gain nothing: 16 reach the rate at which a machine's memory copies (30 GB/s on the host of
/// an H100, where 8 reach 21), and each has a buffer and takes a processor from what else the node does.
const MAX_THREADS: usize = 16;

/// The threads of one operation, how far it is, and the way to stop it. Shared with whoever watches.
///
/// Threads are not bound to NUMA nodes. Which node memory is on, the kernel tells page by page only (`numa_maps`,
/// `move_pages`), and a process that ran on several has memory on several. What it would gain has not been measured.
#[derive(Debug)]
pub struct Control {
    threads: NonZeroUsize,
    cancelled: AtomicBool,
    done: AtomicU64,
}

impl Default for Control {
    fn default() -> Self {
        Self::new()
    }
}

/// Why work ended early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cancelled;

impl Control {
    /// As many threads as this process may use processors, by its affinity and its cgroup, at most 16.
    #[must_use]
    pub fn new() -> Self {
        let threads = thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
        let most = NonZeroUsize::new(MAX_THREADS).unwrap_or(NonZeroUsize::MIN);
        Self::with_threads(threads.min(most))
    }

    /// This number of threads, the calling one included.
    #[must_use]
    pub fn with_threads(threads: NonZeroUsize) -> Self {
        Self { threads, cancelled: AtomicBool::new(false), done: AtomicU64::new(0) }
    }

    /// The number of threads.
    #[must_use]
    pub fn threads(&self) -> NonZeroUsize {
        self.threads
    }

    /// Makes the operation end with an error, within a buffer's time.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Bytes that have been dealt with. When saving, of all memory; from files, when it was looked at, before any is
    /// written. When filling, of stored memory. When verifying or prefetching, of packs.
    #[must_use]
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    pub(crate) fn add(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn check(&self) -> Result<(), Cancelled> {
        if self.cancelled.load(Ordering::Relaxed) { Err(Cancelled) } else { Ok(()) }
    }

    /// Does the steps 0 to `count - 1`, in this order but many at a time, and returns what they return, in order.
    /// Otherwise as [`Self::each`].
    pub(crate) fn gather<O, T: Send, E: Send>(
        &self,
        count: usize,
        own: impl Fn() -> O + Sync,
        step: impl Fn(&mut O, usize) -> Result<T, E> + Sync,
    ) -> Result<Vec<T>, E> {
        let results = Mutex::new(Vec::new());
        self.each(self.threads, count, own, |own, index| {
            let result = step(own, index)?;
            results.lock().unwrap_or_else(PoisonError::into_inner).push((index, result));
            Ok(())
        })?;
        let mut results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
        results.sort_unstable_by_key(|(index, _)| *index);
        Ok(results.into_iter().map(|(_, result)| result).collect())
    }

    /// Does the steps 0 to `count - 1`, in this order but many at a time.
    ///
    /// Each thread has something of its own, made by `own`. The first failure keeps further steps from being begun; of
    /// several failures that of the earliest step is returned.
    pub(crate) fn each<O, E: Send>(
        &self,
        threads: NonZeroUsize,
        count: usize,
        own: impl Fn() -> O + Sync,
        step: impl Fn(&mut O, usize) -> Result<(), E> + Sync,
    ) -> Result<(), E> {
        let next = AtomicUsize::new(0);
        let failed = AtomicBool::new(false);
        let work = || {
            let mut own = own();
            while !failed.load(Ordering::Relaxed) {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= count {
                    break;
                }
                if let Err(error) = step(&mut own, index) {
                    failed.store(true, Ordering::Relaxed);
                    return Some((index, error));
                }
            }
            None
        };
        let failure = thread::scope(|scope| {
            let others: Vec<_> = (1..threads.get().min(count))
                // With fewer threads than wanted it takes longer, and that is all.
                .map_while(|_| thread::Builder::new().name("memory".into()).spawn_scoped(scope, work).ok())
                .collect();
            let own = work();
            let others =
                others.into_iter().map(|other| other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            others.chain([own]).flatten().min_by_key(|(index, _)| *index)
        });
        failure.map_or(Ok(()), |(_, error)| Err(error))
    }
}
