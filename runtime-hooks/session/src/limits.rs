//! Longest time for each phase, after which the shim kills the session.
//!
//! A phase that moves memory may move a terabyte at 1 GB/s, the worst that was measured (docs/benchmarks.md). All other
//! phases end in seconds; the limits leave room for a node that is swapping.

use std::time::Duration;

use phase::Phase;

/// Longest time that the driver may take to move GPU state to memory or back. The driver moves 1.8 GB/s at worst
/// (docs/gpu.md), and a node has some hundred GB.
pub(crate) const GPU: Duration = Duration::from_secs(600);
/// Longest time to undo everything, once an operation is cancelled.
pub(crate) const CANCELLED: Duration = Duration::from_secs(900);
/// Longest time that a phase may take which moves no memory.
const SHORT: Duration = Duration::from_secs(120);
/// Longest time that a phase may take which moves memory.
const MEMORY: Duration = Duration::from_secs(1800);
/// Longest time for a pull. The container's client ends a pull that is no longer wanted.
const PULL: Duration = Duration::from_secs(24 * 3600);

/// Returns the longest time that a phase may take. GPU work may go on for `patience`.
pub(crate) fn of(phase: Phase, patience: Duration) -> Duration {
    match phase {
        // The driver is asked three times at most.
        Phase::CudaCheckpoint | Phase::CudaRestore => 3 * GPU + SHORT,
        Phase::Lock => patience + SHORT,
        // A thread in the middle of a disk read.
        Phase::Hold | Phase::Remap => GPU + SHORT,
        Phase::SaveShm
        | Phase::SaveMemory
        | Phase::Dump
        | Phase::MoveMemory
        | Phase::Publish
        | Phase::LoadShm
        | Phase::Restore
        | Phase::Hooks
        | Phase::Fill => MEMORY,
        Phase::Pull => PULL,
        Phase::Freeze
        | Phase::Discover
        | Phase::Unlock
        | Phase::Release
        | Phase::Inspect
        | Phase::Prepare
        | Phase::Cgroup
        | Phase::Resume => SHORT,
    }
}
