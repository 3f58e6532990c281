//! Calls into the C library that have no safe form.

use rustix::process::Signal;

/// Keeps glibc from making a heap of 64 MB address space, and its touched pages, for every thread: the shim's threads
/// allocate little, and it runs once per pod.
pub(crate) fn keep_one_malloc_arena() {
    // SAFETY: mallopt only writes glibc's own parameters, and no other thread exists yet to read them.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// The signal with this number, real-time ones included.
pub(crate) fn signal(number: u32) -> Option<Signal> {
    /// Highest signal number of the kernel (`_NSIG`).
    const LAST: i32 = 64;
    let number = i32::try_from(number).ok().filter(|number| (1..=LAST).contains(number))?;
    // SAFETY: the kernel knows every number in the range. rustix's condition is about the numbers that the C library
    // keeps for itself: it must not be handled or blocked in this process. It is only ever sent to other processes.
    Some(unsafe { Signal::from_raw_unchecked(number) })
}
