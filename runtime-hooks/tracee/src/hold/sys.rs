//! Calls of ptrace and of signals that `nix` and `rustix` do not offer: signals by number, real-time ones too.

use std::io;

use proc::HostPid;
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

/// The signals that a thread that stands still blocks, the lowest signal in the lowest bit.
pub(crate) fn signal_mask(tid: i32) -> io::Result<u64> {
    let mut mask = 0_u64;
    // SAFETY: the kernel writes as many bytes as it is told, the size of `mask`, to the address of it.
    let done = unsafe { libc::ptrace(libc::PTRACE_GETSIGMASK, tid, size_of::<u64>(), &raw mut mask) };
    if done == -1 { Err(io::Error::last_os_error()) } else { Ok(mask) }
}

/// Sets the signals that a thread that stands still blocks.
pub(crate) fn set_signal_mask(tid: i32, mask: u64) -> io::Result<()> {
    // SAFETY: the kernel reads as many bytes as it is told, the size of `mask`, from the address of it.
    let done = unsafe { libc::ptrace(libc::PTRACE_SETSIGMASK, tid, size_of::<u64>(), &raw const mask) };
    if done == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// One of the register sets of a thread that stands still, `NT_...` of elf.h, as far as `buffer` has room. Its length.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "what injects there is not written yet"))]
pub(crate) fn register_set(tid: i32, which: libc::c_int, buffer: &mut [u8]) -> io::Result<usize> {
    let mut vector = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: the kernel writes at most the given length to the buffer, both in the vector that it reads and updates;
    // the buffer is borrowed until the call has returned.
    let done = unsafe { libc::ptrace(libc::PTRACE_GETREGSET, tid, libc::c_long::from(which), &raw mut vector) };
    if done == -1 { Err(io::Error::last_os_error()) } else { Ok(vector.iov_len) }
}

/// The address of a thread's area for restartable sequences, 0 if it has none. `None` where the kernel does not tell,
/// which is before 5.13.
pub(crate) fn restartable_area(tid: i32) -> Option<u64> {
    /// `PTRACE_GET_RSEQ_CONFIGURATION` of linux/ptrace.h.
    const REQUEST: libc::c_uint = 0x420f;
    // A `struct ptrace_rseq_configuration`: the address is its first member.
    let mut configuration = [0_u64; 3];
    let size = size_of_val(&configuration);
    // SAFETY: the kernel writes as many bytes as it is told, the size of the array, to the address of it.
    let done = unsafe { libc::ptrace(REQUEST, tid, size, configuration.as_mut_ptr()) };
    (done != -1).then_some(configuration[0])
}

/// Place of a thread that stopped at a system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AtCall {
    /// It is about to make this one.
    Begin {
        /// `SYS_...`
        number: u64,
        arguments: [u64; 6],
    },
    /// It has made one, which returned this; a negative number is an error's.
    End { returned: i64 },
    /// At none.
    Elsewhere,
}

/// Returns the place that a thread has stopped at.
pub(crate) fn at_call(tid: i32) -> io::Result<AtCall> {
    let info = nix::sys::ptrace::syscall_info(nix::unistd::Pid::from_raw(tid))?;
    Ok(match info.op {
        libc::PTRACE_SYSCALL_INFO_ENTRY => {
            // SAFETY: the kernel has filled this member of the union, as `op` says; it is of numbers only.
            let entry = unsafe { info.u.entry };
            AtCall::Begin { number: entry.nr, arguments: entry.args }
        }
        libc::PTRACE_SYSCALL_INFO_EXIT => {
            // SAFETY: likewise.
            let exit = unsafe { info.u.exit };
            AtCall::End { returned: exit.sval }
        }
        _ => AtCall::Elsewhere,
    })
}

/// Sends a signal to one thread.
pub(crate) fn signal_thread(pid: HostPid, tid: i32, signal: Signal) -> io::Result<()> {
    // SAFETY: three numbers. It signals a thread of another process, and touches no memory of this one.
    let done = unsafe { libc::syscall(libc::SYS_tgkill, pid.raw(), tid, signal.as_raw()) };
    if done == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
