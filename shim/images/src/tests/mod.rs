//! Images of a few pages.

mod formats;
mod memory;
