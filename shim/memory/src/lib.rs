//! The bulk memory engine: memory of processes in packs of checksummed chunks, saved and filled by many threads.
//!
//! ```text
//!   save_processes ──────────┐
//!   Shared ─► save_together ─┤                ┌─ Pack, verify
//!   save_files ──────────────┴─► packs, table ┴─ fill, prefetch
//! ```
//!
//! [`save_processes`] reads ranges of stopped processes, [`save_together`] the memory that they share, and [`save_files`]
//! takes what is in files already. All write packs
//! into a folder and say in a [`SegmentTable`] which memory of which process is where in them. [`fill`] writes it all
//! into processes again. What is written depends on the memory alone, not on the number of threads: equal memory gives
//! equal packs.
//!
//! Packs and tables are untrusted when read: lengths are checked against the file before they are believed, and every
//! chunk against its checksum before a byte of it is used.
//!
//! Copies go through a buffer per thread that stays in the processor's cache. That was measured to be faster than
//! mapping packs, in both directions, and a file that shrinks is an error here and not a signal.

#![deny(unsafe_code)]

mod buffer;
mod checksum;
mod control;
mod error;
mod fill;
mod layout;
mod pack;
mod remote;
mod save;
mod shared;
mod table;
#[cfg(test)]
mod tests;
mod units;

pub use control::Control;
pub use error::{FillError, PackError, SaveError, VerifyError};
pub use fill::{Destination, fill, prefetch};
pub use layout::{Layout, ProcessLayout, Regions};
pub use pack::{CHUNK, MAX_PACK_DATA, PAGE, Pack, Trailer, TrailerError, verify};
pub use save::{Draft, FileSource, Saved, save_files, save_processes, save_together};
pub use shared::{Shared, SharedFile};
pub use table::{MAX_TABLE, Place, Process, Segment, SegmentTable, Statistics, TableError};
