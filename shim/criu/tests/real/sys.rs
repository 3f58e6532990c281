//! Things of processes beyond Rust's libraries.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Makes a ring for asynchronous operations.
pub(crate) fn io_uring() -> io::Result<OwnedFd> {
    // `struct io_uring_params`: 120 bytes that may be zero.
    let mut parameters = [0_u64; 15];
    // SAFETY: the kernel reads and writes 120 bytes at the address; they exist and belong to this
    // call alone.
    let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 8, parameters.as_mut_ptr()) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor, so nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Starts a child stopped by tracing.
pub(crate) fn traced_child() {
    let mut command = Command::new("/bin/true");
    let ask = || {
        // SAFETY: TRACEME takes no address; the others are ignored.
        let done = unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    };
    // SAFETY: the closure runs in the forked child, makes one system call, and allocates and locks nothing.
    unsafe { command.pre_exec(ask) };
    // The child stops at its exec. Nobody waits for it: the target's kill takes it along.
    let _ = command.spawn();
}

/// Whole pages of this process, never unmapped.
pub(crate) struct Memory {
    address: *mut libc::c_void,
    length: usize,
}

impl Memory {
    /// Maps private anonymous memory.
    pub(crate) fn new(length: usize) -> Self {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: the kernel chooses the address, so no existing mapping is replaced.
        let address = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, flags, -1, 0) };
        assert_ne!(address, libc::MAP_FAILED, "{}", io::Error::last_os_error());
        Self { address, length }
    }

    pub(crate) fn address(&self) -> usize {
        self.address.addr()
    }

    pub(crate) fn words(&mut self) -> &mut [u64] {
        // SAFETY: the pages exist, readable and writable, as long as this process, aligned, and any
        // bytes are words. This is the only way to them, and borrows them mutably.
        unsafe { std::slice::from_raw_parts_mut(self.address.cast(), self.length / 8) }
    }

    /// Empties a part again.
    pub(crate) fn forget(&mut self, offset: usize, length: usize) {
        assert!(offset + length <= self.length);
        // SAFETY: the part is within these pages, and nothing borrows them.
        let done = unsafe { libc::madvise(self.address.wrapping_byte_add(offset), length, libc::MADV_DONTNEED) };
        assert_eq!(done, 0, "{}", io::Error::last_os_error());
    }

    /// Maps a file privately, or nothing, over a part.
    pub(crate) fn map(&mut self, offset: usize, length: usize, file: Option<(&File, i64)>) {
        assert!(offset + length <= self.length);
        let (fd, from) = file.map_or((-1, 0), |(file, from)| (file.as_raw_fd(), from));
        let kind = if file.is_some() { 0 } else { libc::MAP_ANONYMOUS };
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_FIXED | kind);
        // SAFETY: the replaced part is within these pages, not borrowed, and the new pages are as
        // accessible.
        let address =
            unsafe { libc::mmap(self.address.wrapping_byte_add(offset), length, protection, flags, fd, from) };
        assert_ne!(address, libc::MAP_FAILED, "{}", io::Error::last_os_error());
    }
}

/// Forks. Returns true in the child.
pub(crate) fn fork() -> bool {
    // SAFETY: this process has one thread, so the child finds everything in order.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0, "{}", io::Error::last_os_error());
    pid == 0
}

/// Writes into a stopped process's memory.
pub(crate) fn write_memory(pid: i32, address: u64, bytes: &[u8]) -> io::Result<()> {
    let from = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let address = usize::try_from(address).map_err(io::Error::other)?;
    let to = libc::iovec { iov_base: std::ptr::without_provenance_mut(address), iov_len: bytes.len() };
    // SAFETY: the kernel reads the bytes, and writes into another process only.
    let written = unsafe { libc::process_vm_writev(pid, &raw const from, 1, &raw const to, 1, 0) };
    if written < 0 {
        return Err(io::Error::last_os_error());
    }
    if usize::try_from(written).map_err(io::Error::other)? == bytes.len() {
        Ok(())
    } else {
        Err(io::ErrorKind::WriteZero.into())
    }
}
