//! What ptrace and the signal calls take that `nix` and `rustix` do not offer: signals by number, real-time ones too.

use std::io;

use rustix::process::Signal;

/// Ends tracing of a thread that stands still and lets it run. `signal`, 0 for none, is delivered to it if it stands in
/// the delivery of a signal.
pub(crate) fn detach(tid: i32, signal: i32) -> io::Result<()> {
    resume(libc::PTRACE_DETACH, tid, signal)
}

/// Lets a traced thread run until it stops again, with a signal as for [`detach`].
pub(crate) fn go_on(tid: i32, signal: i32) -> io::Result<()> {
    resume(libc::PTRACE_CONT, tid, signal)
}

#[expect(dead_code, reason = "being written")]
/// As [`go_on`], but it stops where it enters or leaves a system call too.
pub(crate) fn go_on_to_syscall(tid: i32, signal: i32) -> io::Result<()> {
    resume(libc::PTRACE_SYSCALL, tid, signal)
}

fn resume(request: libc::c_uint, tid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: none of the three requests reads or writes this process's memory: the address is not used, and the data
    // is a signal's number. A thread that is not a tracee of this thread, or does not stand still, is refused.
    let done = unsafe { libc::ptrace(request, tid, 0_usize, libc::c_long::from(signal)) };
    if done == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Sends a signal to one thread.
pub(crate) fn signal_thread(pid: i32, tid: i32, signal: Signal) -> io::Result<()> {
    // SAFETY: three numbers. It signals a thread of another process, and touches no memory of this one.
    let done = unsafe { libc::syscall(libc::SYS_tgkill, pid, tid, signal.as_raw()) };
    if done == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
