//! Images of a few pages.

pub(crate) mod formats;
mod memory;
