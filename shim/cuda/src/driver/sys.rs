//! The driver's checkpoint API as cuda.h declares it, and the calls.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

use libloading::Library;

/// CUDA 12.8, the first version with the checkpoint API; structures of later versions only use what was reserved.
const API_VERSION: c_int = 12080;
/// CUDA 13.4 brings storage of the caller's own.
const CUSTOM_STORAGE_VERSION: c_int = 13040;

/// `CUcheckpointLockArgs`.
#[repr(C)]
#[derive(Default)]
struct LockArgs {
    timeout_ms: c_uint,
    reserved0: c_uint,
    reserved1: [u64; 7],
}

/// `CUcheckpointGpuPair`: what was this GPU is to be that one.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GpuPair {
    pub(crate) old: [u8; 16],
    pub(crate) new: [u8; 16],
}

/// `CUcheckpointRestoreArgs` since CUDA 13.0; 64 bytes, as in every version.
#[repr(C)]
struct RestoreArgs {
    pairs: *const GpuPair,
    count: c_uint,
    padding: c_uint,
    reserved: [u64; 6],
}

/// `CUcheckpointCheckpointArgs`, `CUcheckpointUnlockArgs`: nothing of them is used.
type NoArgs = [u64; 8];

type GetProcAddress = unsafe extern "C" fn(*const c_char, *mut *mut c_void, c_int, u64, *mut c_int) -> c_uint;
type DriverGetVersion = unsafe extern "C" fn(*mut c_int) -> c_uint;
type GetState = unsafe extern "C" fn(c_int, *mut c_uint) -> c_uint;
type GetRestoreThread = unsafe extern "C" fn(c_int, *mut c_int) -> c_uint;
type Lock = unsafe extern "C" fn(c_int, *mut LockArgs) -> c_uint;
type Checkpoint = unsafe extern "C" fn(c_int, *mut NoArgs) -> c_uint;
type Restore = unsafe extern "C" fn(c_int, *mut RestoreArgs) -> c_uint;

/// The functions of a loaded libcuda.
pub(super) struct Functions {
    version: DriverGetVersion,
    state: GetState,
    restore_thread: Option<GetRestoreThread>,
    lock: Lock,
    checkpoint: Checkpoint,
    restore: Restore,
    unlock: Checkpoint,
    custom_storage: bool,
    /// What the functions are in.
    _library: Library,
}

/// Why a library is of no use.
#[derive(Debug)]
pub(super) enum LoadFailure {
    Library(libloading::Error),
    /// It lacks this function: the driver is too old.
    Function(&'static CStr),
}

impl Functions {
    /// Loads a library by its name or path.
    pub(super) fn load(name: &std::ffi::OsStr) -> Result<Self, LoadFailure> {
        // SAFETY: libcuda's initialisers only set up its own state; it is what every CUDA program loads.
        let library = unsafe { Library::new(name) }.map_err(LoadFailure::Library)?;
        let find = |name: &'static CStr, version| address(&library, name, version);
        let need = |name: &'static CStr| find(name, API_VERSION).ok_or(LoadFailure::Function(name));
        let version = need(c"cuDriverGetVersion")?;
        let state = need(c"cuCheckpointProcessGetState")?;
        let lock = need(c"cuCheckpointProcessLock")?;
        let checkpoint = need(c"cuCheckpointProcessCheckpoint")?;
        let restore = need(c"cuCheckpointProcessRestore")?;
        let unlock = need(c"cuCheckpointProcessUnlock")?;
        let restore_thread = find(c"cuCheckpointProcessGetRestoreThreadId", API_VERSION);
        let custom_storage = find(c"cuCheckpointOperationComplete", CUSTOM_STORAGE_VERSION).is_some();
        Ok(Self {
            // SAFETY: cuda.h: CUresult cuDriverGetVersion(int *).
            version: unsafe { std::mem::transmute::<*mut c_void, DriverGetVersion>(version) },
            // SAFETY: cuda.h: CUresult cuCheckpointProcessGetState(int, CUprocessState *).
            state: unsafe { std::mem::transmute::<*mut c_void, GetState>(state) },
            // SAFETY: cuda.h: CUresult cuCheckpointProcessGetRestoreThreadId(int, int *).
            restore_thread: restore_thread
                .map(|address| unsafe { std::mem::transmute::<*mut c_void, GetRestoreThread>(address) }),
            // SAFETY: cuda.h: CUresult cuCheckpointProcessLock(int, CUcheckpointLockArgs *).
            lock: unsafe { std::mem::transmute::<*mut c_void, Lock>(lock) },
            // SAFETY: cuda.h: CUresult cuCheckpointProcessCheckpoint(int, CUcheckpointCheckpointArgs *).
            checkpoint: unsafe { std::mem::transmute::<*mut c_void, Checkpoint>(checkpoint) },
            // SAFETY: cuda.h: CUresult cuCheckpointProcessRestore(int, CUcheckpointRestoreArgs *).
            restore: unsafe { std::mem::transmute::<*mut c_void, Restore>(restore) },
            // SAFETY: cuda.h: CUresult cuCheckpointProcessUnlock(int, CUcheckpointUnlockArgs *).
            unlock: unsafe { std::mem::transmute::<*mut c_void, Checkpoint>(unlock) },
            custom_storage,
            _library: library,
        })
    }

    pub(super) fn has_custom_storage(&self) -> bool {
        self.custom_storage
    }

    pub(super) fn version(&self) -> Result<i32, u32> {
        let mut version = 0;
        // SAFETY: the pointer is valid for the call.
        check(unsafe { (self.version)(&raw mut version) })?;
        Ok(version)
    }

    pub(super) fn state(&self, pid: i32) -> Result<u32, u32> {
        let mut state = 0;
        // SAFETY: the pointer is valid for the call.
        check(unsafe { (self.state)(pid, &raw mut state) })?;
        Ok(state)
    }

    pub(super) fn restore_thread(&self, pid: i32) -> Result<i32, u32> {
        let Some(restore_thread) = self.restore_thread else { return Err(super::NOT_SUPPORTED) };
        let mut thread = 0;
        // SAFETY: the pointer is valid for the call.
        check(unsafe { restore_thread(pid, &raw mut thread) })?;
        Ok(thread)
    }

    pub(super) fn lock(&self, pid: i32, timeout_ms: u32) -> Result<(), u32> {
        let mut args = LockArgs { timeout_ms, ..LockArgs::default() };
        // SAFETY: the pointer is valid for the call.
        check(unsafe { (self.lock)(pid, &raw mut args) })
    }

    pub(super) fn checkpoint(&self, pid: i32) -> Result<(), u32> {
        let mut args = NoArgs::default();
        // SAFETY: the pointer is valid for the call.
        check(unsafe { (self.checkpoint)(pid, &raw mut args) })
    }

    pub(super) fn restore(&self, pid: i32, pairs: &[GpuPair]) -> Result<(), u32> {
        let count = c_uint::try_from(pairs.len()).map_err(|_| super::INVALID_VALUE)?;
        let first = if pairs.is_empty() { std::ptr::null() } else { pairs.as_ptr() };
        let mut args = RestoreArgs { pairs: first, count, padding: 0, reserved: [0; 6] };
        // SAFETY: the pointers, that to the pairs too, are valid for the call.
        check(unsafe { (self.restore)(pid, &raw mut args) })
    }

    pub(super) fn unlock(&self, pid: i32) -> Result<(), u32> {
        let mut args = NoArgs::default();
        // SAFETY: the pointer is valid for the call.
        check(unsafe { (self.unlock)(pid, &raw mut args) })
    }
}

fn check(result: c_uint) -> Result<(), u32> {
    if result == 0 { Ok(()) } else { Err(result) }
}

/// A function's address, by the driver's own table where it has one: plain symbols are the oldest variants.
fn address(library: &Library, name: &'static CStr, version: c_int) -> Option<*mut c_void> {
    // SAFETY: cuda.h declares it so.
    let by_name = unsafe { library.get::<GetProcAddress>(c"cuGetProcAddress_v2") };
    if let Ok(get) = by_name {
        let (mut address, mut status) = (std::ptr::null_mut(), 0);
        // SAFETY: the pointers are valid for the call; no flags: the default stream's variant, which these lack.
        let result = unsafe { get(name.as_ptr(), &raw mut address, version, 0, &raw mut status) };
        if result == 0 && !address.is_null() {
            return Some(address);
        }
    }
    // SAFETY: only the address is taken here.
    let symbol = unsafe { library.get::<*mut c_void>(name) }.ok()?;
    // SAFETY: as above.
    let address = unsafe { symbol.try_as_raw_ptr() }?;
    (!address.is_null()).then_some(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_argument_is_64_bytes() {
        assert_eq!(size_of::<LockArgs>(), 64);
        assert_eq!(size_of::<RestoreArgs>(), 64);
        assert_eq!(size_of::<NoArgs>(), 64);
        assert_eq!(size_of::<GpuPair>(), 32);
    }
}
