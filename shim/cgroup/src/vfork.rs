//! Processes that wait in `vfork`, until a child of theirs has executed a program: shells and `posix_spawn` do so all
//! the time, for a moment. A container that is frozen in that moment cannot be dumped: the child stands still, so the
//! parent waits on in the kernel, where CRIU cannot stop it. CRIU would try for 10 s and fail.

use std::path::Path;

/// `CLONE_VFORK` of linux/sched.h.
const CLONE_VFORK: u64 = 0x4000;

/// The first of these processes that has a thread which waits so. To be asked when all of them stand still.
pub(crate) fn waiting(pids: &[i32]) -> Option<i32> {
    pids.iter().copied().find(|pid| threads_wait(*pid))
}

fn threads_wait(pid: i32) -> bool {
    // A process that has ended waits for nothing.
    let Ok(tasks) = std::fs::read_dir(Path::new("/proc").join(pid.to_string()).join("task")) else { return false };
    tasks.flatten().any(|task| std::fs::read_to_string(task.path().join("syscall")).is_ok_and(|call| is_vfork(&call)))
}

/// `/proc/PID/task/TID/syscall` (proc_pid_syscall(5)): the number of the call and its arguments.
fn is_vfork(call: &str) -> bool {
    let mut words = call.split_ascii_whitespace();
    let Some(Ok(number)) = words.next().map(str::parse::<libc::c_long>) else { return false };
    #[cfg(target_arch = "x86_64")]
    if number == libc::SYS_vfork {
        return true;
    }
    // The flags of clone3 are in the process's memory; but only this makes it wait.
    let flags = words.next().and_then(|flags| u64::from_str_radix(flags.trim_start_matches("0x"), 16).ok());
    number == libc::SYS_clone3
        || number == libc::SYS_clone && flags.is_some_and(|flags| flags & CLONE_VFORK == CLONE_VFORK)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_for_a_vforked_child_is_told_from_other_calls() {
        let clone = libc::SYS_clone;
        assert!(is_vfork(&format!("{clone} 0x4111 0x0 0x0 0x0 0x0 0x0 0x7ffe 0x7f00")));
        assert!(!is_vfork(&format!("{clone} 0x1200011 0x0 0x0 0x0 0x0 0x0 0x7ffe 0x7f00")));
        assert!(is_vfork(&format!("{} 0x7ffe 0x58 0x0 0x0 0x0 0x0 0x7ffe 0x7f00", libc::SYS_clone3)));
        assert!(!is_vfork("0 0x4000 0x4000 0x0 0x0 0x0 0x0 0x7ffe 0x7f00"));
        assert!(!is_vfork("-1 0x7ffe 0x7f00"));
        assert!(!is_vfork("running"));
    }

    #[test]
    fn this_process_does_not_wait() {
        assert_eq!(waiting(&[i32::try_from(std::process::id()).unwrap()]), None);
    }
}
