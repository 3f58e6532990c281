//! Whether GPU state fits where it is to go: into memory, and back to a GPU.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use cuda::{CallFailure, Gpu, Inventory};
use proc::HostPid;

use super::{BETWEEN_TRIES, Host, OnGpu, Session, SessionError, Undo};

/// Longest wait for GPU memory that a neighbour has taken. A neighbour that ends or is suspended itself frees it in seconds.
const ROOM: Duration = Duration::from_secs(30);

impl Undo {
    /// Returns what a process had on GPUs, if that is known.
    pub(crate) fn room(&self, pid: HostPid) -> &[OnGpu] {
        self.rooms.get(&pid).map_or(&[], Vec::as_slice)
    }
}

impl<H: Host> Session<'_, H> {
    /// Refuses what would not fit into memory: the driver fills the memory of the processes, and the kernel would kill them
    /// for it.
    pub(super) fn check_memory(&mut self, inventory: &Result<Inventory, CallFailure>) -> Result<(), SessionError> {
        let Some(left) = self.host.memory_left() else { return Ok(()) };
        let members: Vec<u32> = self.members.iter().map(|member| member.pid.raw().unsigned_abs()).collect();
        if members.is_empty() {
            return Ok(());
        }
        let unknown = |why: String| SessionError::MemoryUnknown { why, left: gib(left.bytes) };
        let inventory = match inventory {
            Ok(inventory) => inventory,
            Err(failure) if left.is_limited => return Err(unknown(format!("NVML does not answer ({failure})"))),
            Err(_) => return Ok(()),
        };
        let listed = |pid: u32| inventory.gpus.iter().flat_map(|gpu| &gpu.processes).filter(move |p| p.pid == pid);
        let is_known = |pid: u32| listed(pid).next().is_some() && listed(pid).all(|process| process.memory.is_some());
        let needed: u64 = members.iter().flat_map(|pid| listed(*pid)).filter_map(|process| process.memory).sum();
        if left.bytes < needed {
            let limit = if left.is_limited { "the memory limit of the container" } else { "the memory of the machine" };
            return Err(SessionError::Memory { gib: gib(needed), left: gib(left.bytes), limit: limit.to_owned() });
        }
        // A process of which NVML does not know has no more than all that is used of the GPUs.
        let most: u64 = inventory.gpus.iter().map(|gpu| gpu.memory.saturating_sub(gpu.free.unwrap_or(0))).sum();
        match members.iter().find(|pid| !is_known(**pid)) {
            Some(pid) if left.is_limited && left.bytes < most => {
                Err(unknown(format!("NVML does not say how much process {pid} has on the GPU")))
            }
            _ => Ok(()),
        }
    }

    /// Notes what each process has on GPUs.
    pub(super) fn note_room(&mut self, inventory: Option<&Inventory>) {
        for member in &self.members {
            let on_gpu = |gpu: &Gpu| {
                let process = gpu.processes.iter().find(|process| process.pid == member.pid.raw().unsigned_abs())?;
                Some(OnGpu { uuid: gpu.uuid.clone(), bytes: process.memory? })
            };
            let gpus = inventory.iter().flat_map(|inventory| &inventory.gpus).filter_map(on_gpu).collect();
            self.undo.rooms.insert(member.pid, gpus);
        }
    }

    /// Waits until there is room on the GPUs for the state of these processes. After a refusal for want of memory the driver
    /// would never give a process its state back.
    pub(super) fn await_room(&mut self, pids: &[HostPid]) -> Result<(), SessionError> {
        let mut needed: BTreeMap<String, u64> = BTreeMap::new();
        for on_gpu in pids.iter().flat_map(|pid| self.undo.room(*pid)) {
            let pair = self.undo.pairs.iter().find(|pair| pair.old == on_gpu.uuid);
            let uuid = pair.map_or(&on_gpu.uuid, |pair| &pair.new);
            *needed.entry(uuid.clone()).or_default() += on_gpu.bytes;
        }
        if needed.is_empty() {
            return Ok(());
        }
        let begin = Instant::now();
        let mut waited = Duration::ZERO;
        loop {
            // Without an answer, it is for the driver to try.
            let Ok(inventory) = self.host.inventory() else { return Ok(()) };
            let lacks = inventory.gpus.iter().find_map(|gpu| {
                let (needed, free) = (*needed.get(&gpu.uuid)?, gpu.free?);
                (free < needed).then_some((gpu, needed, free))
            });
            let Some((gpu, needed, free)) = lacks else { return Ok(()) };
            if waited >= ROOM || begin.elapsed() >= ROOM {
                let (gpu, who) = (gpu.uuid.clone(), users(gpu));
                return Err(SessionError::GpuMemory { gpu, needed: gib(needed), free: gib(free), who });
            }
            self.host.sleep(BETWEEN_TRIES);
            waited += BETWEEN_TRIES;
        }
    }
}

fn users(gpu: &Gpu) -> String {
    let user = |process: &cuda::GpuProcess| match process.memory {
        Some(bytes) => format!("process {} has {:.1} GiB", process.pid, gib(bytes)),
        None => format!("process {} uses it", process.pid),
    };
    let users: Vec<String> = gpu.processes.iter().map(user).collect();
    if users.is_empty() { "nobody says that it uses it".to_owned() } else { users.join(", ") }
}

/// Returns bytes in the unit of messages.
fn gib(bytes: u64) -> f64 {
    Duration::from_nanos(bytes).as_secs_f64() * 1e9 / f64::from(1 << 30)
}
