//! Children of processes.

use std::fs;

use rustix::process::Signal;

use crate::{HostPid, ProcessHandle, Stat};

/// Returns the children of all threads of a process; none once the process has gone.
#[must_use]
pub fn children(pid: HostPid) -> Vec<HostPid> {
    let mut children = vec![];
    let Ok(threads) = fs::read_dir(pid.path("task")) else { return children };
    for thread in threads.flatten() {
        let list = fs::read_to_string(thread.path().join("children")).unwrap_or_default();
        children.extend(list.split_ascii_whitespace().filter_map(|pid| HostPid::new(pid.parse().ok()?)));
    }
    children
}

/// Kills a process and all descendants, descendants first: an orphan would become this process's
/// child unseen. Only a process with the expected parent is killed.
pub fn kill_tree(root: &ProcessHandle) {
    kill_descendants(root.pid());
    // A process already gone is the goal.
    let _ = root.signal(Signal::KILL);
}

/// Kills all descendants of a process.
pub fn kill_descendants(pid: HostPid) {
    for child in children(pid) {
        let Ok(handle) = ProcessHandle::open(child) else { continue };
        // The number may be another process's since the listing.
        if Stat::of(child).is_ok_and(|stat| stat.parent() == Some(pid)) {
            kill_tree(&handle);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    #[allow(clippy::disallowed_methods)]
    fn a_tree_is_killed_with_its_descendants() {
        let script = "(sleep 1000 & echo x; wait) & wait";
        let mut shell = Command::new("sh").args(["-c", script]).stdout(Stdio::piped()).spawn().unwrap();
        let pid = HostPid::new(i32::try_from(shell.id()).unwrap()).unwrap();
        let mut output = shell.stdout.take().unwrap();
        output.read_exact(&mut [0; 2]).unwrap();
        assert!(children(HostPid::own()).contains(&pid));
        let inner = children(pid);
        assert_eq!(inner.len(), 1);
        assert_eq!(children(inner[0]).len(), 1);
        kill_tree(&ProcessHandle::open(pid).unwrap());
        shell.wait().unwrap();
        // Every process that has the pipe open is gone.
        assert_eq!(output.read(&mut [0; 1]).unwrap(), 0);
        assert!(children(pid).is_empty());
    }
}
