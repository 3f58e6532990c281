//! What a node has of GPUs, by NVML.

use std::ffi::OsString;

use nvml_wrapper::Nvml;
use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::error::NvmlError;
use serde::{Deserialize, Serialize};

/// Environment variable that names the NVML library to use.
pub const NVML_VARIABLE: &str = "GPUSNAP_NVML";

/// The GPUs of a node and what drives them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Inventory {
    /// The driver's version, such as 580.159.04.
    pub driver: String,
    /// Every GPU, in NVML's order.
    pub gpus: Vec<Gpu>,
}

/// One GPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Gpu {
    /// `GPU-` and 36 characters.
    pub uuid: String,
    /// The product's name, such as NVIDIA H100 80GB HBM3.
    pub name: String,
    /// N of its node `/dev/nvidiaN`.
    pub minor: u32,
    /// Its memory, in bytes.
    pub memory: u64,
    /// What is free of it, in bytes, now. Not kept in snapshots.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub free: Option<u64>,
    /// It is divided into instances (MIG).
    #[serde(default)]
    pub mig: bool,
    /// The driver keeps it initialised while nobody uses it.
    #[serde(default)]
    pub persistence: bool,
    /// Who computes on it now. Not kept in snapshots.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub processes: Vec<GpuProcess>,
}

/// A process that computes on a GPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GpuProcess {
    /// In the pid namespace of the driver: the host's.
    pub pid: u32,
    /// GPU memory that it uses, in bytes, where NVML knows.
    pub memory: Option<u64>,
}

/// Asks NVML.
pub(crate) fn take() -> Result<Inventory, NvmlError> {
    let library = std::env::var_os(NVML_VARIABLE).unwrap_or_else(|| OsString::from("libnvidia-ml.so.1"));
    let nvml = match Nvml::builder().lib_path(&library).init() {
        Err(NvmlError::LibloadingError(_)) => {
            Nvml::builder().lib_path("/usr/local/nvidia/lib64/libnvidia-ml.so.1".as_ref()).init()
        }
        loaded => loaded,
    }?;
    let gpus = (0..nvml.device_count()?).map(|index| gpu(&nvml, index)).collect::<Result<_, NvmlError>>()?;
    Ok(Inventory { driver: nvml.sys_driver_version()?, gpus })
}

fn gpu(nvml: &Nvml, index: u32) -> Result<Gpu, NvmlError> {
    let device = nvml.device_by_index(index)?;
    // These are refused on some products, where they mean nothing.
    let mig = device.mig_mode().is_ok_and(|mode| mode.current != 0);
    let persistence = device.is_in_persistent_mode().unwrap_or(false);
    let running = device.running_compute_processes().unwrap_or_default();
    let processes = running
        .into_iter()
        .map(|process| GpuProcess {
            pid: process.pid,
            memory: match process.used_gpu_memory {
                UsedGpuMemory::Used(bytes) => Some(bytes),
                UsedGpuMemory::Unavailable => None,
            },
        })
        .collect();
    let memory = device.memory_info()?;
    Ok(Gpu {
        uuid: device.uuid()?,
        name: device.name()?,
        minor: device.minor_number()?,
        memory: memory.total,
        free: Some(memory.free),
        mig,
        persistence,
        processes,
    })
}
