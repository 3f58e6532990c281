//! The bulk memory of a container, moved between its processes and the node store.
//!
//! ```text
//!   checkpoint: Saving::begin ──► save (staging memory) ──► publish (images are whole) ──► snapshot
//!   restore:    Restoring::open (found or pulled, read ahead) ──► fill
//! ```
//!
//! [`Saving`] owns the draft of a snapshot: dropped before [`Saving::publish`], nothing of it is left. [`Restoring`] keeps
//! others from removing the snapshot. Both only read and write memory; the session keeps the processes still.

#![deny(unsafe_code)]

mod inline;
mod restore;
mod save;
mod types;

pub use inline::is_inline;
pub use restore::Restoring;
pub use save::{LEAST_MEMORY, LEAST_RUN, Saving, withdraw};
pub use types::{Node, Place, Publish, Published, Source};
