//! Seccomp filters with a listener (seccomp_unotify(2)).

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use rustix::io::Errno;

/// A question for data or a hole, whose asker waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Question {
    pub(super) id: u64,
    /// The asking thread.
    pub(super) pid: u32,
    pub(super) fd: i32,
    pub(super) offset: u64,
    /// For a hole, and not for data.
    pub(super) is_hole: bool,
}

/// Answer to a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Offset(u64),
    Error(Errno),
    /// The kernel's own.
    Kernel,
}

/// `AUDIT_ARCH_*` of the processes that this program can start.
const ARCHITECTURE: Option<u32> = if cfg!(target_arch = "x86_64") {
    Some(0xc000_003e)
} else if cfg!(target_arch = "aarch64") {
    Some(0xc000_00b7)
} else {
    None
};

/// Offsets in a `struct seccomp_data`: the call's number, the architecture, the low half of the
/// third argument (little-endian).
const NUMBER: u32 = 0;
const ARCH: u32 = 4;
const WHENCE: u32 = 32;

/// Bytes for what a kernel writes as a notification; 80 until now.
const NOTIFICATION: usize = 512;

/// Installs a filter on the calling thread, for the rest of its life and for its children. Returns
/// the descriptor that `lseek` calls with `SEEK_DATA` and `SEEK_HOLE` are asked through.
pub(super) fn listen() -> io::Result<OwnedFd> {
    let architecture = ARCHITECTURE.ok_or(io::ErrorKind::Unsupported)?;
    let op = |code: u32, jump_true, jump_false, operand| libc::sock_filter {
        code: u16::try_from(code).unwrap_or_default(),
        jt: jump_true,
        jf: jump_false,
        k: operand,
    };
    let load = |at| op(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, at);
    let equal = |to, jump_true, jump_false| op(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, jump_true, jump_false, to);
    let result = |result| op(libc::BPF_RET | libc::BPF_K, 0, 0, result);
    let number = |number: i64| u32::try_from(number).unwrap_or(u32::MAX);
    let mut filter = [
        load(ARCH),
        equal(architecture, 0, 5),
        load(NUMBER),
        equal(number(libc::SYS_lseek), 0, 3),
        load(WHENCE),
        equal(libc::SEEK_DATA.unsigned_abs(), 2, 0),
        equal(libc::SEEK_HOLE.unsigned_abs(), 1, 0),
        result(libc::SECCOMP_RET_ALLOW),
        result(libc::SECCOMP_RET_USER_NOTIF),
    ];
    let length = u16::try_from(filter.len()).map_err(io::Error::other)?;
    let program = libc::sock_fprog { len: length, filter: filter.as_mut_ptr() };
    let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW;
    // SAFETY: the kernel copies the program, which outlives the call, and changes no memory of this
    // process.
    let listener =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) };
    let listener = i32::try_from(listener).ok().filter(|fd| *fd >= 0).ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the kernel has just made the descriptor, for this call alone.
    Ok(unsafe { OwnedFd::from_raw_fd(listener) })
}

/// Takes a question; waits for one.
pub(super) fn receive(listener: &File) -> io::Result<Question> {
    #[repr(C, align(8))]
    struct Room([u8; NOTIFICATION]);
    let mut room = Room([0; NOTIFICATION]);
    // SAFETY: the kernel writes a notification into memory that is zero, aligned for one, owned by
    // this function, and larger than any.
    let received = unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut room) };
    if received != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a notification is numbers only, of which any are valid, and lies at the aligned begin
    // of initialised memory.
    let of: libc::seccomp_notif = unsafe { std::ptr::read(room.0.as_ptr().cast()) };
    let [fd, offset, whence, ..] = of.data.args;
    Ok(Question {
        id: of.id,
        pid: of.pid,
        // The kernel takes the low half for the descriptor as well.
        fd: i32::try_from(fd & u64::from(u32::MAX)).unwrap_or(-1),
        offset,
        is_hole: whence & u64::from(u32::MAX) == u64::from(libc::SEEK_HOLE.unsigned_abs()),
    })
}

/// Answers a question.
pub(super) fn send(listener: &File, id: u64, answer: Answer) -> io::Result<()> {
    let (val, error, flags) = match answer {
        // No file is larger than an `i64`.
        Answer::Offset(offset) => (i64::try_from(offset).unwrap_or(i64::MAX), 0, 0),
        Answer::Error(errno) => (0, -errno.raw_os_error(), 0),
        Answer::Kernel => (0, 0, u32::try_from(libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE).unwrap_or_default()),
    };
    let response = libc::seccomp_notif_resp { id, val, error, flags };
    // SAFETY: the kernel reads the response, which outlives the call, and changes no memory of this
    // process.
    let sent = unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SEND, &raw const response) };
    if sent == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
