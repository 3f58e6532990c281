//! CRIU's images: read, checked, and rewritten without some of their memory.
//!
//! Every image file has two magic numbers and then entries, each a length and a protobuf message
//! (images/*.proto of CRIU); the inventory has one magic number. Images are untrusted: sizes are
//! capped, only regular files are read, and unknown fields are skipped.

mod cut;
mod devices;
mod files;
mod filters;
mod format;
mod inspect;
mod memory;
mod pages;
mod rewrite;
mod sharing;
mod sockets;
#[cfg(test)]
mod tests;
mod tree;
mod vma;
mod wire;

pub use cut::{PrivateCopy, UNMARKED_PREFIX, Unmarked, mark};
pub use devices::{Devices, NULL, replace_devices};
pub use files::OpenFiles;
pub use filters::filters;
pub use format::{INVENTORY, ImageError, MARK};
pub use inspect::{Image, check, check_threads, inspect};
pub use memory::{Inherited, Run, present, runs};
pub use pages::check_pages;
pub use rewrite::{Changes, RewriteError, Staging, rewrite};
pub use sockets::Moves;
pub use tree::root_pid;
