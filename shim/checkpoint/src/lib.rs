//! Contents of a checkpoint beside CRIU's images, and the options of containerd and the user.
//!
//! The directory named by containerd receives flat files only, since the CRI flattens it:
//!
//! | file | what |
//! |---|---|
//! | `*.img`, `stats-dump` | CRIU's images and statistics |
//! | `descriptors.json` | runc's note of the standard streams |
//! | `dev-shm.tar` | the contents of a `/dev/shm` from outside, if not empty |
//! | `memory.segments`, `memory-*.pack` | big memory, if requested beside the images |
//! | `gpusnap.json` | [`Record`]: complete or not, with the [`Manifest`] |

mod annotations;
mod draft;
mod gpu;
mod log;
mod manifest;
mod options;
mod permission;
mod record;
mod shm;
mod temporary;

pub use annotations::{AnnotationError, Annotations, MemoryPlace};
pub use draft::Draft;
pub use gpu::{DeviceNode, SavedGpus};
pub use log::{LogFolder, ROOT as LOGS};
pub use manifest::{Address, Manifest};
pub use options::{CheckpointOptions, RequestError};
pub use permission::{Network, allow, registry};
pub use record::{Folder, FolderError, Record};
pub use shm::Shm;
pub use temporary::remove_if_containerds;
