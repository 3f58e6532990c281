//! Images of a few pages.

mod devices;
mod filters;
pub(crate) mod formats;
mod memory;
mod sockets;
