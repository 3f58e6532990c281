//! An asynchronous client of CRIU, the tool for saving running process trees as files, and for
//! restoring.
//!
//! Each request is one run of `criu swrk`, a child of this process with a socket pair and the
//! lifetime of the request. [`reaper::Reaper`] spawns and reaps the child, so nothing here blocks
//! the thread:
//! ```text
//!  Criu::dump(request, notify) ──► spawn `criu swrk 3` ── request ──►        criu
//!                                  notify.pre_dump() ... ◄── NOTIFY ──       stops the tree, reads it
//!                                                        ── ok / failed ──►  goes on / lets the tree run again
//!                                  Dumped                ◄── DUMP ok ──      has ended, no image is half-written
//! ```
//!
//! **A failed callback** is the operation's error, and is answered with a refusal, so that CRIU
//! undoes the work so far. Some refusals are only logged by CRIU (all after the network of a
//! restored tree is unlocked). Then the restored root is killed before the answer, and CRIU removes
//! the rest.
//!
//! **A cancelled operation** (a dropped future) goes on in a separate task, which closes the
//! socket. CRIU notices at the next notification, at the latest before the end of a dumped tree,
//! and undoes the work as after a failed callback. criu is killed only after
//! 10 s: a killed criu cannot undo internal changes (rules that block the
//! network, instructions patched for a moment).
//!
//! **After every end of criu** the leftovers are removed: image files of an incomplete dump, a
//! frozen cgroup, a blocked network, processes of a half-restored tree.
//!
//! CRIU's plugins stay switched off: the CUDA plugin would drive the GPU behind the shim's back. A dump
//! may have one of ours.

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
mod plugin;
mod probe;
mod residue;
mod restore;
mod sparse;
mod swrk;
#[allow(unsafe_code)]
mod sys;
#[cfg(test)]
mod tests;
mod transport;
mod version;

pub use client::Criu;
pub use dump::{DumpRequest, Dumped};
pub use error::{CallError, DumpError, Refusal, RestoreError};
pub use log::explain;
pub use network::unblock_network;
pub use notify::{BoxError, NotifyDump, NotifyRestore, OnKilled, Stage};
pub use options::{
    CgroupMode, CgroupRoot, CgroupRoots, External, ExternalMount, Inherit, JoinNamespace, Namespace, NetworkLock,
    Options,
};
pub use orphan::end_orphans;
pub use plugin::DevicePlugin;
pub use residue::remove_cgroup_mounts;
pub use restore::{RestoreRequest, Restored};
pub use sparse::Sparse;
pub use transport::{Packet, announced, receive_packet, with_other_folders};
pub use version::{MINIMUM, Version};
