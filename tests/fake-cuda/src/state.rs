//! The driver's state in a process, behind one mutex. Only calls that have passed the gate change
//! it, or the driver's thread while the gate is closed.

use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::code::{Code, Result};
use crate::control::Control;
use crate::device::{Common, Device};
use crate::kernel::{self, Kernel, Work};
use crate::node;
use crate::sys::memory::Region;
use crate::sys::os;

/// Place of an allocation's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Device(usize),
    Managed,
    Pinned,
}

#[derive(Clone, Copy)]
pub(crate) struct Allocation {
    pub(crate) region: Region,
    /// The requested size; the region is whole pages.
    pub(crate) size: usize,
    pub(crate) place: Place,
}

/// A context; the handle is the place in the list plus one.
pub(crate) struct Context {
    pub(crate) device: usize,
    pub(crate) primary: bool,
    pub(crate) alive: bool,
}

pub(crate) struct State {
    pub(crate) control: Option<&'static Control>,
    pub(crate) common: Option<Common>,
    pub(crate) devices: Vec<Device>,
    pub(crate) contexts: Vec<Context>,
    pub(crate) allocations: Vec<Allocation>,
    pub(crate) modules: Vec<Vec<String>>,
    pub(crate) functions: Vec<Kernel>,
    /// Launched and unfinished work, done at the next wait for the device.
    pub(crate) work: Vec<Work>,
    /// End of spinning kernels, on CLOCK_MONOTONIC; 0 without any.
    pub(crate) busy_until: u64,
    /// Result of every call after a failed kernel.
    pub(crate) broken: Option<Code>,
    /// Holds all device memory while checkpointed.
    pub(crate) staging: Option<Region>,
    /// Memory that a thread may read in spite of the lock.
    pub(crate) driver_memory: Option<Region>,
}

static STATE: Mutex<State> = Mutex::new(State {
    control: None,
    common: None,
    devices: Vec::new(),
    contexts: Vec::new(),
    allocations: Vec::new(),
    modules: Vec::new(),
    functions: Vec::new(),
    work: Vec::new(),
    busy_until: 0,
    broken: None,
    staging: None,
    driver_memory: None,
});

/// The state, locked.
pub(crate) type Guard = MutexGuard<'static, State>;

/// Locks the state. A panic in a holder of the lock left nothing half-done that harms the program.
pub(crate) fn lock() -> Guard {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    /// The allocation with `length` bytes at `pointer`, and the offset in the allocation.
    pub(crate) fn find(&self, pointer: u64, length: usize) -> Result<(Allocation, usize)> {
        let address = usize::try_from(pointer).map_err(|_| Code::INVALID_VALUE)?;
        let inside = |allocation: &&Allocation| {
            let offset = address.checked_sub(allocation.region.address());
            offset.and_then(|offset| offset.checked_add(length)).is_some_and(|end| end <= allocation.size)
        };
        let allocation = self.allocations.iter().find(inside).ok_or(Code::INVALID_VALUE)?;
        Ok((*allocation, address - allocation.region.address()))
    }

    /// Device memory in use, on one GPU or all.
    pub(crate) fn used(&self, device: Option<usize>) -> u64 {
        let of_device = |allocation: &&Allocation| match allocation.place {
            Place::Device(at) => device.is_none_or(|wanted| wanted == at),
            Place::Managed | Place::Pinned => false,
        };
        self.allocations.iter().filter(of_device).map(|allocation| allocation.region.length() as u64).sum()
    }

    /// Does the pending work of the device. Only for a device that is no longer busy.
    pub(crate) fn settle(&mut self) {
        self.busy_until = 0;
        for at in 0..self.work.len() {
            let done = match self.work[at] {
                Work::AddOne { values, count } => self.each(values, count, |_, value| value.wrapping_add(1)),
                Work::Fill { values, count, seed } => self.each(values, count, |index, _| kernel::pattern(index, seed)),
            };
            if done.is_err() {
                self.broken = Some(Code::ILLEGAL_ADDRESS);
            }
        }
        self.work.clear();
    }

    fn each(&self, values: u64, count: u32, new: impl Fn(u32, u32) -> u32) -> Result<()> {
        use std::sync::atomic::Ordering::Relaxed;
        let count = usize::try_from(count).map_err(|_| Code::INVALID_VALUE)?;
        let (allocation, offset) = self.find(values, count.checked_mul(4).ok_or(Code::INVALID_VALUE)?)?;
        for (index, word) in (0..).zip(allocation.region.words(offset, count)?) {
            word.store(new(index, word.load(Relaxed)), Relaxed);
        }
        Ok(())
    }

    /// Returns whether a kernel still runs.
    pub(crate) fn is_busy(&self) -> bool {
        self.busy_until > os::now()
    }

    /// Publishes the process's resources for observers from outside.
    pub(crate) fn publish(&self) {
        let Some(control) = self.control else { return };
        let used = self.devices.iter().filter(|device| device.contexts > 0);
        control.devices.store(used.fold(0, |bits, device| bits | 1 << device.minor), SeqCst);
        control.memory.store(self.used(None), SeqCst);
    }

    /// The GPU of this process for a new context or allocation.
    pub(crate) fn device(&mut self, ordinal: usize) -> Result<&mut Device> {
        self.devices.get_mut(ordinal).ok_or(Code::INVALID_DEVICE)
    }

    /// Opens the usable nodes.
    pub(crate) fn discover(&mut self) -> Result<()> {
        self.common = Some(Common::open()?);
        let usable = node::minors().filter(|minor| node::open_gpu(*minor).is_some());
        self.devices = usable
            .map(|minor| Device { minor, uuid: node::uuid(minor), retained: 0, contexts: 0, nodes: None })
            .collect();
        if self.devices.is_empty() { Err(Code::NO_DEVICE) } else { Ok(()) }
    }
}
