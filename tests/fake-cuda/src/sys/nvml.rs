//! NVML's C functions: `nvmlReturn_t nvml...(...)`, with the signatures of nvml.h 13.0.

// The names are NVIDIA's.
#![allow(non_snake_case)]

use std::ffi::c_char;

use super::exported::{Out, Text, exports};
use crate::code::Code;
use crate::node;
use crate::nvml::{self, INSUFFICIENT_SIZE, INVALID_ARGUMENT, NOT_SUPPORTED, error};

fn report(result: nvml::Result<()>) -> u32 {
    match result {
        Ok(()) => 0,
        // Writing results and reading texts has only one kind of error.
        Err(Code::INVALID_VALUE) => INVALID_ARGUMENT,
        Err(Code(code)) => code,
    }
}

/// nvmlProcessInfo_t since version 2.
#[derive(Clone, Copy)]
#[repr(C)]
struct ProcessInfo {
    pid: u32,
    used_memory: u64,
    gpu_instance: u32,
    compute_instance: u32,
}

/// nvmlMemory_t.
#[repr(C)]
struct Memory {
    total: u64,
    free: u64,
    used: u64,
}

/// nvmlMemory_v2_t.
#[derive(Clone, Copy)]
#[repr(C)]
struct MemoryV2 {
    version: u32,
    total: u64,
    reserved: u64,
    free: u64,
    used: u64,
}

/// nvmlPciInfo_t.
#[repr(C)]
struct PciInfo {
    legacy_bus_id: [u8; 16],
    domain: u32,
    bus: u32,
    device: u32,
    device_id: u32,
    subsystem_id: u32,
    bus_id: [u8; 32],
}

fn padded<const N: usize>(text: &str) -> [u8; N] {
    let mut bytes = [0; N];
    for (to, from) in bytes.iter_mut().zip(text.bytes()) {
        *to = from;
    }
    bytes
}

fn length(length: u32) -> usize {
    usize::try_from(length).unwrap_or(0)
}

fn used(device: usize) -> nvml::Result<u64> {
    Ok(nvml::processes(device)?.into_iter().map(|process| process.1).sum())
}

exports! { report;
    nvmlInit_v2() { nvml::init() }
    nvmlInitWithFlags(_flags: u32) { nvml::init() }
    nvmlShutdown() { nvml::shutdown() }
    nvmlSystemGetDriverVersion(text: Out<c_char>, room: u32) {
        nvml::gpus()?;
        text.set_text(node::DRIVER, length(room), error(INSUFFICIENT_SIZE))
    }
    nvmlSystemGetNVMLVersion(text: Out<c_char>, room: u32) {
        text.set_text("13.580.159.04", length(room), error(INSUFFICIENT_SIZE))
    }
    nvmlSystemGetCudaDriverVersion(version: Out<i32>) { version.set(node::CUDA_VERSION) }
    nvmlSystemGetCudaDriverVersion_v2(version: Out<i32>) { version.set(node::CUDA_VERSION) }
    nvmlDeviceGetCount_v2(count: Out<u32>) {
        count.set(u32::try_from(nvml::gpus()?.len()).map_err(|_| error(INVALID_ARGUMENT))?)
    }
    nvmlDeviceGetHandleByIndex_v2(index: u32, device: Out<usize>) { device.set(nvml::handle_by_index(index)?) }
    nvmlDeviceGetHandleByUUID(uuid: Text, device: Out<usize>) { device.set(nvml::handle_by_uuid(uuid.get()?)?) }
    nvmlDeviceGetIndex(device: usize, index: Out<u32>) {
        let minor = nvml::minor(device)?;
        let place = nvml::gpus()?.iter().position(|known| *known == minor);
        index.set(place.and_then(|place| u32::try_from(place).ok()).ok_or(error(INVALID_ARGUMENT))?)
    }
    nvmlDeviceGetUUID(device: usize, text: Out<c_char>, room: u32) {
        let uuid = node::uuid_text(&node::uuid(nvml::minor(device)?));
        text.set_text(&uuid, length(room), error(INSUFFICIENT_SIZE))
    }
    nvmlDeviceGetName(device: usize, text: Out<c_char>, room: u32) {
        nvml::minor(device)?;
        text.set_text(node::NAME, length(room), error(INSUFFICIENT_SIZE))
    }
    nvmlDeviceGetMinorNumber(device: usize, minor: Out<u32>) { minor.set(nvml::minor(device)?) }
    nvmlDeviceGetMemoryInfo(device: usize, memory: Out<Memory>) {
        let used = used(device)?;
        memory.set(Memory { total: node::MEMORY, free: node::MEMORY.saturating_sub(used), used })
    }
    nvmlDeviceGetMemoryInfo_v2(device: usize, memory: Out<MemoryV2>) {
        let version = memory.get().ok_or(error(INVALID_ARGUMENT))?.version;
        let used = used(device)?;
        memory.set(MemoryV2 {
            version,
            total: node::MEMORY,
            reserved: 0,
            free: node::MEMORY.saturating_sub(used),
            used,
        })
    }
    nvmlDeviceGetMigMode(device: usize, _current: Out<u32>, _pending: Out<u32>) {
        nvml::minor(device)?;
        Err(error(NOT_SUPPORTED))
    }
    nvmlDeviceGetPersistenceMode(device: usize, mode: Out<u32>) {
        nvml::minor(device)?;
        mode.set(1)
    }
    nvmlDeviceGetCudaComputeCapability(device: usize, major: Out<i32>, minor: Out<i32>) {
        nvml::minor(device)?;
        major.set(node::CAPABILITY.0)?;
        minor.set(node::CAPABILITY.1)
    }
    nvmlDeviceGetPciInfo_v3(device: usize, info: Out<PciInfo>) {
        let bus = nvml::bus(nvml::minor(device)?);
        info.set(PciInfo {
            legacy_bus_id: padded(&format!("0000:{bus:02X}:00.0")),
            domain: 0,
            bus,
            device: 0,
            device_id: 0x2330_10de,
            subsystem_id: 0x16c1_10de,
            bus_id: padded(&format!("00000000:{bus:02X}:00.0")),
        })
    }
    nvmlDeviceGetComputeRunningProcesses_v3(device: usize, count: Out<u32>, list: Out<ProcessInfo>) {
        let room = length(count.get().ok_or(error(INVALID_ARGUMENT))?);
        let processes = nvml::processes(device)?;
        count.set(u32::try_from(processes.len()).map_err(|_| error(INVALID_ARGUMENT))?)?;
        if processes.len() > room {
            return Err(error(INSUFFICIENT_SIZE));
        }
        for (at, (pid, used_memory)) in processes.into_iter().enumerate() {
            let info = ProcessInfo { pid, used_memory, gpu_instance: u32::MAX, compute_instance: u32::MAX };
            list.set_at(at, info)?;
        }
        Ok(())
    }
}

#[unsafe(no_mangle)]
extern "C" fn nvmlErrorString(result: u32) -> *const c_char {
    let text = match result {
        0 => c"Success",
        nvml::result::UNINITIALIZED => c"Uninitialized",
        INVALID_ARGUMENT => c"Invalid Argument",
        NOT_SUPPORTED => c"Not Supported",
        nvml::NOT_FOUND => c"Not Found",
        INSUFFICIENT_SIZE => c"Insufficient Size",
        nvml::result::DRIVER_NOT_LOADED => c"Driver Not Loaded",
        _ => c"Unknown Error",
    };
    text.as_ptr()
}
