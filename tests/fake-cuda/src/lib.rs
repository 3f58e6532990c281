//! A simulated NVIDIA driver: one library that stands for `libcuda.so.1` and `libnvidia-ml.so.1` where there is no GPU.
//! `README.md` says what it does as the real one, what not, and how to use it.

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
