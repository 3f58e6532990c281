//! GPU state of a container: which of its processes use CUDA, and the driver's checkpoint of all of them.

#![deny(unsafe_code)]

pub mod hold;
pub mod inject;
pub mod process;
pub mod residue;
#[cfg(test)]
mod testbed;
