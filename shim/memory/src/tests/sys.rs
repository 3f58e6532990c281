//! Processes whose memory is saved and filled.

use std::ptr::NonNull;

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid};
use proc::{HostPid, ProcessIds, Range};
use rustix::mm::{MapFlags, ProtFlags};

/// A process that does nothing, with memory that the test has given it.
#[derive(Debug)]
pub(crate) struct Holder {
    pub(crate) pid: HostPid,
    address: u64,
    length: u64,
}

impl Holder {
    /// Forks one that has `length` bytes of new memory, into which each of the contents is written at its offset.
    pub(crate) fn start(length: u64, contents: &[(u64, &[u8])]) -> Self {
        let bytes = usize::try_from(length).unwrap();
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::NORESERVE);
        // SAFETY: the kernel chooses the place, so that no other mapping is replaced.
        let mapping = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), bytes, protection, flags) }.unwrap();
        Self::fork(mapping, bytes, contents)
    }

    /// Forks one that shares a part of a file.
    pub(crate) fn sharing(file: &std::fs::File, offset: u64, length: u64) -> Self {
        let bytes = usize::try_from(length).unwrap();
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: the kernel chooses the place, so that no other mapping is replaced.
        let mapping = unsafe { rustix::mm::mmap(std::ptr::null_mut(), bytes, protection, flags, file, offset) };
        Self::fork(mapping.unwrap(), bytes, &[])
    }

    /// Writes the contents into a mapping, forks a process that keeps it, and gives it up here.
    fn fork(mapping: *mut std::ffi::c_void, bytes: usize, contents: &[(u64, &[u8])]) -> Self {
        let length = u64::try_from(bytes).unwrap();
        let memory = NonNull::slice_from_raw_parts(NonNull::new(mapping.cast::<u8>()).unwrap(), bytes);
        // SAFETY: the mapping is as long, and nothing else knows of it.
        let slice = unsafe { &mut *memory.as_ptr() };
        for (offset, content) in contents {
            let offset = usize::try_from(*offset).unwrap();
            slice[offset..offset + content.len()].copy_from_slice(content);
        }
        // SAFETY: the child calls functions that are safe between fork and exec only: prctl and pause.
        let forked = unsafe { nix::unistd::fork() }.unwrap();
        let ForkResult::Parent { child } = forked else {
            // The test's thread may end by a panic that does not get to the drop below.
            let _ = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL));
            loop {
                nix::unistd::pause();
            }
        };
        // SAFETY: the slice is not used any more.
        unsafe { rustix::mm::munmap(mapping, bytes) }.unwrap();
        Self { pid: HostPid::new(child.as_raw()).unwrap(), address: u64::try_from(mapping.addr()).unwrap(), length }
    }

    pub(crate) fn range(&self) -> Range {
        Range { start: self.address, end: self.address + self.length }
    }

    /// Returns its pids, of which the one in a container is said to be this.
    pub(crate) fn ids(&self, container: i32) -> ProcessIds {
        ProcessIds { host: self.pid, container: super::container(container) }
    }

    /// All of its memory, read another way than the engine does.
    pub(crate) fn memory(&self) -> Vec<u8> {
        use std::os::unix::fs::FileExt;
        let mut bytes = vec![0; usize::try_from(self.length).unwrap()];
        let file = std::fs::File::open(format!("/proc/{}/mem", self.pid)).unwrap();
        file.read_exact_at(&mut bytes, self.address).unwrap();
        bytes
    }

    /// Ends it, and waits until it is gone.
    pub(crate) fn end(&self) {
        if kill(Pid::from_raw(self.pid.raw()), Signal::SIGKILL).is_ok() {
            let _ = waitpid(Pid::from_raw(self.pid.raw()), None);
        }
    }

    /// Tells it to end, and does not wait.
    pub(crate) fn kill(&self) {
        kill(Pid::from_raw(self.pid.raw()), Signal::SIGKILL).unwrap();
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        self.end();
    }
}
