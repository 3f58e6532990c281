//! Processes that another one has in its hand: their threads held by ptrace, and system calls that those make for it.

#![deny(unsafe_code)]

pub mod hold;
pub mod inject;
pub mod process;
pub mod stack;
#[cfg(any(test, feature = "steps"))]
pub mod steps;
pub mod watch;

/// In tests, threads with names of the driver's kind are spared, but for those that are called as the first one.
#[cfg(test)]
fn spared(pid: proc::HostPid, threads: &[proc::Thread]) -> Vec<i32> {
    let first = threads.iter().find(|thread| thread.tid == pid.raw()).map(|thread| &thread.name);
    let is_spared = |thread: &&proc::Thread| thread.name.starts_with("cuda") && first != Some(&thread.name);
    threads.iter().filter(is_spared).map(|thread| thread.tid).collect()
}
