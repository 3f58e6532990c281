//! Unsafe code: descriptors that cross an exec, and system calls without a safe wrapper.

use std::ffi::{CStr, CString, c_char};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Keeps `fds` open, under the same numbers, across the exec of `command`. `fds` must live until
/// the spawn.
pub(super) fn inherit(command: &mut Command, fds: &[BorrowedFd<'_>]) {
    let fds: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let keep = move || {
        for &fd in &fds {
            // SAFETY: the number is only handed to fcntl, which answers EBADF if it is not open.
            let fd = unsafe { BorrowedFd::borrow_raw(fd) };
            rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure only calls fcntl; it neither allocates nor takes a lock.
    unsafe { command.pre_exec(keep) };
}

/// Takes over a descriptor left open for this process by [`inherit`], by its number.
pub(super) fn take(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the number is only handed to fcntl, which answers EBADF if it is not open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    rustix::io::fcntl_setfd(borrowed, rustix::io::FdFlags::CLOEXEC)?;
    // SAFETY: the descriptor is open, as the call above showed, and was opened for this process to
    // own; nothing here made it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Adds attributes (`MOUNT_ATTR_RDONLY` and so on) to the mount rooted at `mount`, and with
/// `recursive` to all mounts below.
pub(super) fn add_mount_attributes(mount: BorrowedFd<'_>, recursive: bool, attributes: u64) -> io::Result<()> {
    set_mount_attributes(
        mount,
        recursive,
        &libc::mount_attr { attr_set: attributes, attr_clr: 0, propagation: 0, userns_fd: 0 },
    )
}

/// Gives a propagation type (`MS_PRIVATE` and so on) to the mount rooted at `mount`, and with
/// `recursive` to all mounts below.
pub(super) fn set_propagation(mount: BorrowedFd<'_>, recursive: bool, propagation: u64) -> io::Result<()> {
    set_mount_attributes(mount, recursive, &libc::mount_attr { attr_set: 0, attr_clr: 0, propagation, userns_fd: 0 })
}

fn set_mount_attributes(mount: BorrowedFd<'_>, recursive: bool, attributes: &libc::mount_attr) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a C string, and the kernel reads the structure up to the given size.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            std::ptr::from_ref(attributes),
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Joins the session keyring `name`, creating a missing one, and lets this user search by name.
pub(super) fn join_session_keyring(name: &CStr) -> io::Result<()> {
    // Numbers of linux/keyctl.h and linux/key.h.
    const KEYCTL_JOIN_SESSION_KEYRING: i32 = 1;
    const KEYCTL_SETPERM: i32 = 5;
    const POSSESSOR_ALL: u32 = 0x3f00_0000;
    const USER_VIEW_READ_SEARCH_LINK: u32 = 0x001b_0000;
    // SAFETY: the name is a C string.
    let keyring = unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, name.as_ptr()) };
    if keyring < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: this call takes numbers only.
    let result =
        unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_SETPERM, keyring, POSSESSOR_ALL | USER_VIEW_READ_SEARCH_LINK) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Becomes another program. Returns only with an error.
///
/// SIGPIPE gets the default action again: Rust ignores SIGPIPE, and an ignored signal stays ignored
/// across an exec.
pub(super) fn execute(path: &CStr, arguments: &[CString], environment: &[CString]) -> io::Error {
    let pointers = |strings: &[CString]| -> Vec<*const c_char> {
        strings.iter().map(|string| string.as_ptr()).chain([std::ptr::null()]).collect()
    };
    let arguments = pointers(arguments);
    let environment = pointers(environment);
    // SAFETY: the default action runs no code of this process.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    // SAFETY: both lists end with a null pointer, and their strings outlive the call.
    unsafe { libc::execve(path.as_ptr(), arguments.as_ptr(), environment.as_ptr()) };
    io::Error::last_os_error()
}

/// Loads a seccomp filter for this process. Each instruction is a `struct sock_filter` in memory
/// order.
pub(super) fn load_filter(instructions: &[u64], flags: u64) -> io::Result<()> {
    let program = libc::sock_fprog {
        len: u16::try_from(instructions.len()).map_err(io::Error::other)?,
        // The kernel only reads the instructions.
        filter: instructions.as_ptr().cast_mut().cast(),
    };
    // SAFETY: the kernel reads the structure, and `len` instructions of 8 bytes.
    let result =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, std::ptr::from_ref(&program)) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Loads a program that decides about the use of devices.
pub(super) fn load_device_program(instructions: &[u64]) -> io::Result<OwnedFd> {
    // Numbers of linux/bpf.h.
    const BPF_PROG_LOAD: u32 = 5;
    const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
    #[repr(C)]
    struct Attributes {
        program_type: u32,
        instruction_count: u32,
        instructions: *const u64,
        license: *const c_char,
        log_level: u32,
        log_size: u32,
        log: *mut c_char,
        kernel_version: u32,
        flags: u32,
    }
    let attributes = Attributes {
        program_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        instruction_count: u32::try_from(instructions.len()).map_err(io::Error::other)?,
        instructions: instructions.as_ptr(),
        // The program calls no function with a licence check.
        license: c"Apache-2.0".as_ptr(),
        log_level: 0,
        log_size: 0,
        log: std::ptr::null_mut(),
        kernel_version: 0,
        flags: 0,
    };
    let fd = bpf(BPF_PROG_LOAD, &attributes)?;
    // SAFETY: the call made this descriptor, and nothing else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Attaches such a program to a cgroup, beside other programs.
pub(super) fn attach_device_program(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    // Numbers of linux/bpf.h.
    const BPF_PROG_ATTACH: u32 = 8;
    const BPF_CGROUP_DEVICE: u32 = 6;
    const BPF_F_ALLOW_MULTI: u32 = 2;
    #[repr(C)]
    struct Attributes {
        target: RawFd,
        program: RawFd,
        attach_type: u32,
        flags: u32,
    }
    let attributes = Attributes {
        target: cgroup.as_raw_fd(),
        program: program.as_raw_fd(),
        attach_type: BPF_CGROUP_DEVICE,
        flags: BPF_F_ALLOW_MULTI,
    };
    bpf(BPF_PROG_ATTACH, &attributes).map(drop)
}

fn bpf<T>(command: u32, attributes: &T) -> io::Result<RawFd> {
    // SAFETY: the kernel reads the attributes up to the given size, and the data behind their
    // pointers, kept by the callers, up to its stated size. The kernel writes nothing: no log is
    // requested.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { RawFd::try_from(result).map_err(io::Error::other) }
}

/// Ends a cloned process without exit handlers: the original's work must not be undone.
pub(super) fn exit(code: i32) -> ! {
    // SAFETY: no code of this process runs after it.
    unsafe { libc::_exit(code) }
}
