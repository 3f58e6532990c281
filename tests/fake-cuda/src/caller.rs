//! The checkpoint API: calls of any process on any other, by the latter's pid as seen by the
//! caller. cuInit is not needed.
//!
//! As with the real driver, a call on a process with a stopped or frozen driver thread never
//! returns.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use crate::code::{Code, Result};
use crate::control::{self, Operation, Pair};
use crate::sys::memory::ControlPage;
use crate::sys::os::{self, Scope};

/// Returns whether the path, from a process's links or maps, is a control page.
fn is_control(path: &[u8]) -> bool {
    path.strip_prefix(b"/memfd:").is_some_and(|name| name.starts_with(control::NAME.as_bytes()))
}

/// A missing or invisible process: nothing is known.
fn unseen(_: io::Error) -> Code {
    Code::OPERATING_SYSTEM
}

/// A process with CUDA.
struct Process {
    handle: OwnedFd,
    memory: File,
    page: ControlPage,
}

impl Process {
    /// Finds a process: NOT_INITIALIZED without CUDA, OPERATING_SYSTEM without a process.
    fn find(pid: i32) -> Result<Self> {
        let handle = os::pidfd(pid).ok_or(Code::OPERATING_SYSTEM)?;
        let memory = control_file(pid)?;
        let page = ControlPage::open(&memory)?;
        if page.magic.load(SeqCst) != control::MAGIC {
            return Err(Code::NOT_INITIALIZED);
        }
        // From here on it is certain that all lookups were about one process.
        if os::has_ended(&handle) {
            return Err(Code::OPERATING_SYSTEM);
        }
        Ok(Self { handle, memory, page })
    }

    fn ask(&self, operation: Operation, timeout_ms: u32, pairs: &[Pair]) -> Result<()> {
        os::lock_byte(self.memory.as_fd(), 0)?;
        let number = self.page.next_number();
        os::lock_byte(self.memory.as_fd(), u64::from(number))?;
        self.page.post(operation, timeout_ms, pairs, number);
        os::wake(&self.page.request, Scope::Shared);
        loop {
            let answer = self.page.answer.load(SeqCst);
            if answer == number {
                break;
            }
            // A process that dies wakes nobody.
            if os::has_ended(&self.handle) {
                return Err(Code::OPERATING_SYSTEM);
            }
            os::wait(&self.page.answer, answer, Scope::Shared, Some(Duration::from_millis(20)));
        }
        match self.page.result.load(SeqCst) {
            0 => Ok(()),
            code => Err(Code(code)),
        }
    }
}

/// The memfd of a process's control page. A child of fork has the descriptor but not the mapping.
fn control_file(pid: i32) -> Result<File> {
    let process = PathBuf::from(format!("/proc/{pid}"));
    let maps = fs::read(process.join("maps")).map_err(unseen)?;
    let mapped = |line: &[u8]| line.iter().position(|byte| *byte == b'/').is_some_and(|at| is_control(&line[at..]));
    if !maps.split(|byte| *byte == b'\n').any(mapped) {
        return Err(Code::NOT_INITIALIZED);
    }
    for entry in fs::read_dir(process.join("fd")).map_err(unseen)?.flatten() {
        let path = entry.path();
        if fs::read_link(&path).is_ok_and(|target| is_control(target.as_os_str().as_bytes())) {
            return OpenOptions::new().read(true).write(true).open(path).map_err(unseen);
        }
    }
    Err(Code::NOT_INITIALIZED)
}

pub(crate) fn state(pid: i32) -> Result<u32> {
    let process = Process::find(pid)?;
    process.ask(Operation::State, 0, &[])?;
    Ok(process.page.state.load(SeqCst))
}

/// The thread that must run for a restore, as seen by the caller.
pub(crate) fn restore_thread(pid: i32) -> Result<i32> {
    Process::find(pid)?.ask(Operation::RestoreThread, 0, &[])?;
    for task in fs::read_dir(format!("/proc/{pid}/task")).map_err(unseen)?.flatten() {
        let name = fs::read(task.path().join("comm")).unwrap_or_default();
        let is_restore_thread = name
            .trim_ascii_end()
            .strip_prefix(b"cuda")
            .is_some_and(|digits| digits.len() == 11 && digits.iter().all(u8::is_ascii_hexdigit));
        if is_restore_thread {
            let thread = task.file_name().to_str().and_then(|name| name.parse().ok());
            return thread.ok_or(Code::OPERATING_SYSTEM);
        }
    }
    Err(Code::NOT_INITIALIZED)
}

/// Lock (0 milliseconds: no limit), Checkpoint, Restore or Unlock.
pub(crate) fn change(pid: i32, operation: Operation, timeout_ms: u32, pairs: &[Pair]) -> Result<()> {
    Process::find(pid)?.ask(operation, timeout_ms, pairs)
}

/// NVML's entry for a process with contexts.
pub(crate) struct Use {
    pub(crate) pid: u32,
    /// A bit for each minor number.
    pub(crate) devices: u64,
    pub(crate) memory: u64,
}

/// Visible processes that are RUNNING or LOCKED with a context. No process is asked: frozen ones
/// count.
pub(crate) fn users() -> Vec<Use> {
    let Ok(processes) = fs::read_dir(Path::new("/proc")) else { return Vec::new() };
    let pids = processes.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter_map(|pid| {
        let page = ControlPage::open(&control_file(i32::try_from(pid).ok()?).ok()?).ok()?;
        let devices = page.devices.load(SeqCst);
        (devices != 0).then(|| Use { pid, devices, memory: page.memory.load(SeqCst) })
    })
    .collect()
}
