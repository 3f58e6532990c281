//! Mappings of the simulated driver, and the page shared with callers.

use std::ffi::{CStr, c_int, c_void};
use std::fs::File;
use std::ops::Deref;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::{null_mut, without_provenance_mut};
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::Relaxed;

use crate::code::{Code, Result};
use crate::control::{self, Control};

/// Size of a page; aarch64 kernels with larger pages are not simulated.
pub(crate) const PAGE: usize = 4096;

const DEVICE_MEMORY: &CStr = c"fake-gpu";
const CONTROL: &CStr = c"fake-cuda-control";
const READ_WRITE: c_int = libc::PROT_READ | libc::PROT_WRITE;

/// A range of addresses mapped here, and this driver's until `unmap`. Programs know the range as a
/// bare number; only references to atomics point into it. Copies of a `Region` are the same range.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Region {
    address: usize,
    length: usize,
}

/// `length` in whole pages, at least one.
fn pages(length: usize) -> Result<usize> {
    length.max(1).checked_next_multiple_of(PAGE).ok_or(Code::OUT_OF_MEMORY)
}

/// Calls mmap; with `at`, over that region.
fn map(at: Option<Region>, length: usize, protection: c_int, flags: c_int, fd: c_int) -> Result<Region> {
    let (address, fixed) = match at {
        Some(region) => (without_provenance_mut::<c_void>(region.address), libc::MAP_FIXED),
        None => (null_mut(), 0),
    };
    // SAFETY: either the kernel chooses a free range, or the range is one that this driver mapped for itself: nothing
    // else lies there, and nobody holds references into it.
    let mapped = unsafe { libc::mmap(address, length, protection, flags | fixed, fd, 0) };
    if mapped == libc::MAP_FAILED { Err(Code::OUT_OF_MEMORY) } else { Ok(Region { address: mapped.addr(), length }) }
}

/// A new memfd of that size, close-on-exec.
fn memfd(name: &CStr, length: usize) -> Result<OwnedFd> {
    // SAFETY: the name is a C string.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(Code::OPERATING_SYSTEM);
    }
    // SAFETY: memfd_create gave this descriptor to us alone.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let length = libc::off_t::try_from(length).map_err(|_| Code::OUT_OF_MEMORY)?;
    // SAFETY: a system call on a descriptor that is open.
    let grown = unsafe { libc::ftruncate(fd.as_raw_fd(), length) };
    if grown == 0 { Ok(fd) } else { Err(Code::OUT_OF_MEMORY) }
}

impl Region {
    pub(crate) fn address(self) -> usize {
        self.address
    }

    pub(crate) fn length(self) -> usize {
        self.length
    }

    /// Ordinary memory of the process.
    pub(crate) fn anonymous(length: usize) -> Result<Self> {
        map(None, pages(length)?, READ_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)
    }

    /// Memory that the process shares with children forked from it.
    pub(crate) fn shared(length: usize) -> Result<Self> {
        // Like the driver: "/dev/zero (deleted)" in the maps, also after a checkpoint.
        map(None, pages(length)?, READ_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1)
    }

    /// Ordinary memory that the kernel does not join with neighbours: maps show the exact size,
    /// between two pages without access.
    pub(crate) fn alone(length: usize) -> Result<Self> {
        let length = pages(length)?;
        let around = length.checked_add(2 * PAGE).ok_or(Code::OUT_OF_MEMORY)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let around = map(None, around, libc::PROT_NONE, flags, -1)?;
        let inner = Self { address: around.address + PAGE, length };
        // Like the driver (580.159, seen on an H100).
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE;
        map(Some(inner), length, READ_WRITE, flags, -1).inspect_err(|_| around.unmap())
    }

    /// Unmaps the result of `alone`.
    pub(crate) fn unmap_alone(self) {
        Self { address: self.address - PAGE, length: self.length + 2 * PAGE }.unmap();
    }

    /// Memory outside of the process's own: a memfd, not inherited by children.
    pub(crate) fn device(length: usize) -> Result<Self> {
        let length = pages(length)?;
        let memory = memfd(DEVICE_MEMORY, length)?;
        let region = map(None, length, READ_WRITE, libc::MAP_SHARED, memory.as_raw_fd())?;
        region.keep_from_children();
        Ok(region)
    }

    /// A mapping of a device node, never touched.
    pub(crate) fn node(node: BorrowedFd<'_>, length: usize) -> Result<Self> {
        map(None, length, READ_WRITE, libc::MAP_SHARED, node.as_raw_fd())
    }

    /// Removes the contents and keeps the addresses: a later access is fatal.
    pub(crate) fn reserve(self) -> Result<()> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        map(Some(self), self.length, libc::PROT_NONE, flags, -1).map(drop)
    }

    /// Maps device memory again, at the same addresses, filled from `staging` at `offset`.
    pub(crate) fn fill(self, staging: Self, offset: usize) -> Result<()> {
        let memory = memfd(DEVICE_MEMORY, self.length)?;
        map(Some(self), self.length, READ_WRITE, libc::MAP_SHARED, memory.as_raw_fd())?;
        self.keep_from_children();
        self.put(0, staging.address + offset, self.length)
    }

    /// Maps ordinary memory again, at the same addresses; zero.
    pub(crate) fn revive(self) -> Result<()> {
        map(Some(self), self.length, READ_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1).map(drop)
    }

    fn keep_from_children(self) {
        // SAFETY: only changes what fork does with a range of ours. It can not fail on a mapped range.
        unsafe { libc::madvise(without_provenance_mut(self.address), self.length, libc::MADV_DONTFORK) };
    }

    pub(crate) fn unmap(self) {
        // SAFETY: the range is this driver's, and nobody holds references into it.
        unsafe { libc::munmap(without_provenance_mut(self.address), self.length) };
    }

    /// Checks that `length` bytes from `offset` on lie inside.
    fn holds(self, offset: usize, length: usize) -> Result<()> {
        let end = offset.checked_add(length).ok_or(Code::INVALID_VALUE)?;
        if end <= self.length { Ok(()) } else { Err(Code::INVALID_VALUE) }
    }

    /// Copies into the region, from an address that the program or this driver vouches for.
    pub(crate) fn put(self, offset: usize, from: usize, length: usize) -> Result<()> {
        self.holds(offset, length)?;
        let to = without_provenance_mut::<u8>(self.address + offset);
        // SAFETY: the target lies in a mapped region of ours. The source is what the caller of cuMemcpyHtoD promises
        // to be readable, or another region; as with the real driver a wrong promise is a crash.
        unsafe { std::ptr::copy(without_provenance_mut::<u8>(from), to, length) };
        Ok(())
    }

    /// Copies out of the region.
    pub(crate) fn get(self, offset: usize, to: usize, length: usize) -> Result<()> {
        self.holds(offset, length)?;
        let from = without_provenance_mut::<u8>(self.address + offset);
        // SAFETY: as above, with the roles exchanged.
        unsafe { std::ptr::copy(from, without_provenance_mut::<u8>(to), length) };
        Ok(())
    }

    /// `count` words from `offset` (a multiple of 4) on, as seen by kernels.
    pub(crate) fn words(&self, offset: usize, count: usize) -> Result<&[AtomicU32]> {
        self.holds(offset, count.checked_mul(4).ok_or(Code::INVALID_VALUE)?)?;
        if !offset.is_multiple_of(4) {
            return Err(Code::INVALID_VALUE);
        }
        let first = without_provenance_mut::<AtomicU32>(self.address + offset);
        // SAFETY: mapped, aligned, and initialised whatever it holds; atomics may change behind the reference's back.
        Ok(unsafe { std::slice::from_raw_parts(first, count) })
    }

    /// Reads a word without asking whether the region still has contents, like a thread that reads
    /// driver memory during a checkpoint. Without contents the process dies of SIGSEGV, which is
    /// the point.
    pub(crate) fn peek(self) -> u32 {
        let first = without_provenance_mut::<AtomicU32>(self.address);
        // SAFETY: the range is never unmapped, only made inaccessible; then the read is a fault, not a wrong value.
        let first = unsafe { AtomicU32::from_ptr(first.cast()) };
        first.load(Relaxed)
    }
}

/// The shared page in this process.
pub(crate) struct ControlPage {
    region: Region,
}

impl ControlPage {
    /// Makes the page of this process, and the memfd by which others find the page.
    pub(crate) fn create() -> Result<(Self, OwnedFd)> {
        let memory = memfd(CONTROL, control::SIZE)?;
        let region = map(None, control::SIZE, READ_WRITE, libc::MAP_SHARED, memory.as_raw_fd())?;
        region.keep_from_children();
        Ok((Self { region }, memory))
    }

    /// Maps the page of another process, by memfd.
    pub(crate) fn open(memory: &File) -> Result<Self> {
        let length = memory.metadata().map_err(|_| Code::OPERATING_SYSTEM)?.len();
        if length < control::SIZE as u64 {
            return Err(Code::NOT_INITIALIZED);
        }
        let region = map(None, control::SIZE, READ_WRITE, libc::MAP_SHARED, memory.as_raw_fd())?;
        Ok(Self { region })
    }

    /// Keeps the page mapped for the rest of the process's life.
    pub(crate) fn leak(self) -> &'static Control {
        let region = self.region;
        std::mem::forget(self);
        // SAFETY: see `deref`; nothing unmaps it any more.
        unsafe { &*without_provenance_mut::<Control>(region.address) }
    }
}

impl Deref for ControlPage {
    type Target = Control;

    fn deref(&self) -> &Control {
        // SAFETY: a page-aligned mapping that is large enough. `Control` consists of integers that are atomic, so every
        // content is valid and others may change it. A process that cuts its memfd short makes us die of SIGBUS:
        // whoever simulates a GPU for a hostile program gets what the real driver spares him.
        unsafe { &*without_provenance_mut::<Control>(self.region.address) }
    }
}

impl Drop for ControlPage {
    fn drop(&mut self) {
        self.region.unmap();
    }
}
