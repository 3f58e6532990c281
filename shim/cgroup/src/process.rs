//! Who is in a cgroup, and signals to all of them.

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use proc::HostPid;
use rustix::process::{PidfdFlags, Signal};

use crate::{Cgroup, CgroupError, file, freezer};

/// How often the processes are listed anew to signal those that came meanwhile. Without a freezer, processes that fork
/// faster than they can be signalled would keep this going for ever.
const PASSES: usize = 100;

/// How many pidfds are held at a time: far fewer than a shim may open.
const BATCH: usize = 128;

/// The processes in `directory` and all cgroups below it.
pub(crate) fn pids(directory: &Path) -> Result<Vec<HostPid>, CgroupError> {
    let mut pids = HashSet::new();
    for cgroup in subtree(directory)? {
        let Some(text) = file::text(&cgroup.join("cgroup.procs"))? else { continue };
        // 0 stands for a process that this pid namespace does not see.
        pids.extend(text.lines().filter_map(|line| HostPid::new(line.parse().ok()?)));
    }
    let mut pids: Vec<HostPid> = pids.into_iter().collect();
    pids.sort_unstable();
    Ok(pids)
}

/// `directory` and all cgroups below it, parents first. Not recursive: what is in a container decides how deep it goes.
pub(crate) fn subtree(directory: &Path) -> Result<Vec<PathBuf>, CgroupError> {
    let mut found = vec![];
    let mut next = vec![directory.to_owned()];
    while let Some(cgroup) = next.pop() {
        let entries = match std::fs::read_dir(&cgroup) {
            Ok(entries) => entries,
            Err(error) if file::is_gone(&error) => continue,
            Err(source) => return Err(CgroupError::File { action: "read", path: cgroup, source }),
        };
        for entry in entries {
            // A cgroup that is removed while it is listed has nobody in it.
            let Ok(entry) = entry else { break };
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                next.push(entry.path());
            }
        }
        found.push(cgroup);
    }
    Ok(found)
}

/// Signals everyone, and those who come meanwhile, once each.
pub(crate) fn signal(directory: &Path, signal: Signal) -> Result<(), CgroupError> {
    let mut signalled = HashSet::new();
    for _ in 0..PASSES {
        if signal_new(directory, signal, &mut signalled)? == 0 {
            return Ok(());
        }
    }
    Err(CgroupError::Unfinished { action: "signal", path: directory.to_owned() })
}

/// Signals everyone who is not in `signalled` yet, and returns how many those were. With SIGKILL the others are
/// signalled once more: it does no harm, and one of their pids may be another process's by now.
fn signal_new(directory: &Path, signal: Signal, signalled: &mut HashSet<HostPid>) -> Result<usize, CgroupError> {
    let mut targets = pids(directory)?;
    refuse_own(directory, &targets)?;
    let new = targets.iter().filter(|pid| !signalled.contains(pid)).count();
    if signal != Signal::KILL {
        targets.retain(|pid| !signalled.contains(pid));
    }
    for batch in targets.chunks(BATCH) {
        let opened: Vec<(HostPid, OwnedFd)> = batch.iter().filter_map(|pid| Some((*pid, open(*pid)?))).collect();
        // A process may have ended between the list and its pidfd, and another one, from outside, may have got its
        // pid. If the pid is still in the cgroup now, then the pidfd is of that process, or of one that is dead.
        let still: HashSet<HostPid> = pids(directory)?.into_iter().collect();
        for (pid, pidfd) in opened {
            if still.contains(&pid)
                && let Err(error) = rustix::process::pidfd_send_signal(&pidfd, signal)
            {
                tracing::debug!(%pid, %error, "cannot signal a process: it has ended");
            }
        }
    }
    signalled.extend(&targets);
    Ok(new)
}

fn open(pid: HostPid) -> Option<OwnedFd> {
    rustix::process::pidfd_open(pid.as_pid(), PidfdFlags::empty()).ok()
}

/// Kills everyone through the kernel's own `cgroup.kill`, which no fork can outrun. False where the kernel (before
/// 5.14) or the cgroup (a threaded one) has none.
pub(crate) fn kill_v2(directory: &Path) -> Result<bool, CgroupError> {
    let kill = directory.join("cgroup.kill");
    if !kill.exists() {
        // Nothing is left to kill in a cgroup that is gone.
        return Ok(!directory.exists());
    }
    refuse_own(directory, &pids(directory)?)?;
    match file::write(&kill, "1") {
        Ok(()) => Ok(true),
        Err(CgroupError::File { source, .. }) if file::is_gone(&source) => Ok(true),
        Err(CgroupError::File { source, .. })
            if source.raw_os_error() == Some(rustix::io::Errno::OPNOTSUPP.raw_os_error()) =>
        {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// Kills everyone one by one. They stand still meanwhile, so that a process that forks all the time cannot be a pid
/// ahead for ever; where they cannot be made to, it is tried without.
pub(crate) fn kill(cgroup: &Cgroup) -> Result<(), CgroupError> {
    let directory = cgroup.directory();
    let mut signalled = HashSet::new();
    for _ in 0..PASSES {
        match freezer::freeze(cgroup) {
            Ok(()) => {}
            Err(CgroupError::Unfinished { .. } | CgroupError::Uninterruptible { .. }) => {
                tracing::warn!(cgroup = %directory.display(), "cannot freeze a cgroup to kill what is in it");
            }
            Err(error) => return Err(error),
        }
        let new = signal_new(directory, Signal::KILL, &mut signalled);
        // Whatever happened, nothing may stay frozen: on v1 the killed die only when they are thawed.
        freezer::thaw_all(cgroup)?;
        if new? == 0 {
            return Ok(());
        }
    }
    Err(CgroupError::Unfinished { action: "signal", path: directory.to_owned() })
}

/// Who freezes or kills itself cannot thaw anyone any more.
pub(crate) fn refuse_own(directory: &Path, pids: &[HostPid]) -> Result<(), CgroupError> {
    if pids.contains(&HostPid::own()) {
        return Err(CgroupError::Own { path: directory.to_owned() });
    }
    Ok(())
}
