//! Progress of a transfer, for display.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Counters of one transfer, readable while it runs.
#[derive(Debug, Default)]
pub struct Meter {
    total: AtomicU64,
    moved: AtomicU64,
    present: AtomicU64,
    lost: AtomicU64,
    trouble: Mutex<Option<String>>,
}

/// A reading of a [`Meter`], in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Bytes of all blobs of the snapshot.
    pub total: u64,
    /// Bytes moved over the network by this transfer, and kept.
    pub moved: u64,
    /// Bytes present before the transfer, of whole blobs and of parts.
    pub present: u64,
    /// Bytes moved in vain, and moved again since.
    pub lost: u64,
}

impl Meter {
    /// Reads the counters.
    #[must_use]
    pub fn read(&self) -> Totals {
        Totals {
            total: self.total.load(Ordering::Relaxed),
            moved: self.moved.load(Ordering::Relaxed),
            present: self.present.load(Ordering::Relaxed),
            lost: self.lost.load(Ordering::Relaxed),
        }
    }

    /// Takes the error of the last attempt before a retry. A second call returns `None`.
    #[must_use]
    pub fn take_trouble(&self) -> Option<String> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    pub(crate) fn set_trouble(&self, trouble: String) {
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = Some(trouble);
    }

    pub(crate) fn set_total(&self, bytes: u64) {
        self.total.store(bytes, Ordering::Relaxed);
    }

    pub(crate) fn add_moved(&self, bytes: u64) {
        self.moved.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn add_present(&self, bytes: u64) {
        self.present.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// Share of one blob in a meter, subtracted if the blob starts from the beginning.
#[derive(Debug)]
pub(crate) struct Share {
    meter: Arc<Meter>,
    moved: AtomicU64,
    present: AtomicU64,
}

impl Share {
    pub(crate) fn new(meter: &Arc<Meter>) -> Self {
        Self { meter: Arc::clone(meter), moved: AtomicU64::new(0), present: AtomicU64::new(0) }
    }

    pub(crate) fn moved(&self, bytes: u64) {
        self.moved.fetch_add(bytes, Ordering::Relaxed);
        self.meter.add_moved(bytes);
    }

    pub(crate) fn present(&self, bytes: u64) {
        self.present.fetch_add(bytes, Ordering::Relaxed);
        self.meter.add_present(bytes);
    }

    /// Bytes of this blob moved so far: a stalled upload shows here.
    pub(crate) fn so_far(&self) -> u64 {
        self.moved.load(Ordering::Relaxed)
    }

    pub(crate) fn start_over(&self) {
        let moved = self.moved.swap(0, Ordering::Relaxed);
        let present = self.present.swap(0, Ordering::Relaxed);
        self.meter.moved.fetch_sub(moved, Ordering::Relaxed);
        self.meter.present.fetch_sub(present, Ordering::Relaxed);
        self.meter.lost.fetch_add(moved, Ordering::Relaxed);
    }
}
