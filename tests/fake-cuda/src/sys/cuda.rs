//! The driver API's C functions: `CUresult cu...(...)`, with the signatures of cuda.h 13.0.

// The names and the arguments are NVIDIA's.
#![allow(non_snake_case, clippy::too_many_arguments)]

use std::ffi::{c_char, c_void};
use std::time::Duration;

use super::exported::{In, Out, Symbol, Text, exports};
use crate::api::{self, Launch};
use crate::caller;
use crate::code::{self, Code, Result};
use crate::control::{MAX_DEVICES, Operation, Pair};
use crate::kernel::{Kernel, Work};
use crate::node;
use crate::target;

fn report(result: Result<()>) -> u32 {
    match result {
        Ok(()) => 0,
        Err(Code(code)) => code,
    }
}

/// CUcheckpointLockArgs, CUcheckpointCheckpointArgs, CUcheckpointRestoreArgs,
/// CUcheckpointUnlockArgs: 64 bytes each; fields unknown to a driver must be zero.
type Arguments = [u64; 8];

/// The arguments if there are any, with all but the first `known` words zero.
fn arguments(arguments: &In<Arguments>, known: usize) -> Result<Arguments> {
    let words = arguments.get().unwrap_or_default();
    if words[known..].iter().all(|word| *word == 0) { Ok(words) } else { Err(Code::INVALID_VALUE) }
}

/// The parameters of a launch: pointers to the values.
struct Parameters(In<*const c_void>);

impl Parameters {
    fn get<T: Copy>(&self, at: usize) -> Result<T> {
        let pointer = self.0.get_at(at).ok_or(Code::INVALID_VALUE)?;
        In::new(pointer.cast::<T>()).get().ok_or(Code::INVALID_VALUE)
    }
}

/// Name without a trailing version, as known to cuGetProcAddress.
fn unversioned(name: &str) -> &str {
    match name.rsplit_once("_v") {
        Some((plain, version)) if version.bytes().all(|byte| byte.is_ascii_digit()) => plain,
        _ => name,
    }
}

/// CUdriverProcAddressQueryResult.
const FOUND: u32 = 0;
const SYMBOL_NOT_FOUND: u32 = 1;
const VERSION_NOT_SUFFICIENT: u32 = 2;

/// The first CUDA version with the checkpoint API.
const CHECKPOINT_SINCE: i32 = 12_080;

fn look_up(symbol: &Text, address: &Out<*const c_void>, version: i32) -> Result<u32> {
    let name = symbol.get()?;
    let found = CUDA.iter().filter(|entry| unversioned(entry.0) == name);
    let Some((_, Symbol(function))) = found.max_by_key(|entry| entry.0.len()) else {
        address.set(std::ptr::null())?;
        return Ok(SYMBOL_NOT_FOUND);
    };
    if name.starts_with("cuCheckpoint") && version < CHECKPOINT_SINCE {
        address.set(std::ptr::null())?;
        return Ok(VERSION_NOT_SUFFICIENT);
    }
    address.set(*function)?;
    Ok(FOUND)
}

exports! { table CUDA; report;
    cuInit(_flags: u32) { target::init() }
    cuDriverGetVersion(version: Out<i32>) { version.set(node::CUDA_VERSION) }
    cuGetErrorName(error: u32, text: Out<*const c_char>) { text.set(code::name(error)?.as_ptr().cast()) }
    cuGetErrorString(error: u32, text: Out<*const c_char>) { text.set(code::text(error)?.as_ptr().cast()) }
    cuGetProcAddress_v2(symbol: Text, address: Out<*const c_void>, version: i32, _flags: u64, status: Out<u32>) {
        let found = look_up(&symbol, &address, version)?;
        if !status.is_null() {
            status.set(found)?;
        }
        if found == FOUND { Ok(()) } else { Err(Code::NOT_FOUND) }
    }
    cuGetProcAddress(symbol: Text, address: Out<*const c_void>, version: i32, _flags: u64) {
        if look_up(&symbol, &address, version)? == FOUND { Ok(()) } else { Err(Code::NOT_FOUND) }
    }

    cuDeviceGetCount(count: Out<i32>) { count.set(api::device_count()?) }
    cuDeviceGet(device: Out<i32>, ordinal: i32) { device.set(api::device(ordinal)?) }
    cuDeviceGetName(name: Out<c_char>, length: i32, device: i32) {
        api::device(device)?;
        let length = usize::try_from(length).map_err(|_| Code::INVALID_VALUE)?;
        name.set_text(node::NAME, length, Code::INVALID_VALUE)
    }
    cuDeviceGetUuid(uuid: Out<[u8; 16]>, device: i32) { uuid.set(api::device_uuid(device)?) }
    cuDeviceGetUuid_v2(uuid: Out<[u8; 16]>, device: i32) { uuid.set(api::device_uuid(device)?) }
    cuDeviceTotalMem_v2(size: Out<u64>, device: i32) {
        api::device(device)?;
        size.set(node::MEMORY)
    }
    cuDeviceGetAttribute(value: Out<i32>, attribute: i32, device: i32) {
        value.set(api::device_attribute(attribute, device)?)
    }

    cuDevicePrimaryCtxRetain(context: Out<usize>, device: i32) { context.set(api::primary_retain(device)?) }
    cuDevicePrimaryCtxRelease(device: i32) { api::primary_release(device) }
    cuDevicePrimaryCtxRelease_v2(device: i32) { api::primary_release(device) }
    cuCtxCreate_v2(context: Out<usize>, _flags: u32, device: i32) { context.set(api::context_create(device)?) }
    cuCtxCreate_v4(context: Out<usize>, _parameters: In<u8>, _flags: u32, device: i32) {
        context.set(api::context_create(device)?)
    }
    cuCtxDestroy_v2(context: usize) { api::context_destroy(context) }
    cuCtxSetCurrent(context: usize) { api::context_set_current(context) }
    cuCtxGetCurrent(context: Out<usize>) { context.set(api::context_current()?) }
    cuCtxGetDevice(device: Out<i32>) { device.set(api::context_device()?) }
    cuCtxSynchronize() { api::synchronize() }

    cuMemAlloc_v2(pointer: Out<u64>, size: usize) { pointer.set(api::memory_allocate(size)?) }
    cuMemAllocManaged(pointer: Out<u64>, size: usize, _flags: u32) {
        pointer.set(api::memory_allocate_managed(size)?)
    }
    cuMemAllocHost_v2(pointer: Out<u64>, size: usize) { pointer.set(api::memory_allocate_host(size)?) }
    cuMemFree_v2(pointer: u64) { api::memory_free(pointer, false) }
    cuMemFreeHost(pointer: u64) { api::memory_free(pointer, true) }
    cuMemcpyHtoD_v2(to: u64, from: usize, length: usize) { api::copy_to_device(to, from, length) }
    cuMemcpyDtoH_v2(to: usize, from: u64, length: usize) { api::copy_from_device(to, from, length) }
    cuMemsetD32_v2(to: u64, value: u32, count: usize) { api::set_words(to, value, count) }
    cuMemGetInfo_v2(free: Out<u64>, total: Out<u64>) {
        let (free_bytes, total_bytes) = api::memory_info()?;
        free.set(free_bytes)?;
        total.set(total_bytes)
    }

    cuModuleLoadData(module: Out<usize>, image: Text) { module.set(api::module_load(image.get()?)?) }
    cuModuleGetFunction(function: Out<usize>, module: usize, name: Text) {
        function.set(api::module_function(module, name.get()?)?)
    }
    cuLaunchKernel(
        function: usize, _grid_x: u32, _grid_y: u32, _grid_z: u32, _block_x: u32, _block_y: u32, _block_z: u32,
        _shared: u32, _stream: usize, parameters: In<*const c_void>, _extra: In<*const c_void>,
    ) {
        let parameters = Parameters(parameters);
        api::launch(match api::function(function)? {
            Kernel::Spin => Launch::Spin(parameters.get(0)?),
            Kernel::AddOne => Launch::Work(Work::AddOne { values: parameters.get(0)?, count: parameters.get(1)? }),
            Kernel::Fill => Launch::Work(Work::Fill {
                values: parameters.get(0)?,
                count: parameters.get(1)?,
                seed: parameters.get(2)?,
            }),
        })
    }

    cuCheckpointProcessGetState(pid: i32, state: Out<u32>) { state.set(caller::state(pid)?) }
    cuCheckpointProcessGetRestoreThreadId(pid: i32, thread: Out<i32>) { thread.set(caller::restore_thread(pid)?) }
    cuCheckpointProcessLock(pid: i32, given: In<Arguments>) {
        // timeoutMs, and a reserved half of the same word
        let [word, ..] = arguments(&given, 1)?;
        let timeout_ms = u32::try_from(word).map_err(|_| Code::INVALID_VALUE)?;
        caller::change(pid, Operation::Lock, timeout_ms, &[])
    }
    cuCheckpointProcessCheckpoint(pid: i32, given: In<Arguments>) {
        arguments(&given, 0)?;
        caller::change(pid, Operation::Checkpoint, 0, &[])
    }
    cuCheckpointProcessRestore(pid: i32, given: In<Arguments>) {
        // gpuPairs, gpuPairsCount
        let [address, count, ..] = arguments(&given, 2)?;
        let count = usize::try_from(count).ok().filter(|count| *count <= MAX_DEVICES).ok_or(Code::INVALID_VALUE)?;
        let address = usize::try_from(address).map_err(|_| Code::INVALID_VALUE)?;
        let list = In::new(std::ptr::with_exposed_provenance::<Pair>(address));
        let mut pairs = [Pair::default(); MAX_DEVICES];
        for (at, pair) in pairs.iter_mut().take(count).enumerate() {
            *pair = list.get_at(at).ok_or(Code::INVALID_VALUE)?;
        }
        caller::change(pid, Operation::Restore, 0, &pairs[..count])
    }
    cuCheckpointProcessUnlock(pid: i32, given: In<Arguments>) {
        arguments(&given, 0)?;
        caller::change(pid, Operation::Unlock, 0, &[])
    }

    fakeCudaPoll(milliseconds: u32) { target::poll(Duration::from_millis(u64::from(milliseconds))).map(drop) }
}
