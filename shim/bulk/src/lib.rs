//! The bulk memory of a container, moved between its processes and the node store.
//!
//! ```text
//!   shim ──► Worker (client) ──socket──► memory-worker process: crate memory, crate snapshot, images of crate criu
//! ```
//!
//! A worker serves one checkpoint or one restore and ends with it. It holds what is not finished yet: the draft of a snapshot,
//! which goes with it, or the right to use a snapshot, which nobody removes meanwhile. It only reads and writes memory; what
//! keeps the processes still is not its business.

#![deny(unsafe_code)]

mod client;
mod inline;
mod protocol;
mod restore;
mod save;
mod worker;

pub use client::{BulkError, Filled, Worker};
pub use inline::is_inline;
pub use protocol::{Failure, Node, Piece, Place, Publish, Published, Restored, Saved, SavedStaging, Source, Staging};
pub use save::LEAST_MEMORY;
pub use worker::{WORKER, worker_main};
