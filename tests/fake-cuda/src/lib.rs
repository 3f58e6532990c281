//! A simulated NVIDIA driver: one library in the place of `libcuda.so.1` and `libnvidia-ml.so.1` on
//! machines without a GPU. `README.md` describes common ground with the real one, differences, and
//! use.

#![deny(unsafe_code)]

mod api;
mod caller;
mod checkpoint;
pub mod code;
mod control;
mod device;
mod gate;
mod kernel;
mod node;
mod nvml;
mod options;
mod state;
#[allow(unsafe_code)]
mod sys;
mod target;
