//! The required functions of the driver and of NVML, by their C signatures.

use std::ffi::{CStr, c_char};

/// CUcheckpointGpuPair.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Pair {
    pub(crate) old: [u8; 16],
    pub(crate) new: [u8; 16],
}

/// NVML's description of a GPU.
pub(crate) struct Gpu {
    pub(crate) uuid: String,
    pub(crate) minor: u32,
    pub(crate) processes: Vec<u32>,
}

/// nvmlProcessInfo_t since version 2.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct ProcessInfo {
    pid: u32,
    used_memory: u64,
    gpu_instance: u32,
    compute_instance: u32,
}

pub(crate) struct Library(libloading::Library);

type Ask = unsafe extern "C" fn(i32, *mut i32) -> u32;
type Change = unsafe extern "C" fn(i32, *const [u64; 8]) -> u32;
type Start = unsafe extern "C" fn() -> u32;
type Count = unsafe extern "C" fn(*mut u32) -> u32;
type ByIndex = unsafe extern "C" fn(u32, *mut usize) -> u32;
type Number = unsafe extern "C" fn(usize, *mut u32) -> u32;
type Text = unsafe extern "C" fn(usize, *mut c_char, u32) -> u32;
type Processes = unsafe extern "C" fn(usize, *mut u32, *mut ProcessInfo) -> u32;

fn done(what: &str, result: u32) -> Result<(), String> {
    if result == 0 { Ok(()) } else { Err(format!("{what}: {result}")) }
}

impl Library {
    pub(crate) fn load(name: &str) -> Result<Self, String> {
        // SAFETY: NVIDIA's driver library or the simulated one; neither does anything at load that could hurt.
        let library = unsafe { libloading::Library::new(name) };
        library.map(Self).map_err(|error| format!("{name}: {error}"))
    }

    /// The address of a function in the caller's type: `F` must be a pointer to a function with the
    /// header's signature.
    fn function<F: Copy>(&self, name: &str) -> Result<F, String> {
        // SAFETY: all callers are in this file, with the types above, which are those of cuda.h and nvml.h.
        let symbol = unsafe { self.0.get::<F>(name) };
        symbol.map(|symbol| *symbol).map_err(|error| format!("{name}: {error}"))
    }

    /// Makes a call that returns a number.
    pub(crate) fn ask(&self, name: &str, pid: i32) -> Result<(u32, i32), String> {
        let call = self.function::<Ask>(name)?;
        let mut answer = -1;
        // SAFETY: room for the answer.
        let result = unsafe { call(pid, &raw mut answer) };
        Ok((result, answer))
    }

    /// Makes a call with arguments of 64 bytes, two words of them used.
    pub(crate) fn change(&self, name: &str, pid: i32, [first, second]: [u64; 2]) -> Result<u32, String> {
        let call = self.function::<Change>(name)?;
        let arguments = [first, second, 0, 0, 0, 0, 0, 0];
        // SAFETY: the arguments outlive the call; an address among them is `restore`'s business.
        Ok(unsafe { call(pid, &raw const arguments) })
    }

    pub(crate) fn restore(&self, pid: i32, pairs: &[Pair]) -> Result<u32, String> {
        let count = u64::try_from(pairs.len()).map_err(|error| error.to_string())?;
        let address = if pairs.is_empty() { 0 } else { pairs.as_ptr().expose_provenance() as u64 };
        self.change("cuCheckpointProcessRestore", pid, [address, count])
    }

    pub(crate) fn gpus(&self) -> Result<Vec<Gpu>, String> {
        let start = self.function::<Start>("nvmlInit_v2")?;
        // SAFETY: takes nothing.
        done("nvmlInit", unsafe { start() })?;
        let count = self.function::<Count>("nvmlDeviceGetCount_v2")?;
        let mut gpus = 0;
        // SAFETY: room for the answer.
        done("nvmlDeviceGetCount", unsafe { count(&raw mut gpus) })?;
        (0..gpus).map(|index| self.gpu(index)).collect()
    }

    fn gpu(&self, index: u32) -> Result<Gpu, String> {
        let by_index = self.function::<ByIndex>("nvmlDeviceGetHandleByIndex_v2")?;
        let mut device = 0;
        // SAFETY: room for the answer.
        done("nvmlDeviceGetHandleByIndex", unsafe { by_index(index, &raw mut device) })?;
        let number = self.function::<Number>("nvmlDeviceGetMinorNumber")?;
        let mut minor = 0;
        // SAFETY: room for the answer.
        done("nvmlDeviceGetMinorNumber", unsafe { number(device, &raw mut minor) })?;
        let text = self.function::<Text>("nvmlDeviceGetUUID")?;
        let mut uuid: [c_char; 96] = [0; 96];
        // SAFETY: as much room as it is told.
        done("nvmlDeviceGetUUID", unsafe { text(device, uuid.as_mut_ptr(), 96) })?;
        // SAFETY: NVML ended it with a NUL, and the buffer was zero before.
        let uuid = unsafe { CStr::from_ptr(uuid.as_ptr()) }.to_string_lossy().into_owned();
        let list = self.function::<Processes>("nvmlDeviceGetComputeRunningProcesses_v3")?;
        let mut processes = [ProcessInfo::default(); 256];
        let mut used = 256;
        // SAFETY: as much room as it is told.
        done("nvmlDeviceGetComputeRunningProcesses", unsafe { list(device, &raw mut used, processes.as_mut_ptr()) })?;
        let used = usize::try_from(used).unwrap_or(0).min(processes.len());
        let mut processes: Vec<u32> = processes[..used].iter().map(|process| process.pid).collect();
        processes.sort_unstable();
        Ok(Gpu { uuid, minor, processes })
    }
}
