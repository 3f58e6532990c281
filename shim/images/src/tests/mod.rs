//! Images of a few pages.

mod devices;
pub(crate) mod formats;
mod memory;
mod sockets;
