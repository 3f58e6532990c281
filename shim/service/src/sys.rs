//! Calls into the C library without a safe form.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::process::Signal;

/// Keeps glibc from making a heap of 64 MB address space for every thread, with its touched pages:
/// the shim's threads allocate little, and each pod has a shim.
pub(crate) fn keep_one_malloc_arena() {
    // SAFETY: mallopt only writes glibc's own parameters, and no other thread exists yet.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Drops the pages of program code from this process's resident memory; used pages return from the
/// page cache, one fault at a time. A shim runs most of its code at the start, then waits for
/// weeks.
pub(crate) fn drop_code_pages() -> io::Result<()> {
    for line in std::fs::read_to_string("/proc/self/maps")?.lines() {
        // address-range permissions offset device inode path
        let mut fields = line.split_ascii_whitespace();
        let (Some(range), Some("r-xp")) = (fields.next(), fields.next()) else { continue };
        let in_file = fields.nth(3).is_some_and(|path| path.starts_with('/'));
        let Some((start, end)) = range.split_once('-').filter(|_| in_file) else { continue };
        let parse = |address| usize::from_str_radix(address, 16).map_err(io::Error::other);
        let (start, end) = (parse(start)?, parse(end)?);
        // SAFETY: the range is a private mapping of a file that was never writable (code is not
        // relocated), so all its pages are the file's own and come back unchanged when touched,
        // also under running code. Mappings made or removed by other threads meanwhile are data: no
        // code is loaded or unloaded after the start.
        let dropped = unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_DONTNEED) };
        if dropped != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Returns the signal with this number, real-time ones included.
pub(crate) fn signal(number: u32) -> Option<Signal> {
    /// Highest signal number of the kernel (`_NSIG`).
    const LAST: i32 = 64;
    let number = i32::try_from(number).ok().filter(|number| (1..=LAST).contains(number))?;
    // SAFETY: the kernel knows every number in the range. rustix's condition is about the C
    // library's reserved numbers: they must not be handled or blocked here. This process only sends
    // them to others.
    Some(unsafe { Signal::from_raw_unchecked(number) })
}

/// Starts a process in a new user namespace, without ids yet. The process waits to be killed, and
/// ends with the calling thread.
pub(crate) fn spawn_in_user_namespace() -> io::Result<i32> {
    let flags = i64::from(libc::CLONE_NEWUSER | libc::SIGCHLD);
    // SAFETY: without CLONE_VM the child has a copy of this process's memory, as after a fork. Its
    // only calls are safe there (no lock, no allocation), and it never returns.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    match pid {
        0 => wait_to_be_killed(),
        -1 => Err(io::Error::last_os_error()),
        pid => i32::try_from(pid).map_err(io::Error::other),
    }
}

fn wait_to_be_killed() -> ! {
    // SAFETY: the call only sets the signal for the end of the parent's thread.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) };
    loop {
        // SAFETY: the call only waits for a signal.
        unsafe { libc::pause() };
    }
}

/// Layout of the kernel's `struct mount_attr`.
#[repr(C)]
struct MountAttributes {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

/// Maps the owners of files seen through `mount`, a detached mount, by the ids of a user namespace.
pub(crate) fn map_ids(mount: BorrowedFd<'_>, user_namespace: BorrowedFd<'_>) -> io::Result<()> {
    const MOUNT_ATTR_IDMAP: u64 = 0x0010_0000;
    let user_namespace = u64::try_from(user_namespace.as_raw_fd()).map_err(io::Error::other)?;
    let attributes = MountAttributes { set: MOUNT_ATTR_IDMAP, clear: 0, propagation: 0, user_namespace };
    // SAFETY: the path is an empty C string, the structure has the kernel's layout and its true
    // size is given; both outlive the call, which only reads them.
    let set = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<MountAttributes>(),
        )
    };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
