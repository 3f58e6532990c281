//! GPU state of a container: which of its processes use CUDA, and the driver's checkpoint of all of them.
//!
//! ```text
//!   shim ──► Guardian (client) ──socket──► guardian process: session, hold, residue, staging memory (crate memory)
//!                                             └──socket──► callers: one driver call at a time, killed when it hangs
//! ```
//!
//! Everything that touches the processes of a container happens in the guardian, a process of its own for each session.
//! When the shim dies, it puts everything back; when it dies itself, the shim starts another that does.

#![deny(unsafe_code)]

mod ahead;
mod call;
mod client;
mod driver;
mod guardian;
pub mod hold;
mod host;
pub mod inject;
mod inventory;
pub mod process;
mod protocol;
mod refill;
pub mod residue;
mod session;
mod swap;
#[cfg(test)]
mod testbed;

pub use call::{CALLER, Pair, caller_main};
pub use client::{CudaError, Guardian};
pub use driver::{CudaResult, Driver, DriverError, LIBRARY_VARIABLE, ProcessState};
pub use guardian::{GUARDIAN, guardian_main};
pub use inventory::{Gpu, GpuProcess, Inventory, NVML_VARIABLE};
pub use session::{LEAST_STAGING, Resumed, SessionError, Staging, Suspended, SuspendedProcess};
pub use swap::{Piece, Source, Swap, SwapProcess, Swapped, SwappedProcess};
