//! What the shim and its guardian say to each other: one JSON value a line, over a socket.

use std::time::Duration;

use phase::Phase;
use serde::{Deserialize, Serialize};

use crate::session::{Resumed, SessionError, Suspended};
use crate::swap::{Swap, Swapped};
use cuda::Inventory;
use cuda::Pair;

/// What a guardian is to do.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Order {
    /// Says what this node has of GPUs.
    Inventory,
    /// Of the container that this process belongs to.
    Suspend {
        pid: i32,
        paused: bool,
        patience: Duration,
        limit: Duration,
    },
    /// `paused` is how to leave a container whose shim dies.
    Swap {
        pid: i32,
        paused: bool,
        swap: Swap,
        limit: Duration,
    },
    Resume {
        pid: i32,
        frozen: bool,
        pairs: Vec<Pair>,
        limit: Duration,
    },
    /// Of a container of which only the CUDA processes have their memory, but for this staging memory. It stands still until
    /// [`Order::Run`].
    ResumeUnfilled {
        pid: i32,
        staging: Swap,
        pairs: Vec<Pair>,
        limit: Duration,
    },
    /// All processes have all their memory.
    Run,
}

/// What it says meanwhile, and in the end.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Report {
    Began(Phase),
    Inventory(Result<Inventory, SessionError>),
    Suspended(Result<Suspended, SessionError>),
    Swapped(Result<Swapped, SessionError>),
    /// The GPU state of a container that is to be filled is back.
    Restored,
    Resumed(Result<Resumed, SessionError>),
}
