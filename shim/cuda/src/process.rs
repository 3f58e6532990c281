//! What a process has of the driver: its devices, mapped or open, and its threads.
//!
//! Everything here is a look at one moment, as in [`tracee::process`].

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use proc::{ContainerPid, HostPid, ProcessIds, Status, Thread};
use tracee::process::{DeviceFd, DeviceMapping, fds_matching, mappings_matching};

/// What the names of the driver's device nodes begin with: nvidiactl, nvidia0, nvidia-uvm, nvidia-caps/nvidia-cap1, ...
const DEVICES: &[u8] = b"/dev/nvidia";

/// The mappings of the driver's device nodes in a process.
///
/// # Errors
/// When there is no such process.
pub fn device_mappings(pid: HostPid) -> io::Result<Vec<DeviceMapping>> {
    mappings_matching(pid, is_device)
}

/// The descriptors of the driver's device nodes that a process has open.
///
/// # Errors
/// When there is no such process.
pub fn device_fds(pid: HostPid) -> io::Result<Vec<DeviceFd>> {
    fds_matching(pid, is_device)
}

/// Whether a process has a device node of the driver mapped or open. One that has gone has not.
#[must_use]
pub fn touches_gpu(pid: HostPid) -> bool {
    device_fds(pid).is_ok_and(|fds| !fds.is_empty()) || device_mappings(pid).is_ok_and(|mappings| !mappings.is_empty())
}

/// Returns whether a file is the driver's library, by its name.
#[must_use]
pub fn is_library(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.as_bytes().starts_with(b"libcuda.so"))
}

/// Returns whether a process has loaded the driver's library. NVML alone is another library.
#[must_use]
pub fn has_library(pid: HostPid) -> bool {
    mappings_matching(pid, is_library).is_ok_and(|mappings| !mappings.is_empty())
}

/// What a process uses that the driver does not checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Uses {
    /// It has loaded CUPTI: a profiler was used in it.
    pub cupti: bool,
    /// It has an instance of a divided GPU (MIG) open.
    pub mig: bool,
    /// It is told to be a client of the multi-process service (MPS).
    pub mps: bool,
    /// It has opened what another process shares by CUDA IPC.
    pub ipc: bool,
}

/// Returns what a process uses that the driver does not checkpoint, as far as it shows. CUDA IPC shows where an event is shared.
#[must_use]
pub fn uses(pid: HostPid) -> Uses {
    let is_cupti = |path: &Path| path.file_name().is_some_and(|name| name.as_bytes().starts_with(b"libcupti"));
    let cupti = mappings_matching(pid, is_cupti).is_ok_and(|mappings| !mappings.is_empty());
    let mig = device_fds(pid).is_ok_and(|fds| fds.iter().any(|fd| is_instance(&fd.path)));
    let environment = std::fs::read(pid.path("environ")).unwrap_or_default();
    let mps = environment.split(|byte| *byte == 0).any(|variable| variable.starts_with(b"CUDA_MPS_PIPE_DIRECTORY="));
    let is_shared =
        |own| mappings_matching(pid, |path| is_others_event(path, own)).is_ok_and(|found| !found.is_empty());
    let ipc = ProcessIds::of(pid).is_ok_and(|ids| is_shared(ids.container));
    Uses { cupti, mig, mps, ipc }
}

/// Returns whether a file holds CUDA events that another process than `own` shares: `/dev/shm/cuda.shm.UID.PID.NUMBER`, in
/// hexadecimal digits (580.159, tests/gpu/probes/ipc.py). The process that shares them maps the file as well, and comes back
/// from a checkpoint; a process that has opened them does not.
fn is_others_event(path: &Path, own: ContainerPid) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_prefix("cuda.shm."));
    let sharer = name.and_then(|name| i32::from_str_radix(name.split('.').nth(1)?, 16).ok());
    sharer.is_some_and(|sharer| sharer != own.raw())
}

/// Whether a device node gives access to an instance of a GPU. The first two are for making and watching instances.
fn is_instance(path: &Path) -> bool {
    let number = path.as_os_str().as_bytes().strip_prefix(b"/dev/nvidia-caps/nvidia-cap");
    let number = number.and_then(|number| std::str::from_utf8(number).ok()?.parse::<u32>().ok());
    number.is_some_and(|number| number > 2)
}

/// Tells whether a thread is one of the driver's, which works for its checkpoints.
///
/// Seen were `cuda` and 11 hexadecimal digits, the thread that does a checkpoint's work, and `cuda-EvtHandlr` (580.159); they
/// block all signals. A thread of the driver that is held makes its checkpoint hang for ever. So a thread with another name that
/// begins so counts too, if it blocks all signals: a program's own `cuda-worker` does not, and is held.
#[must_use]
pub fn is_drivers(pid: HostPid, thread: &Thread) -> bool {
    is_known_name(&thread.name) || (thread.name.starts_with("cuda") && blocks_all_signals(pid, thread.tid))
}

fn is_known_name(name: &str) -> bool {
    let Some(rest) = name.strip_prefix("cuda") else { return false };
    rest == "-EvtHandlr" || (rest.len() == 11 && rest.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

/// Tells whether a thread blocks all signals that it can block but those that a C library keeps for itself, 32 and 33.
fn blocks_all_signals(pid: HostPid, tid: i32) -> bool {
    const ALL: u64 = !(1 << 8 | 1 << 18 | 1 << 31 | 1 << 32);
    let status = Status::of_thread(pid, tid).ok();
    status.and_then(|status| status.blocked_signals()).is_some_and(|blocked| blocked & ALL == ALL)
}

/// Returns the driver's threads among those of a process: never the first one, nor those that are called as that one is: a
/// program may itself be named so, and its threads inherit that.
#[must_use]
pub fn drivers(pid: HostPid, threads: &[Thread]) -> Vec<i32> {
    let first = threads.iter().find(|thread| thread.tid == pid.raw()).map(|thread| thread.name.as_str());
    let is_drivers =
        |thread: &&Thread| thread.tid != pid.raw() && first != Some(thread.name.as_str()) && is_drivers(pid, thread);
    threads.iter().filter(is_drivers).map(|thread| thread.tid).collect()
}

/// Whether a path of a mapping or a descriptor is one of the driver's device nodes.
pub fn is_device(path: &Path) -> bool {
    path.as_os_str().as_bytes().starts_with(DEVICES)
}

#[cfg(test)]
mod tests;
