//! The session: one process for each checkpoint or restore, which owns everything that must be put back.
//!
//! ```text
//!   shim ── Conductor ──► Sessions ──spawn──► session process
//!             ▲               │ order, then go-on or cancel      │ main thread: freezer, GPU (ptrace), CRIU, draft
//!             │               │ ◄── phases, restored, done ──    │ threads: big memory, the reader of the socket
//!             │               │ ◄── log pipe ──                  ├── criu        a child, or for a restore the shim's
//!             └── result ─────┘                                  └── cuda-caller one driver call at a time
//! ```
//!
//! The shim owns nothing but the Task service: it starts a session, shows its phase, cancels it, and replaces it.
//!
//! Failure paths:
//!
//! - **A step fails, or the operation is cancelled.** The undo stack is popped in order ([`undo`]). A step that cannot be
//!   undone never keeps the steps below it from being undone. What is owed to the container then (GPU state, the
//!   freezer) is told, and tried again with growing pauses until it is paid or the processes are gone.
//! - **The shim dies.** The socket ends: the session cancels itself.
//! - **The session dies or is late.** The shim kills it. A successor undoes: it asks the driver, the freezer and the commit
//!   record what there is to undo, so it needs no journal ([`UndoOrder`]).
//! - **Both die.** The commit record says `incomplete`, and the folder is refused.

#![deny(unsafe_code)]

mod checkpoint;
mod client;
mod connections;
mod error;
mod halt;
mod limits;
mod machine;
mod memory;
mod network;
mod order;
mod orphans;
mod process;
mod restore;
#[allow(unsafe_code)]
mod sys;
#[cfg(test)]
mod tests;
mod undo;

pub use client::{Conductor, Restored, Sessions, Stop, StopGuard};
pub use error::{Failed, SessionError};
pub use order::{CheckpointOrder, NodeStore, RestoreOrder, Subject, UndoOrder};
pub use orphans::end_restores;
pub use process::{SESSION, session_main};
