//! Callbacks at CRIU's stages, while CRIU waits.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use async_trait::async_trait;
use reaper::Child;

/// Error of a callback, kept as the source of the operation's error.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A stage at which CRIU stops and asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Dump: nothing is touched yet.
    PreDump,
    /// Dump: the tree is stopped and the network is about to be blocked.
    NetworkLock,
    /// Dump and restore: the network is about to be unblocked.
    NetworkUnlock,
    /// Dump: asks for the names of external files.
    QueryExternalFiles,
    /// Dump: the images are complete; the tree is still stopped.
    PostDump,
    /// Restore: nothing exists yet.
    PreRestore,
    /// Restore: the root process exists, in new namespaces that are not set up.
    SetupNamespaces,
    /// Restore: the namespaces are set up.
    PostSetupNamespaces,
    /// Restore: a terminal with the master outside the tree.
    OrphanPtsMaster,
    /// Restore: all processes exist, memory is filled, none runs.
    PostRestore,
    /// Restore: all processes are about to run.
    PreResume,
    /// Restore: all processes run.
    PostResume,
    /// Lazy pages: the page server listens.
    StatusReady,
    /// A stage unknown to this crate, always acknowledged.
    Other(String),
}

impl Stage {
    const KNOWN: [(&'static str, Self); 13] = [
        ("pre-dump", Self::PreDump),
        ("network-lock", Self::NetworkLock),
        ("network-unlock", Self::NetworkUnlock),
        ("query-ext-files", Self::QueryExternalFiles),
        ("post-dump", Self::PostDump),
        ("pre-restore", Self::PreRestore),
        ("setup-namespaces", Self::SetupNamespaces),
        ("post-setup-namespaces", Self::PostSetupNamespaces),
        ("orphan-pts-master", Self::OrphanPtsMaster),
        ("post-restore", Self::PostRestore),
        ("pre-resume", Self::PreResume),
        ("post-resume", Self::PostResume),
        ("status-ready", Self::StatusReady),
    ];

    /// Parses CRIU's name of a stage (`action_names` in criu/action-scripts.c).
    pub(crate) fn named(script: &str) -> Self {
        let known = Self::KNOWN.into_iter().find(|(name, _)| *name == script);
        known.map_or_else(|| Self::Other(script.to_owned()), |(_, stage)| stage)
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let known = Self::KNOWN.iter().find(|(_, stage)| stage == self);
        match (known, self) {
            (Some((name, _)), _) => f.write_str(name),
            (None, Self::Other(name)) => write!(f, "{name:?}"),
            (None, _) => f.write_str("?"),
        }
    }
}

/// Callbacks of a dump, in CRIU's order. A default callback succeeds.
///
/// After a failed callback CRIU lets the tree run again, and the dump fails with the callback's
/// error. A failed `network_unlock` of a tree left running is different: CRIU ignores the failure,
/// and the complete images stay.
#[async_trait]
pub trait NotifyDump: Send {
    /// Nothing is touched yet.
    async fn pre_dump(&mut self) -> Result<(), BoxError> {
        Ok(())
    }

    /// The tree is stopped. CRIU blocks the network namespace next, except with
    /// [`crate::NetworkLock::Skip`].
    async fn network_lock(&mut self) -> Result<(), BoxError> {
        Ok(())
    }

    /// Returns external files in CRIU's notation, in addition to the request's.
    async fn query_external_files(&mut self) -> Result<Vec<String>, BoxError> {
        Ok(vec![])
    }

    /// The images are complete and the tree is still stopped: the last chance to refuse. After
    /// success the dump stands, even if the operation is cancelled.
    async fn post_dump(&mut self) -> Result<(), BoxError> {
        Ok(())
    }

    /// The network is unblocked next: after a failure, or for a tree left running. Also called
    /// during the undoing after another failed callback. CRIU ignores a failure.
    async fn network_unlock(&mut self) -> Result<(), BoxError> {
        Ok(())
    }
}

impl NotifyDump for () {}

/// Callbacks of a restore, in CRIU's order. A default callback succeeds.
///
/// After a failed callback every process of the tree is killed, and the restore fails with the
/// callback's error.
#[async_trait]
pub trait NotifyRestore: Send {
    /// criu runs without a request so far. The place to move criu to the cgroup for the restored
    /// tree.
    async fn started(&mut self, criu: &Child) -> Result<(), BoxError> {
        let _ = criu;
        Ok(())
    }

    /// Nothing exists yet.
    async fn pre_restore(&mut self) -> Result<(), BoxError> {
        Ok(())
    }

    /// The root process exists in the tree's namespaces, still empty. Not reached by a tree without
    /// namespaces.
    async fn setup_namespaces(&mut self, root: &Child) -> Result<(), BoxError> {
        let _ = root;
        Ok(())
    }

    /// The namespaces are set up.
    async fn post_setup_namespaces(&mut self) -> Result<(), BoxError> {
        Ok(())
    }

    /// Takes the master of a restored terminal, if held outside the tree at the dump
    /// ([`crate::Options::orphan_pts_master`]).
    async fn orphan_pts_master(&mut self, master: OwnedFd) -> Result<(), BoxError> {
        drop(master);
        Ok(())
    }

    /// All processes and all memory exist, none runs. The reaper already watches the root.
    async fn post_restore(&mut self, root: &Child) -> Result<(), BoxError> {
        let _ = root;
        Ok(())
    }

    /// The network is unblocked next.
    async fn network_unlock(&mut self) -> Result<(), BoxError> {
        Ok(())
    }

    /// All processes are stopped at the last system call before the restored program.
    async fn pre_resume(&mut self) -> Result<(), BoxError> {
        Ok(())
    }

    /// All processes run.
    async fn post_resume(&mut self) -> Result<(), BoxError> {
        Ok(())
    }
}

impl NotifyRestore for () {}

/// A callback for the moment between kill and end of a failed restore's processes. A process in a
/// frozen cgroup of v1 ends only after a thaw; after an earlier thaw, the process would run.
///
/// Runs also for a restore with a dropped future, so the callback borrows nothing.
#[derive(Clone)]
pub struct OnKilled(Arc<dyn Fn() + Send + Sync>);

impl OnKilled {
    /// Wraps a function that returns soon.
    pub fn new(run: impl Fn() + Send + Sync + 'static) -> Self {
        Self(Arc::new(run))
    }

    pub(crate) fn run(&self) {
        (self.0)();
    }
}

impl fmt::Debug for OnKilled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OnKilled")
    }
}
