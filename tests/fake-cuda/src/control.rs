//! The page shared by a process with CUDA and callers: one request at a time, one answer.

use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64};

/// Name of the memfd; in maps: `/memfd:fake-cuda-control (deleted)`.
pub(crate) const NAME: &str = "fake-cuda-control";

/// Value of `Control::magic` once the page is ready. The last digits are the version of the layout.
pub(crate) const MAGIC: u64 = 0x6661_6b65_6375_0001;

/// Largest number of simulated GPUs.
pub(crate) const MAX_DEVICES: usize = 16;

/// CUprocessState.
pub(crate) mod state {
    pub(crate) const RUNNING: u32 = 0;
    pub(crate) const LOCKED: u32 = 1;
    pub(crate) const CHECKPOINTED: u32 = 2;
    pub(crate) const FAILED: u32 = 3;
}

/// Operations of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    State = 1,
    RestoreThread,
    Lock,
    Checkpoint,
    Restore,
    Unlock,
}

impl Operation {
    const ALL: [Self; 6] =
        [Self::State, Self::RestoreThread, Self::Lock, Self::Checkpoint, Self::Restore, Self::Unlock];

    pub(crate) fn from_number(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|operation| *operation as u32 == number)
    }

    pub(crate) fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "state" => Self::State,
            "tid" => Self::RestoreThread,
            "lock" => Self::Lock,
            "checkpoint" => Self::Checkpoint,
            "restore" => Self::Restore,
            "unlock" => Self::Unlock,
            _ => return None,
        })
    }
}

/// UUIDs of an old GPU and the substitute.
pub(crate) type Pair = ([u8; 16], [u8; 16]);

/// The shared page. All fields are zero at first.
///
/// A caller holds byte 0 of the memfd locked, so that there is one at a time. (The lock is an open
/// file description lock: it dies with the caller, in any namespaces.) The caller sets `request` to
/// an odd number, writes the arguments, then sets `request` to the next even number and wakes.
/// During the wait for `answer` to become that number, the caller also holds the byte of that
/// number. By that lock the driver thread knows whether anybody is still interested. A request
/// without its caller is dropped, whether or not another caller has come meanwhile.
#[repr(C)]
pub(crate) struct Control {
    pub(crate) magic: AtomicU64,
    pub(crate) state: AtomicU32,
    pub(crate) request: AtomicU32,
    pub(crate) answer: AtomicU32,
    pub(crate) result: AtomicU32,
    pub(crate) operation: AtomicU32,
    pub(crate) timeout_ms: AtomicU32,
    pub(crate) pair_count: AtomicU32,
    /// Pid as seen by the process itself.
    pub(crate) pid: AtomicI32,
    /// Minor numbers of the GPUs with a context, a bit each.
    pub(crate) devices: AtomicU64,
    /// Bytes of device memory.
    pub(crate) memory: AtomicU64,
    /// Old and new UUID, two words each.
    pub(crate) pairs: [[AtomicU64; 4]; MAX_DEVICES],
}

/// Size of the memfd and of the mappings.
pub(crate) const SIZE: usize = 4096;
const _: () = assert!(size_of::<Control>() <= SIZE);

/// A request as read from the page.
#[derive(Clone, Copy)]
pub(crate) struct Request {
    pub(crate) number: u32,
    pub(crate) operation: Option<Operation>,
    pub(crate) timeout_ms: u32,
    pub(crate) pairs: [Pair; MAX_DEVICES],
    pub(crate) pair_count: usize,
}

fn words(uuid: &[u8; 16]) -> [u64; 2] {
    let (low, high) = uuid.split_at(8);
    let word = |bytes: &[u8]| u64::from_ne_bytes(bytes.try_into().unwrap_or_default());
    [word(low), word(high)]
}

fn uuid(low: u64, high: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&low.to_ne_bytes());
    bytes[8..].copy_from_slice(&high.to_ne_bytes());
    bytes
}

impl Control {
    /// Writes a request; the caller holds the lock.
    pub(crate) fn post(&self, operation: Operation, timeout_ms: u32, pairs: &[Pair], number: u32) {
        use std::sync::atomic::Ordering::SeqCst;
        self.request.store(number.wrapping_sub(1), SeqCst);
        self.operation.store(operation as u32, SeqCst);
        self.timeout_ms.store(timeout_ms, SeqCst);
        let mut count = 0;
        for (place, (old, new)) in self.pairs.iter().zip(pairs) {
            let [a, b] = words(old);
            let [c, d] = words(new);
            for (word, value) in place.iter().zip([a, b, c, d]) {
                word.store(value, SeqCst);
            }
            count += 1;
        }
        self.pair_count.store(count, SeqCst);
        self.request.store(number, SeqCst);
    }

    /// The number of the next request.
    pub(crate) fn next_number(&self) -> u32 {
        use std::sync::atomic::Ordering::SeqCst;
        // Odd after a half-written request.
        (self.request.load(SeqCst) & !1).wrapping_add(2)
    }

    /// The request with this number, unless incomplete or no longer the present one.
    pub(crate) fn read(&self, number: u32) -> Option<Request> {
        use std::sync::atomic::Ordering::SeqCst;
        let mut pairs = [Pair::default(); MAX_DEVICES];
        for (pair, place) in pairs.iter_mut().zip(&self.pairs) {
            let [a, b, c, d] = place.each_ref().map(|word| word.load(SeqCst));
            *pair = (uuid(a, b), uuid(c, d));
        }
        let request = Request {
            number,
            operation: Operation::from_number(self.operation.load(SeqCst)),
            timeout_ms: self.timeout_ms.load(SeqCst),
            pairs,
            pair_count: usize::try_from(self.pair_count.load(SeqCst)).unwrap_or(0).min(MAX_DEVICES),
        };
        (number.is_multiple_of(2) && self.request.load(SeqCst) == number).then_some(request)
    }
}
