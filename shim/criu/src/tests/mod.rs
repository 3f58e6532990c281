//! Tests of the client against a misbehaving criu, unlike any real one: this program again
//! (`fake`).

mod fake;
mod formats;
mod protocol;
