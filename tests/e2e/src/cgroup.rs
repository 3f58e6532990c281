//! A process's limits in the kernel's files, on cgroup v1 and v2.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::proc;

/// Returns whether this machine has the unified hierarchy alone.
pub fn is_v2() -> bool {
    Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
}

/// Folder of a process's cgroup for one v1 controller; on v2 the controller does not matter.
pub fn folder(pid: u32, controller: &str) -> Result<PathBuf> {
    let text = proc::read(pid, "cgroup")?;
    let mut found = None;
    for line in text.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        let path = path.trim_start_matches('/');
        if is_v2() && controllers.is_empty() {
            found = Some(Path::new("/sys/fs/cgroup").join(path));
        } else if !is_v2() && controllers.split(',').any(|c| c == controller) {
            found = Some(Path::new("/sys/fs/cgroup").join(controller).join(path));
        }
    }
    let folder = found.with_context(|| format!("no {controller} cgroup in {text:?}"))?;
    ensure!(folder.exists(), "{} does not exist", folder.display());
    Ok(folder)
}

fn value(pid: u32, controller: &str, v1: &str, v2: &str) -> Result<String> {
    let file = folder(pid, controller)?.join(if is_v2() { v2 } else { v1 });
    Ok(fs::read_to_string(&file).with_context(|| file.display().to_string())?.trim().to_owned())
}

/// The memory limit in bytes.
pub fn memory_limit(pid: u32) -> Result<u64> {
    value(pid, "memory", "memory.limit_in_bytes", "memory.max")?.parse().context("a memory limit")
}

/// The processor quota and its period, in microseconds.
pub fn cpu_quota(pid: u32) -> Result<(u64, u64)> {
    let (quota, period) = if is_v2() {
        let text = value(pid, "cpu", "", "cpu.max")?;
        let (quota, period) = text.split_once(' ').context("cpu.max")?;
        (quota.to_owned(), period.to_owned())
    } else {
        (value(pid, "cpu", "cpu.cfs_quota_us", "")?, value(pid, "cpu", "cpu.cfs_period_us", "")?)
    };
    Ok((quota.parse().with_context(|| format!("quota {quota:?}"))?, period.parse().context("period")?))
}

/// The largest permitted number of processes.
pub fn pids_limit(pid: u32) -> Result<u64> {
    value(pid, "pids", "pids.max", "pids.max")?.parse().context("pids.max")
}

/// Returns whether the cgroup is frozen.
pub fn frozen(pid: u32) -> Result<bool> {
    let text = value(pid, "freezer", "freezer.state", "cgroup.events")?;
    Ok(text == "FROZEN" || text.lines().any(|line| line == "frozen 1"))
}

/// Returns all cgroups of this name, in all hierarchies and wherever they are in them.
pub fn folders_named(name: &str) -> Vec<PathBuf> {
    fn search(folder: &Path, name: &str, found: &mut Vec<PathBuf>) {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        for entry in entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
            if entry.file_name() == name {
                found.push(entry.path());
            }
            search(&entry.path(), name, found);
        }
    }
    let mut found = Vec::new();
    search(Path::new("/sys/fs/cgroup"), name, &mut found);
    found
}
