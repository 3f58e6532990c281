//! The words between a shim and its sessions: one JSON value a line.

use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use checkpoint::{Annotations, CheckpointOptions, DeviceNode, Shm};
use phase::Phase;
use proc::HostPid;
use runtime::{Choice, Prepare};
use serde::{Deserialize, Serialize};

use crate::error::Failed;
use crate::orphans::RESTORES;

/// The node's place for snapshots.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NodeStore {
    /// Folder of the store.
    pub root: PathBuf,
    /// Most bytes that the store may have.
    pub quota: Option<u64>,
    /// Default repository for pulling snapshots missing from the store.
    pub registry: Option<String>,
}

/// The container that an order is about.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Subject {
    /// Container id.
    pub id: String,
    /// containerd namespace.
    pub namespace: String,
    /// Absolute path of the bundle.
    pub bundle: PathBuf,
    /// Folder for logs of failed checkpoints and restores.
    pub logs: PathBuf,
    /// The container's runtime.
    pub runtime: Choice,
    /// Preparation of the container at its creation.
    pub prepare: Prepare,
    /// The node's store of snapshots.
    pub store: NodeStore,
}

/// A checkpoint to be taken.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CheckpointOrder {
    /// The container.
    pub subject: Subject,
    /// Pid of init.
    pub init: HostPid,
    /// Milliseconds since 1970. The name of the snapshot has them, so a successor knows the name.
    pub began: u64,
    /// The container was paused before, and is to be left so.
    pub paused: bool,
    /// The container's /dev/shm, if that comes from outside.
    pub shm: Option<Shm>,
    /// Devices that the container is given.
    pub devices: Vec<DeviceNode>,
    /// Options of the client, and the container's annotations where the client says nothing.
    pub options: CheckpointOptions,
}

impl CheckpointOrder {
    /// Returns the time as orders tell it.
    #[must_use]
    pub fn now() -> u64 {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    }
}

/// A restore. Standard streams without a terminal come as descriptors 3, 4 and 5.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RestoreOrder {
    /// The container.
    pub subject: Subject,
    /// Folder of the checkpoint.
    pub images: PathBuf,
    /// Folder in which the client wants CRIU's log.
    pub work: Option<PathBuf>,
    /// Use MS_MOVE instead of pivot_root.
    pub no_pivot_root: bool,
    /// Listening socket for a terminal's master. `None` without a terminal.
    pub console_socket: Option<PathBuf>,
    /// The container's /dev/shm, if that comes from outside.
    pub shm: Option<Shm>,
    /// The container's annotations about checkpoints.
    pub annotations: Annotations,
    /// Devices that the container is given.
    pub devices: Vec<DeviceNode>,
}

/// A checkpoint that a session left in the middle when it died.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct UndoOrder {
    /// The checkpoint that was ordered.
    pub checkpoint: CheckpointOrder,
}

/// The first line to a session.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Order {
    Checkpoint(Box<CheckpointOrder>),
    Restore(Box<RestoreOrder>),
    Undo(Box<UndoOrder>),
}

impl Order {
    /// Returns the container.
    pub(crate) fn subject(&self) -> &Subject {
        match self {
            Self::Checkpoint(order) => &order.subject,
            Self::Restore(order) => &order.subject,
            Self::Undo(order) => &order.checkpoint.subject,
        }
    }

    /// Returns the order's name in the arguments of its session.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Checkpoint(_) => "checkpoint",
            Self::Restore(_) => RESTORES,
            Self::Undo(_) => "undo",
        }
    }
}

/// Later lines to a session.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Instruction {
    /// The restored process is adopted and its streams are connected.
    GoOn,
    /// The result is not wanted any more.
    Cancel { reason: String },
}

/// Lines from a session.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Report {
    /// A phase began.
    Began(Phase),
    /// CRIU has made the processes; this is the pid of init.
    Restored { pid: HostPid },
    /// The operation succeeded. The session ends.
    Done,
    /// Word of a successor: the checkpoint is whole, and the container as ordered. The session ends.
    Stands,
    /// The operation failed. The session ends, unless something is owed.
    Failed(Box<Failed>),
}
