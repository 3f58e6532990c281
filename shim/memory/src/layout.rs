//! Memory of processes on its way: what is moved, and the packs that have it.

use std::path::PathBuf;

use proc::{ProcessIds, Range};
use serde::{Deserialize, Serialize};

use crate::table::Segment;

/// Memory of one process that is moved together, such as the memory to which the driver has moved GPU state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Regions {
    /// The process. Packs and tables have its pid in the container.
    pub process: ProcessIds,
    /// Whole pages, in order of addresses.
    pub ranges: Vec<Range>,
}

/// Memory of living processes, by the packs that have its contents.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// The packs. A pack that a process has mapped must never change.
    pub packs: Vec<PathBuf>,
    /// The processes.
    pub processes: Vec<ProcessLayout>,
}

/// Memory of one living process, by the packs that have its contents.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessLayout {
    /// The process.
    pub process: ProcessIds,
    /// In any order. They need not be all of its memory, nor be adjacent.
    pub segments: Vec<Segment>,
}
