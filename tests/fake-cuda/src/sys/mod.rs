//! Everything beyond safe Rust: system calls, memory seen by others, and the exported C functions.

pub(crate) mod cuda;
pub(crate) mod exported;
pub(crate) mod memory;
pub(crate) mod nvml;
pub(crate) mod os;
