//! Processes that wait in `vfork`, until a child of theirs has executed a program: shells and `posix_spawn` do so all
//! the time, for a moment. A container that is frozen in that moment cannot be dumped: the child stands still, so the
//! parent waits on in the kernel, where CRIU cannot stop it. CRIU would try for 10 s and fail.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use proc::{HostPid, Stat};

/// `CLONE_VFORK` of linux/sched.h: the only flag that makes the caller wait.
const CLONE_VFORK: u64 = 0x4000;

/// Numbers of the calls of 32-bit programs, which `/proc/PID/syscall` does not tell from those of 64-bit ones
/// (arch/x86/entry/syscalls/syscall_32.tbl). That of `clone3` is the same for both.
#[cfg(target_arch = "x86_64")]
mod compat {
    pub(super) const VFORK: libc::c_long = 190;
    pub(super) const CLONE: libc::c_long = 120;
}

/// A call that may make a thread wait so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    Vfork,
    /// `clone` with these flags.
    Clone(u64),
    /// `clone3`: its flags are the first word of the memory at this address.
    Clone3(u64),
}

/// Looks at a thread that still runs in a frozen cgroup, and the pause between two. On version 2 a thread counts as
/// frozen a moment before it waits for its vforked child, and shows no call until it does.
const LOOKS: u32 = 50;
const BETWEEN_LOOKS: Duration = Duration::from_millis(1);

/// Returns the first process of a frozen cgroup that has a thread which waits so.
pub(crate) fn waiting_in_frozen(pids: &[HostPid]) -> Option<HostPid> {
    pids.iter().copied().find(|pid| threads_wait(*pid, LOOKS))
}

/// Returns the first of these processes that has a thread which waits so. A thread that runs does not.
///
/// A thread that was just made shows the call that made it, and so does the one that made it, until they are back in
/// their program. They wait for nothing, unless the call was a vfork.
#[cfg(test)]
pub(crate) fn waiting(pids: &[HostPid]) -> Option<HostPid> {
    pids.iter().copied().find(|pid| threads_wait(*pid, 1))
}

fn threads_wait(pid: HostPid, looks: u32) -> bool {
    // A process that has ended waits for nothing.
    let Ok(tids) = proc::tids(pid) else { return false };
    tids.into_iter().any(|tid| waits(pid, tid, looks))
}

/// Reads the line of `/proc/PID/syscall`, so many times at most while the line says that the thread runs.
fn line(mut read: impl FnMut() -> io::Result<String>, looks: u32) -> io::Result<String> {
    let mut line = read()?;
    for _ in 1..looks {
        if line.trim() != "running" {
            break;
        }
        std::thread::sleep(BETWEEN_LOOKS);
        line = read()?;
    }
    Ok(line)
}

fn waits(pid: HostPid, tid: i32, looks: u32) -> bool {
    let file = |name: &str| pid.path(&format!("task/{tid}/{name}"));
    let Ok(text) = line(|| std::fs::read_to_string(file("syscall")), looks) else { return false };
    let is_vfork = match call(&text, || is_32_bit(pid)) {
        None => false,
        Some(Call::Vfork) => true,
        Some(Call::Clone(flags)) => is_set(flags),
        Some(Call::Clone3(arguments)) => {
            let mut flags = [0; 8];
            let read = File::open(file("mem")).and_then(|memory| memory.read_exact_at(&mut flags, arguments));
            // Memory that cannot be read was none when the call was made, which has failed then; or it is gone.
            read.is_ok() && is_set(u64::from_le_bytes(flags))
        }
    };
    // A stopped thread has come out of its wait: it is stopped on its way back to its program.
    is_vfork && Stat::of_thread(pid, tid).is_ok_and(|stat| !matches!(stat.state(), b't' | b'T'))
}

fn is_set(flags: u64) -> bool {
    flags & CLONE_VFORK == CLONE_VFORK
}

/// Parses a line of `/proc/PID/syscall` (proc_pid_syscall(5)): the number of the call and its arguments.
fn call(line: &str, is_32_bit: impl FnOnce() -> bool) -> Option<Call> {
    let mut words = line.split_ascii_whitespace();
    let number: libc::c_long = words.next()?.parse().ok()?;
    let first = words.next().and_then(|word| u64::from_str_radix(word.trim_start_matches("0x"), 16).ok())?;
    #[cfg(target_arch = "x86_64")]
    match number {
        libc::SYS_vfork => return Some(Call::Vfork),
        compat::VFORK => return is_32_bit().then_some(Call::Vfork),
        compat::CLONE => return is_32_bit().then_some(Call::Clone(first)),
        _ => {}
    }
    match number {
        libc::SYS_clone => Some(Call::Clone(first)),
        libc::SYS_clone3 => Some(Call::Clone3(first)),
        _ => None,
    }
}

/// Returns whether the program of a process is a 32-bit one: the fifth byte of an ELF file says so.
fn is_32_bit(pid: HostPid) -> bool {
    let mut header = [0; 5];
    let read = File::open(pid.path("exe")).and_then(|file| file.read_exact_at(&mut header, 0));
    read.is_ok() && header == *b"\x7fELF\x01"
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    #[test]
    fn a_wait_for_a_vforked_child_is_told_from_other_calls() {
        let of = |line: &str| call(line, || false);
        let line = |number: libc::c_long, first: &str| format!("{number} {first} 0x0 0x0 0x0 0x0 0x0 0x7ffe 0x7f00");
        assert_eq!(of(&line(libc::SYS_clone, "0x4111")), Some(Call::Clone(0x4111)));
        assert!(is_set(0x4111));
        assert!(!is_set(0x0120_0011));
        assert_eq!(of(&line(libc::SYS_clone3, "0x7ffe")), Some(Call::Clone3(0x7ffe)));
        assert_eq!(of("0 0x4000 0x4000 0x0 0x0 0x0 0x0 0x7ffe 0x7f00"), None);
        assert_eq!(of("-1 0x7ffe 0x7f00"), None);
        assert_eq!(of("running"), None);
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn numbers_of_32_bit_calls_count_in_32_bit_programs_only() {
        let line = "190 0x0 0x0 0x0 0x0 0x0 0x0 0x7ffe 0x7f00";
        assert_eq!((call(line, || true), call(line, || false)), (Some(Call::Vfork), None));
        let line = "120 0x4111 0x0 0x0 0x0 0x0 0x0 0x7ffe 0x7f00";
        assert_eq!((call(line, || true), call(line, || false)), (Some(Call::Clone(0x4111)), None));
        assert!(!is_32_bit(HostPid::own()));
    }

    #[test]
    fn a_thread_that_runs_is_looked_at_until_it_shows_its_call() {
        let looked = |looks| {
            let mut lines = ["running\n", "running\n", "58 0x0\n"].into_iter();
            line(|| Ok(lines.next().unwrap().to_owned()), looks).unwrap()
        };
        assert_eq!((looked(1).as_str(), looked(2).as_str()), ("running\n", "running\n"));
        assert_eq!((looked(3).as_str(), looked(LOOKS).as_str()), ("58 0x0\n", "58 0x0\n"));
    }

    #[test]
    fn this_process_does_not_wait() {
        assert_eq!(waiting(&[HostPid::own()]), None);
    }

    /// Threads are made and end all the time, as in a server with one for each request. Each look at them may meet one
    /// that still shows the call that made it.
    #[test]
    fn a_thread_that_was_just_made_does_not_wait() {
        let ends = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !ends.load(std::sync::atomic::Ordering::Relaxed) {
                    let _ = std::thread::spawn(|| ()).join();
                }
            });
            let waited = (0..2000).find_map(|_| waiting(&[HostPid::own()]));
            ends.store(true, std::sync::atomic::Ordering::Relaxed);
            assert_eq!(waited, None);
        });
    }

    #[test]
    fn a_parent_of_a_vforked_child_that_stands_still_waits() {
        let folder = tempfile::tempdir().unwrap();
        let Some(parent) = Parent::start(folder.path()) else { return };
        parent.let_child_go();
        while waiting(&[parent.pid]).is_some() {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        parent.ends();
    }

    /// A process that waits in `vfork` for a child that stands still.
    pub(crate) struct Parent {
        pub(crate) pid: HostPid,
        python: std::process::Child,
        fifo: std::path::PathBuf,
    }

    impl Parent {
        /// Returns the process when it waits, or `None` without a python3.
        pub(crate) fn start(folder: &std::path::Path) -> Option<Self> {
            // python's posix_spawn is vfork where the C library has it. The child opens a fifo that nobody writes, before
            // it executes its program.
            let script = "import os, sys\n\
                os.posix_spawn('/bin/true', ['true'], {}, file_actions=[(os.POSIX_SPAWN_OPEN, 0, sys.argv[1], os.O_RDONLY, 0)])\n";
            let fifo = folder.join("fifo");
            rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
            let python = match std::process::Command::new("python3").args(["-c", script]).arg(&fifo).spawn() {
                Ok(python) => python,
                Err(error) => {
                    eprintln!("skipped: there is no python3: {error}");
                    return None;
                }
            };
            let pid = rustix::process::Pid::from_child(&python).into();
            while waiting(&[pid]).is_none() {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            Some(Self { pid, python, fifo })
        }

        pub(crate) fn let_child_go(&self) {
            drop(File::options().write(true).open(&self.fifo).unwrap());
        }

        pub(crate) fn ends(mut self) {
            #[allow(clippy::disallowed_methods)]
            let ended = self.python.wait().unwrap();
            assert!(ended.success());
        }
    }
}
