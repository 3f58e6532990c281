//! The NVIDIA driver of a node: its checkpoint API, its inventory, and what a process has of it.
//!
//! ```text
//!   session ──socket──► callers: one driver call at a time, killed when it hangs
//! ```

#![deny(unsafe_code)]

mod call;
mod driver;
mod inventory;
pub mod process;

pub use call::{Answer, CALLER, Call, CallFailure, Callers, Pair, SHORT_CALL, TICK, caller_main, write_line};
pub use driver::{CudaResult, Driver, DriverError, LIBRARY_VARIABLE, ProcessState};
pub use inventory::{Gpu, GpuProcess, Inventory, NVML_VARIABLE};
