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

/// An error and its sources, in one line.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}
