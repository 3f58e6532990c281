//! The GPU state of a container, moved to the memory of its processes and back.
//!
//! ```text
//!   shim ──► Guardian (client) ──socket──► guardian process: session, hold, residue, staging memory (crate memory)
//!                                             └──socket──► callers (crate cuda): one driver call at a time
//! ```
//!
//! Everything that touches the processes of a container happens in the guardian, a process of its own for each session.
//! When the shim dies, it puts everything back; when it dies itself, the shim starts another that does.

#![deny(unsafe_code)]

mod ahead;
mod client;
mod guardian;
mod host;
mod keeper;
mod protocol;
mod refill;
mod residue;
mod session;
mod swap;

pub use client::{CudaError, Guardian};
pub use guardian::{GUARDIAN, guardian_main};
pub use keeper::Keeper;
pub use session::{LEAST_STAGING, OnGpu, Owed, Resumed, SessionError, Staging, Step, Suspended, SuspendedProcess};
pub use swap::{Piece, Source, Swap, SwapProcess, Swapped, SwappedProcess};

/// Tells whether an environment variable of containerd switches something off.
fn is_off(variable: &str) -> bool {
    std::env::var_os(variable).is_some_and(|value| value == "off")
}
