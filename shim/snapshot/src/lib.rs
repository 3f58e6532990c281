//! The node's store of snapshots: an OCI image layout, with one image manifest for each snapshot.
//! Format: docs/format.md.
//!
//! - A snapshot is written into a [`Draft`] and published by renaming, whole or not at all; equal
//!   blobs are stored once.
//! - Several processes may use one store. A process that dies leaves garbage at most, never half a
//!   snapshot.
//! - A [`Snapshot`] in use is not removed.
//! - Files of the store are not trusted: sizes are limited, and digests are checked before they
//!   become paths.

#![deny(unsafe_code)]

mod archive;
mod config;
mod digest;
mod draft;
mod folder;
mod hash;
mod index;
mod list;
mod manifest;
mod name;
mod partial;
mod pointer;
mod publish;
mod reach;
mod remove;
mod size;
mod snapshot;
mod store;
#[cfg(test)]
mod tests;
mod verify;

pub use oci_spec::image::Descriptor;

pub use crate::archive::{ExportError, Import, ImportError};
pub use crate::config::{Config, ConfigError, Gpu, Host, Process, Sizes, Step};
pub use crate::digest::{Digest, DigestError};
pub use crate::draft::Draft;
pub use crate::folder::FileError;
pub use crate::hash::{Progress, hash_files};
pub use crate::index::{Entry, Index, IndexError};
pub use crate::list::{Listed, Usage};
pub use crate::manifest::{DOCUMENT_LIMIT, Layer, Manifest, ManifestError};
pub use crate::name::{Name, NameError, Reference, ReferenceError, Scope};
pub use crate::partial::Partial;
pub use crate::pointer::{Pointer, PointerError};
pub use crate::publish::{IfTaken, NewLayer, NewSnapshot, PublishError, Received};
pub use crate::remove::{GRACE, IfInUse, Prune, RemoveError, Removed};
pub use crate::size::parse_size;
pub use crate::snapshot::{ResolveError, Snapshot, SnapshotError};
pub use crate::store::{DEFAULT_ROOT, Durability, OpenError, ReadError, Store};
pub use crate::verify::{Inner, Problem, Report};

/// Artifact type in the manifest of a snapshot.
pub const ARTIFACT_TYPE: &str = "application/vnd.gpusnap.snapshot.v1+json";
/// Media type of the config.
pub const CONFIG_TYPE: &str = "application/vnd.gpusnap.snapshot.config.v1+json";
/// Media type of the layer with CRIU's images.
pub const CRIU_TYPE: &str = "application/vnd.gpusnap.criu.v1.tar+zstd";
/// Media type of a pack of GPU memory.
pub const GPU_MEMORY_TYPE: &str = "application/vnd.gpusnap.gpu-memory.v1";
/// Media type of a pack of host memory.
pub const HOST_MEMORY_TYPE: &str = "application/vnd.gpusnap.host-memory.v1";
/// Media type of the layer that maps memory to packs.
pub const SEGMENTS_TYPE: &str = "application/vnd.gpusnap.segments.v1";
/// Media type of the contents of `/dev/shm`.
pub const SHM_TYPE: &str = "application/vnd.gpusnap.shm.v1.tar";

use phase::chain;
