//! System calls without a safe interface in std. The functions for the driver's thread do not
//! allocate.

use std::ffi::{CStr, c_int, c_long, c_void};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::null;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

use crate::code::{Code, Result};

/// Users of a futex.
#[derive(Clone, Copy)]
pub(crate) enum Scope {
    /// Threads of this process.
    Process,
    /// All processes that map the same file.
    Shared,
}

impl Scope {
    fn flag(self) -> c_int {
        match self {
            Self::Process => libc::FUTEX_PRIVATE_FLAG,
            Self::Shared => 0,
        }
    }
}

/// Waits while the word is `expected`; may also return for no reason.
pub(crate) fn wait(word: &AtomicU32, expected: u32, scope: Scope, limit: Option<Duration>) {
    let limit = limit.map(timespec);
    let limit = limit.as_ref().map_or(null(), std::ptr::from_ref);
    let operation = libc::FUTEX_WAIT | scope.flag();
    // SAFETY: the word and the time outlive the call; the kernel only reads them.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), operation, expected, limit) };
}

/// Wakes all waiters for the word.
pub(crate) fn wake(word: &AtomicU32, scope: Scope) {
    // SAFETY: the word outlives the call.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE | scope.flag(), c_int::MAX) };
}

fn timespec(time: Duration) -> libc::timespec {
    libc::timespec {
        tv_sec: time.as_secs().try_into().unwrap_or(libc::time_t::MAX),
        tv_nsec: c_long::from(time.subsec_nanos().cast_signed()),
    }
}

/// CLOCK_MONOTONIC, in nanoseconds.
pub(crate) fn now() -> u64 {
    let mut time = MaybeUninit::<libc::timespec>::zeroed();
    // SAFETY: the kernel (or the vDSO) writes a timespec.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, time.as_mut_ptr()) };
    // SAFETY: written above; zero is valid, too.
    let time = unsafe { time.assume_init() };
    u64::try_from(time.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0)
}

/// The process's own pid. Not cached: a child of fork must notice the difference.
pub(crate) fn pid() -> i32 {
    // SAFETY: always succeeds.
    unsafe { libc::getpid() }
}

/// Opens a file for reading and writing, or for reading.
pub(crate) fn open(path: &CStr, write: bool) -> Option<OwnedFd> {
    let flags = libc::O_CLOEXEC | if write { libc::O_RDWR } else { libc::O_RDONLY };
    // SAFETY: the path is a C string.
    let fd = unsafe { libc::open(path.as_ptr(), flags) };
    // SAFETY: a descriptor that open gave to us alone.
    (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Reads up to a buffer's length from a file's current position on.
pub(crate) fn read<'a>(file: BorrowedFd<'_>, buffer: &'a mut [u8]) -> &'a [u8] {
    // SAFETY: the buffer is writable for its length.
    let got = unsafe { libc::read(file.as_raw_fd(), buffer.as_mut_ptr().cast::<c_void>(), buffer.len()) };
    &buffer[..usize::try_from(got).unwrap_or(0)]
}

/// Writes a message to standard error, once, without waiting for more room.
pub(crate) fn complain(message: &str) {
    // SAFETY: the bytes are readable for their length.
    unsafe { libc::write(2, message.as_ptr().cast::<c_void>(), message.len()) };
}

/// A lock on one byte of a file, owned by the open file until the last descriptor closes.
fn byte(offset: u64, kind: c_int) -> libc::flock {
    // SAFETY: a struct of integers.
    let mut lock: libc::flock = unsafe { MaybeUninit::zeroed().assume_init() };
    lock.l_type = kind.try_into().unwrap_or_default();
    lock.l_whence = libc::SEEK_SET.try_into().unwrap_or_default();
    lock.l_start = offset.try_into().unwrap_or(libc::off_t::MAX);
    lock.l_len = 1;
    lock
}

/// Locks a byte of a file, waiting for the present owner.
pub(crate) fn lock_byte(file: BorrowedFd<'_>, offset: u64) -> Result<()> {
    let lock = byte(offset, libc::F_WRLCK);
    loop {
        // SAFETY: the kernel reads a struct flock.
        let done = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLKW, &raw const lock) };
        if done == 0 {
            return Ok(());
        }
        if std::io::Error::last_os_error().kind() != std::io::ErrorKind::Interrupted {
            return Err(Code::OPERATING_SYSTEM);
        }
    }
}

/// Returns whether another process has a byte of a file locked.
pub(crate) fn is_locked(file: RawFd, offset: u64) -> bool {
    let mut lock = byte(offset, libc::F_WRLCK);
    // SAFETY: the kernel reads and writes a struct flock; a descriptor that is not open is an error, nothing worse.
    let done = unsafe { libc::fcntl(file, libc::F_OFD_GETLK, &raw mut lock) };
    done == 0 && c_int::from(lock.l_type) != libc::F_UNLCK
}

/// A handle to a process; `None` if no process has that pid.
pub(crate) fn pidfd(pid: i32) -> Option<OwnedFd> {
    // SAFETY: a system call on integers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = RawFd::try_from(fd).ok().filter(|fd| *fd >= 0)?;
    // SAFETY: pidfd_open gave this descriptor to us alone.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Returns whether the process of a pidfd has ended.
pub(crate) fn has_ended(process: &OwnedFd) -> bool {
    let mut poll = libc::pollfd { fd: process.as_fd().as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd, as the count says.
    let ready = unsafe { libc::poll(&raw mut poll, 1, 0) };
    ready > 0
}

/// Runs `spawn` with all signals blocked, so that the new thread gets none.
pub(crate) fn without_signals<T>(spawn: impl FnOnce() -> T) -> T {
    let mut all = MaybeUninit::<libc::sigset_t>::zeroed();
    let mut before = MaybeUninit::<libc::sigset_t>::zeroed();
    // SAFETY: fills the set.
    unsafe { libc::sigfillset(all.as_mut_ptr()) };
    // SAFETY: one set is read, the other written.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr()) };
    let result = spawn();
    // SAFETY: puts back what the call above wrote.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), std::ptr::null_mut()) };
    result
}

/// Dies of SIGSEGV in this thread, in spite of any handler of the program.
pub(crate) fn crash() {
    let mut signals = MaybeUninit::<libc::sigset_t>::zeroed();
    // SAFETY: the default action needs no handler.
    unsafe { libc::signal(libc::SIGSEGV, libc::SIG_DFL) };
    // SAFETY: empties the set.
    unsafe { libc::sigemptyset(signals.as_mut_ptr()) };
    // SAFETY: adds a signal to the set.
    unsafe { libc::sigaddset(signals.as_mut_ptr(), libc::SIGSEGV) };
    // SAFETY: reads the set.
    unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, signals.as_ptr(), std::ptr::null_mut()) };
    // SAFETY: a signal to this thread.
    unsafe { libc::raise(libc::SIGSEGV) };
}
