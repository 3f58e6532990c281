//! Holds threads like a debugger.

use std::ptr::null_mut;

/// Stops the threads of a process with wanted names. The calling thread must let them go.
pub(crate) fn hold(pid: u32, wanted: impl Fn(&str) -> bool) -> Vec<i32> {
    let threads = super::threads(pid).into_iter().filter(|(_, name)| wanted(name));
    let held: Vec<i32> = threads.map(|(thread, _)| i32::try_from(thread).unwrap()).collect();
    for thread in &held {
        trace(libc::PTRACE_SEIZE, *thread);
        trace(libc::PTRACE_INTERRUPT, *thread);
        let mut status = 0;
        // SAFETY: room for the status.
        let stopped = unsafe { libc::waitpid(*thread, &raw mut status, libc::__WALL) };
        assert_eq!(stopped, *thread);
    }
    held
}

pub(crate) fn let_go(held: Vec<i32>) {
    for thread in held {
        trace(libc::PTRACE_DETACH, thread);
    }
}

fn trace(request: libc::c_uint, thread: i32) {
    // SAFETY: requests without data, on a thread of a program of this test.
    let done = unsafe { libc::ptrace(request, thread, null_mut::<u8>(), null_mut::<u8>()) };
    assert_eq!(done, 0, "ptrace {request}: {}", std::io::Error::last_os_error());
}
