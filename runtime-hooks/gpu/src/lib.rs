//! The GPU state of a container, moved to the memory of its processes and back.
//!
//! ```text
//!   Keeper: session, hold, staging memory (crate memory)
//!     └──socket──► callers (crate cuda): one driver call at a time, killed when it hangs
//! ```
//!
//! Everything that touches the processes of a container happens in the process that uses the [`Keeper`], which lives for
//! one checkpoint or restore. When that process dies, another one puts everything back: the driver says what there is to
//! put back.

#![deny(unsafe_code)]

mod backfill;
mod host;
mod keeper;
mod prefault;
mod remap;
mod session;

pub use keeper::Keeper;
pub use session::{
    LEAST_STAGING, LeftDevices, OnGpu, Owed, Resumed, SessionError, Step, Suspended, SuspendedProcess, is_descendant,
};

/// Tells whether an environment variable of containerd switches something off.
fn is_off(variable: &str) -> bool {
    std::env::var_os(variable).is_some_and(|value| value == "off")
}
