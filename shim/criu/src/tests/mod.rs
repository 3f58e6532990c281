//! The client against a criu that does what no real one should: this program again (`fake`).

mod fake;
mod formats;
mod protocol;
