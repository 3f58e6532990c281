//! Memory of processes, and the places where it is kept.

use std::path::PathBuf;

use memory::Regions;
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

/// Images that are whole, and what is to be made of them.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Publish {
    /// The folder of the images.
    pub images: PathBuf,
    /// What memory is to be where.
    pub place: Place,
    /// Parts of the saved staging memory that stayed in memory: the images have them too.
    pub left: Vec<Regions>,
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
