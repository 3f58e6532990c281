//! The driver's checkpoint API, found at run time: nothing is linked, and a node without a GPU can say so.

#[allow(unsafe_code)]
mod sys;

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::path::PathBuf;

use proc::HostPid;
use serde::{Deserialize, Serialize};

pub(crate) use self::sys::GpuPair;
use self::sys::{Functions, LoadFailure};
use phase::chain;

/// Environment variable that names the libcuda to use.
pub const LIBRARY_VARIABLE: &str = "GPUSNAP_LIBCUDA";

const LIBRARY: &str = "libcuda.so.1";
/// Where drivers are that the loader does not know of: the GPU operator's driver container, GKE, and images that mount
/// the driver themselves.
const FOLDERS: [&str; 4] = [
    "/usr/local/nvidia/lib64",
    "/run/nvidia/driver/usr/lib/x86_64-linux-gnu",
    "/run/nvidia/driver/usr/lib64",
    "/home/kubernetes/bin/nvidia/lib64",
];

const INVALID_VALUE: u32 = 1;
const NOT_INITIALIZED: u32 = 3;
const OPERATING_SYSTEM: u32 = 304;
const ILLEGAL_STATE: u32 = 401;
const NOT_READY: u32 = 600;
const NOT_SUPPORTED: u32 = 801;

/// A `CUresult` other than success.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct CudaResult(pub u32);

impl CudaResult {
    /// The process does not use CUDA.
    pub const NOT_INITIALIZED: Self = Self(NOT_INITIALIZED);
    /// The process is gone, or must not be touched.
    pub const OPERATING_SYSTEM: Self = Self(OPERATING_SYSTEM);
    /// Not a call for the state that the process is in.
    pub const ILLEGAL_STATE: Self = Self(ILLEGAL_STATE);
    /// GPU work did not end in time.
    pub const NOT_READY: Self = Self(NOT_READY);
    /// The process uses something that cannot be checkpointed: managed memory.
    pub const NOT_SUPPORTED: Self = Self(NOT_SUPPORTED);

    fn name(self) -> &'static str {
        match self.0 {
            INVALID_VALUE => "CUDA_ERROR_INVALID_VALUE",
            2 => "CUDA_ERROR_OUT_OF_MEMORY",
            NOT_INITIALIZED => "CUDA_ERROR_NOT_INITIALIZED",
            4 => "CUDA_ERROR_DEINITIALIZED",
            46 => "CUDA_ERROR_DEVICE_UNAVAILABLE",
            100 => "CUDA_ERROR_NO_DEVICE",
            101 => "CUDA_ERROR_INVALID_DEVICE",
            201 => "CUDA_ERROR_INVALID_CONTEXT",
            OPERATING_SYSTEM => "CUDA_ERROR_OPERATING_SYSTEM",
            ILLEGAL_STATE => "CUDA_ERROR_ILLEGAL_STATE",
            NOT_READY => "CUDA_ERROR_NOT_READY",
            NOT_SUPPORTED => "CUDA_ERROR_NOT_SUPPORTED",
            802 => "CUDA_ERROR_SYSTEM_NOT_READY",
            999 => "CUDA_ERROR_UNKNOWN",
            _ => "a CUDA error",
        }
    }
}

impl fmt::Display for CudaResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name(), self.0)
    }
}

impl std::error::Error for CudaResult {}

/// `CUprocessState`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProcessState {
    /// It uses CUDA freely.
    Running,
    /// Its CUDA calls wait.
    Locked,
    /// Its GPU state is in its memory.
    Checkpointed,
    /// The driver gave it up.
    Failed,
    /// CUDA 13.4: the caller moves its GPU state.
    Checkpointing,
    /// CUDA 13.4: the caller moves its GPU state back.
    Restoring,
    /// A state of a later driver.
    Other(u32),
}

impl From<u32> for ProcessState {
    fn from(state: u32) -> Self {
        match state {
            0 => Self::Running,
            1 => Self::Locked,
            2 => Self::Checkpointed,
            3 => Self::Failed,
            4 => Self::Checkpointing,
            5 => Self::Restoring,
            other => Self::Other(other),
        }
    }
}

impl fmt::Display for ProcessState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Running => f.write_str("running"),
            Self::Locked => f.write_str("locked"),
            Self::Checkpointed => f.write_str("checkpointed"),
            Self::Failed => f.write_str("failed"),
            Self::Checkpointing => f.write_str("checkpointing"),
            Self::Restoring => f.write_str("restoring"),
            Self::Other(state) => write!(f, "unknown ({state})"),
        }
    }
}

/// Why the driver cannot be used on this node.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// There is no libcuda.
    #[error("no NVIDIA driver on this node: {tried}; if it is elsewhere, set {LIBRARY_VARIABLE} for containerd")]
    NoLibrary {
        /// What the loader said of each place.
        tried: String,
    },
    /// libcuda lacks the checkpoint API.
    #[error("the NVIDIA driver {library} has no {function}: checkpoints need driver 570 or newer")]
    TooOld {
        /// The library.
        library: String,
        /// What it lacks.
        function: &'static str,
    },
}

/// A loaded libcuda.
pub struct Driver {
    functions: Functions,
    library: OsString,
}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Driver").field("library", &self.library).finish_non_exhaustive()
    }
}

impl Driver {
    /// Loads the library that [`LIBRARY_VARIABLE`] names, else the one that the loader finds, else one from the places
    /// where drivers are installed.
    ///
    /// # Errors
    /// When there is none, or it is too old.
    pub fn load() -> Result<Self, DriverError> {
        if let Some(library) = std::env::var_os(LIBRARY_VARIABLE) {
            return Self::load_first(&[library]);
        }
        let in_folders = FOLDERS.iter().map(|folder| PathBuf::from(folder).join(LIBRARY).into_os_string());
        Self::load_first(&std::iter::once(OsString::from(LIBRARY)).chain(in_folders).collect::<Vec<_>>())
    }

    fn load_first(libraries: &[OsString]) -> Result<Self, DriverError> {
        let mut tried = Vec::new();
        for library in libraries {
            match Functions::load(library) {
                Ok(functions) => return Ok(Self { functions, library: library.clone() }),
                Err(LoadFailure::Function(name)) => {
                    let function = name.to_str().unwrap_or_default();
                    return Err(DriverError::TooOld { library: library.to_string_lossy().into_owned(), function });
                }
                Err(LoadFailure::Library(error)) => tried.push(chain(&error)),
            }
        }
        // The first is what the loader says of the usual place; the others only say that they are not there either.
        Err(DriverError::NoLibrary { tried: tried.into_iter().next().unwrap_or_default() })
    }

    /// The file that was loaded, or its name.
    #[must_use]
    pub fn library(&self) -> &OsStr {
        &self.library
    }

    /// The CUDA version of the driver: 13000 is 13.0.
    ///
    /// # Errors
    /// The driver's.
    pub fn version(&self) -> Result<i32, CudaResult> {
        self.functions.version().map_err(CudaResult)
    }

    /// Whether the caller may move the GPU state itself (CUDA 13.4). Not used yet.
    #[must_use]
    pub fn has_custom_storage(&self) -> bool {
        self.functions.has_custom_storage()
    }

    /// What state a process is in. Waits for ever on one that is frozen or stopped, like every call here.
    ///
    /// # Errors
    /// [`CudaResult::NOT_INITIALIZED`] for a process without CUDA, [`CudaResult::OPERATING_SYSTEM`] for none at all.
    pub fn state(&self, pid: HostPid) -> Result<ProcessState, CudaResult> {
        self.functions.state(pid.raw()).map(ProcessState::from).map_err(CudaResult)
    }

    /// The driver's thread in the process.
    ///
    /// # Errors
    /// As [`Self::state`].
    pub fn restore_thread(&self, pid: HostPid) -> Result<i32, CudaResult> {
        self.functions.restore_thread(pid.raw()).map_err(CudaResult)
    }

    /// Has the process start no more GPU work, and waits `timeout_ms` for what runs; 0 is for ever.
    ///
    /// # Errors
    /// [`CudaResult::NOT_READY`] after the timeout: it goes on as before.
    pub fn lock(&self, pid: HostPid, timeout_ms: u32) -> Result<(), CudaResult> {
        self.functions.lock(pid.raw(), timeout_ms).map_err(CudaResult)
    }

    /// Moves the GPU state of a locked process to its memory.
    ///
    /// # Errors
    /// [`CudaResult::NOT_SUPPORTED`] for managed memory: it stays locked.
    pub fn checkpoint(&self, pid: HostPid) -> Result<(), CudaResult> {
        self.functions.checkpoint(pid.raw()).map_err(CudaResult)
    }

    /// Moves the state back; the process is locked then.
    ///
    /// # Errors
    /// The driver's.
    pub(crate) fn restore(&self, pid: HostPid, pairs: &[GpuPair]) -> Result<(), CudaResult> {
        self.functions.restore(pid.raw(), pairs).map_err(CudaResult)
    }

    /// Lets a locked process go on.
    ///
    /// # Errors
    /// The driver's.
    pub fn unlock(&self, pid: HostPid) -> Result<(), CudaResult> {
        self.functions.unlock(pid.raw()).map_err(CudaResult)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_without_a_driver_says_so() {
        let error = Driver::load_first(&["/nowhere/libcuda.so.1".into()]).unwrap_err().to_string();
        assert!(error.contains("/nowhere/libcuda.so.1") && error.contains(LIBRARY_VARIABLE), "{error}");
    }

    #[test]
    fn a_library_without_the_api_is_told_from_a_missing_one() {
        let error = Driver::load_first(&["libc.so.6".into()]).unwrap_err().to_string();
        assert!(error.contains("cuDriverGetVersion") && error.contains("570"), "{error}");
    }

    #[test]
    fn results_are_told_by_name_and_number() {
        assert_eq!(CudaResult::NOT_READY.to_string(), "CUDA_ERROR_NOT_READY (600)");
        assert_eq!(CudaResult(12345).to_string(), "a CUDA error (12345)");
    }
}
