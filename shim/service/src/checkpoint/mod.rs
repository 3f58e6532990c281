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
//! | `gpusnap.json` | [`Manifest`]: how it was made |

mod draft;
mod gpu;
mod log;
mod manifest;
mod shm;
mod temporary;
mod wishes;

pub(crate) use draft::Draft;
pub(crate) use gpu::{DeviceNode, SavedGpus};
pub(crate) use log::{LogFolder, ROOT as LOGS};
pub(crate) use manifest::Manifest;
pub(crate) use shm::Shm;
pub(crate) use temporary::remove_if_containerds;
pub(crate) use wishes::{Annotations, MemoryPlace, Wishes};
