//! What the tests' programs do to themselves.

use std::io;
use std::sync::atomic::Ordering;

use super::{DELIVERED, VALUES};

/// Functions of this section are called before `main`.
#[used]
// SAFETY: the section holds pointers to functions of this kind, and the C library calls each once, in the first thread.
// What Rust's library sets up before `main` is not needed for what is played.
#[unsafe(link_section = ".init_array")]
static PLAY: extern "C" fn() = play;

extern "C" fn play() {
    super::play();
}

extern "C" fn count(signal: libc::c_int) {
    if let Some(counter) = usize::try_from(signal).ok().and_then(|signal| DELIVERED.get(signal)) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// Counts each delivery of a signal.
pub(crate) fn count_signal(signal: libc::c_int) {
    let handler: extern "C" fn(libc::c_int) = count;
    // SAFETY: the handler only adds to a static atomic, which is allowed in a signal handler.
    let before = unsafe { libc::signal(signal, handler as libc::sighandler_t) };
    assert_ne!(before, libc::SIG_ERR, "{}", io::Error::last_os_error());
}

/// Ends the calling thread, without a word to anyone.
pub(crate) fn end_thread() -> ! {
    loop {
        // SAFETY: ends this thread only. The program's other threads use nothing that it owns.
        unsafe { libc::syscall(libc::SYS_exit, 0) };
    }
}

/// Sleeps in one system call, which is restarted by the kernel if need be. `false` if it was interrupted.
pub(crate) fn sleep_once(milliseconds: i64) -> bool {
    let time = libc::timespec { tv_sec: milliseconds / 1000, tv_nsec: milliseconds % 1000 * 1_000_000 };
    // SAFETY: the time lives on this stack until the call returns, and nothing is written.
    unsafe { libc::nanosleep(&raw const time, std::ptr::null_mut()) == 0 }
}

/// Queues a signal for a process: of a real-time one, each is delivered.
pub(crate) fn queue_signal(pid: i32, signal: libc::c_int) -> io::Result<()> {
    let value = libc::sigval { sival_ptr: std::ptr::null_mut() };
    // SAFETY: three numbers for another process.
    let done = unsafe { libc::sigqueue(pid, signal, value) };
    if done == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Computes with values in as many registers as there are, until they are not what they must be.
pub(crate) fn compute() -> ! {
    let expected = round(1.0);
    loop {
        if round(1.0).to_bits() == expected.to_bits() {
            VALUES[0].fetch_add(1, Ordering::Relaxed);
        } else {
            VALUES[7].fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[inline(never)]
fn round(seed: f64) -> f64 {
    let mut lanes = [0.0_f64; 16];
    for (number, lane) in (0_u32..).zip(lanes.iter_mut()) {
        *lane = seed + f64::from(number);
    }
    for _ in 0..500 {
        for lane in &mut lanes {
            *lane = (*lane).mul_add(1.000_1, 0.5).sqrt() + 1.0;
        }
    }
    lanes.iter().sum()
}

/// Maps the first 8 KiB of a file, shared and for good.
pub(crate) fn map(file: &std::fs::File) -> usize {
    use std::os::fd::AsRawFd;
    let (access, fd) = (libc::PROT_READ | libc::PROT_WRITE, file.as_raw_fd());
    // SAFETY: a new mapping at an address that the kernel chooses. Nothing in this process uses it.
    let address = unsafe { libc::mmap(std::ptr::null_mut(), 8192, access, libc::MAP_SHARED, fd, 0) };
    assert_ne!(address, libc::MAP_FAILED, "{}", io::Error::last_os_error());
    address as usize
}

/// Ends this process at once. From 128 on, the code is as of one that a signal has ended.
pub(crate) fn exit(code: libc::c_int) -> ! {
    // SAFETY: ends this process. Nothing of it is used after.
    unsafe { libc::_exit(code) }
}

/// Gives the calling thread a stack for signal handlers, and says where it is.
pub(crate) fn set_alternate_stack() -> usize {
    let memory = Box::leak(Box::new([0_u8; 65536]));
    let stack = libc::stack_t { ss_sp: memory.as_mut_ptr().cast(), ss_flags: 0, ss_size: memory.len() };
    // SAFETY: the memory is leaked, so it is there as long as the thread, and nobody else uses it.
    let done = unsafe { libc::sigaltstack(&raw const stack, std::ptr::null_mut()) };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
    memory.as_ptr() as usize
}

/// Where the calling thread's stack for signal handlers is.
pub(crate) fn alternate_stack() -> usize {
    let mut stack = libc::stack_t { ss_sp: std::ptr::null_mut(), ss_flags: 0, ss_size: 0 };
    // SAFETY: nothing is set, and what is written fits: it is of the type that the call fills.
    let done = unsafe { libc::sigaltstack(std::ptr::null(), &raw mut stack) };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
    stack.ss_sp as usize
}
