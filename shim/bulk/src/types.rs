//! Memory of processes, and the places where it is kept.

use std::ops::Range;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use snapshot::{Config, Name, Pointer, Scope};

/// Where a node looks for snapshots.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// The folder of its store.
    pub store: PathBuf,
    /// Whose the container is: snapshots of others are not used.
    pub scope: Scope,
    /// The repository from which it pulls what the store lacks, such as `registry.example/models/vit`. A tag or digest does not
    /// count: what is pulled is what a checkpoint points to.
    pub registry: Option<String>,
}

/// Memory of a process to which the driver has moved what the process had on GPUs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Staging {
    /// In the pid namespace of the shim.
    pub process: i32,
    /// In its own, innermost pid namespace.
    pub pid: i32,
    /// Addresses.
    pub ranges: Vec<Range<u64>>,
}

/// Where saved staging memory is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// The files.
    pub files: Vec<PathBuf>,
    /// In the order of what was asked for.
    pub processes: Vec<SavedStaging>,
}

/// Where the staging memory of a process is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedStaging {
    /// In the pid namespace of the shim; of one that is not restored yet in its own.
    pub process: i32,
    /// All of it, in order of addresses.
    pub pieces: Vec<Piece>,
}

/// A piece of memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Piece {
    /// Where it begins, and how many bytes it has: whole pages.
    pub address: u64,
    /// In bytes.
    pub length: u64,
    /// Index of the file that has it, and where in that; None if it is all zero.
    pub source: Option<(usize, u64)>,
}

/// Images that are whole, and what is to be made of them.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Publish {
    /// The folder of the images.
    pub images: PathBuf,
    /// What memory is to be where.
    pub place: Place,
    /// Parts of the saved staging memory that stayed in memory, by the process's pid in its own pid namespace: the images
    /// have them too.
    pub left: Vec<(i32, Range<u64>)>,
    /// Pages that processes have in common by a fork stay in the images, so that they are in common again. A fill makes them
    /// a page of each process.
    pub keep_shared: bool,
    /// What else is known of the snapshot. Sizes and processes' names are the worker's to fill in.
    pub config: Config,
}

/// Where big memory goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Place {
    /// Into the store, under this name; the pointer to it says from where it can be pulled.
    Store(Name, Option<String>),
    /// To the images.
    Inline,
}

/// Memory that was moved out of images.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Published {
    /// Where it is now.
    pub source: Source,
    /// How much there is of it, in bytes.
    pub memory: u64,
    /// How much of that is zero, or there already.
    pub spared: u64,
}

/// Where the memory is that was moved out of images.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// In a snapshot.
    Snapshot(Pointer),
    /// Beside the images.
    Inline,
}

/// A process whose memory is to be filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restored {
    /// In its own, innermost pid namespace.
    pub pid: i32,
    /// In the pid namespace of the shim.
    pub process: i32,
}
