//! The tree of processes in a directory of images.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use proc::ContainerPid;

use crate::format::{COMMON_MAGIC, ImageError, PSTREE, PSTREE_MAGIC, damaged};
use crate::wire::{Field, MAX_ENTRY, Reader, Value, fields, first_entry};

/// `PID_MAX_LIMIT` of Linux.
const MAX_TASKS: usize = 1 << 22;

pub(crate) struct Process {
    pub(crate) pid: ContainerPid,
    /// The parent process; `None` for the root, because the root's parent is not saved.
    pub(crate) parent: Option<ContainerPid>,
    pub(crate) threads: Vec<u64>,
}

pub(crate) fn core_path(images: &Path, thread: u64) -> PathBuf {
    images.join(format!("core-{thread}.img"))
}

pub(crate) fn processes(images: &Path) -> Result<Vec<Process>, ImageError> {
    let path = images.join(PSTREE);
    let mut reader = Reader::open(&path, &[COMMON_MAGIC, PSTREE_MAGIC])?;
    let mut processes = vec![];
    let mut tasks = 0;
    let (mut pids, mut threads) = (BTreeSet::new(), BTreeSet::new());
    while let Some(entry) = reader.entry(MAX_ENTRY)? {
        let (mut pid, mut parent, mut of_process) = (None, None, vec![]);
        let impossible = || damaged(&path, "a process has an impossible number");
        let number = |value| i32::try_from(value).map_err(|_| impossible());
        fields(&path, &entry, |Field { number: field, value, .. }| {
            match (field, value) {
                (1, Value::Number(value)) => pid = ContainerPid::new(number(value)?),
                (2, Value::Number(value)) => parent = ContainerPid::new(number(value)?),
                (5, Value::Number(value)) => of_process.push(value),
                _ => {}
            }
            Ok(())
        })?;
        let process = Process { pid: pid.ok_or_else(impossible)?, parent, threads: of_process };
        tasks += 1 + process.threads.len();
        if tasks > MAX_TASKS {
            return Err(damaged(&path, "it has too many processes"));
        }
        // Each duplicate would be read again, and its memory listed again.
        if !pids.insert(process.pid) || !process.threads.iter().all(|thread| threads.insert(*thread)) {
            return Err(damaged(&path, "a process is there twice"));
        }
        processes.push(process);
    }
    Ok(processes)
}

/// Returns the root's pid in its own pid namespace.
///
/// # Errors
/// Fails if the tree cannot be read.
pub fn root_pid(directory: &Path) -> Result<Option<i32>, ImageError> {
    let path = directory.join(PSTREE);
    let entry = first_entry(&path, &[COMMON_MAGIC, PSTREE_MAGIC], MAX_ENTRY)?;
    let mut pid = None;
    fields(&path, &entry, |Field { number, value, .. }| {
        if let (1, Value::Number(value)) = (number, value) {
            pid = i32::try_from(value).ok();
        }
        Ok(())
    })?;
    Ok(pid)
}
