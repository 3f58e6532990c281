//! An asynchronous client of CRIU, which saves running process trees as files and brings them back.
//!
//! Each request is one run of `criu swrk`, a child of this process that is spoken to over a socket pair and lives no
//! longer than its request. It is spawned and waited for through [`reaper::Reaper`], so nothing here blocks the thread:
//!
//! ```text
//!  Criu::dump(request, notify) ──► spawn `criu swrk 3` ── request ──►        criu
//!                                  notify.pre_dump() ... ◄── NOTIFY ──       stops the tree, reads it
//!                                                        ── ok / failed ──►  goes on / lets the tree run again
//!                                  Dumped                ◄── DUMP ok ──      has ended, no image is half-written
//! ```
//!
//! **A failed callback** is answered with a refusal, so that CRIU undoes its work, and is the operation's error. Some
//! refusals CRIU only logs (all after the network of a restored tree is unlocked); then the restored root is killed
//! before the answer is given, and CRIU removes the rest.
//!
//! **A cancelled operation** (its future is dropped) goes on in a task of its own, which closes the socket. CRIU finds
//! that at its next notification, the latest of which comes before a dumped tree is ended, and undoes its work as
//! after a failed callback. It is killed only when that takes longer than [`Criu::cancel_grace`]: killing loses what
//! CRIU alone can put back (rules that block the network, instructions patched for a moment).
//!
//! **However criu ends**, what it leaves is removed: image files of a dump that is not whole, a cgroup that it froze,
//! a network that it blocked, processes of a half-restored tree.
//!
//! CRIU's plugins stay switched off: the CUDA plugin would drive the GPU behind the shim's back.

mod call;
mod client;
mod dump;
mod error;
mod freezer;
mod log;
mod network;
mod notify;
mod options;
mod orphan;
mod probe;
mod residue;
mod restore;
mod swrk;
#[allow(unsafe_code)]
mod sys;
#[cfg(test)]
mod tests;
mod transport;
mod version;

pub use client::{CANCEL_GRACE, Criu};
pub use dump::{DumpRequest, Dumped};
pub use error::{CallError, DumpError, Missing, PreflightError, Refusal, RestoreError};
pub use log::explain;
pub use network::unblock_network;
pub use notify::{BoxError, NotifyDump, NotifyRestore, OnKilled, Stage};
pub use options::{
    CgroupMode, CgroupRoot, CgroupRoots, External, ExternalMount, Inherit, JoinNamespace, Namespace, NetworkLock,
    Options,
};
pub use orphan::end_orphans;
pub use probe::Features;
pub use residue::remove_cgroup_mounts;
pub use restore::{RestoreRequest, Restored};
pub use transport::{Packet, announced, receive_packet, with_other_folders};
pub use version::{CONTAINERD_MINIMUM, MINIMUM, Version};
