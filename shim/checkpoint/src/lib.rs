//! What a checkpoint is made of beside CRIU's images, and what containerd and the user ask for.
//!
//! The directory that containerd names receives flat files only, since the CRI flattens it:
//!
//! | file | what |
//! |---|---|
//! | `*.img`, `stats-dump` | CRIU's |
//! | `descriptors.json` | runc's note of the standard streams |
//! | `dev-shm.tar` | the contents of a `/dev/shm` that comes from outside, if there are any |
//! | `memory.segments`, `memory-*.pack` | big memory, where it is wanted beside the images |
//! | `gpusnap.json` | [`Record`]: whether it is complete, and its [`Manifest`]: how it was made |

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
pub use manifest::Manifest;
pub use options::{CheckpointOptions, RequestError};
pub use permission::{Network, allow, registry};
pub use record::{Folder, FolderError, Record};
pub use shm::Shm;
pub use temporary::remove_if_containerds;
