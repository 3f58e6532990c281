//! Code of ours that runs at CRIU's stages, while CRIU waits.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use async_trait::async_trait;
use reaper::Child;

/// What a callback fails with. It is kept as the source of the operation's error.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A stage at which CRIU stops and asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Dump: nothing is touched yet.
    PreDump,
    /// Dump: the tree is stopped and its network is about to be blocked.
    NetworkLock,
    /// Dump and restore: the network is about to be unblocked.
    NetworkUnlock,
    /// Dump: asks for the names of external files.
    QueryExternalFiles,
    /// Dump: the images are whole; the tree is still stopped.
    PostDump,
    /// Restore: nothing exists yet.
    PreRestore,
    /// Restore: the root process exists, in new namespaces that are not set up.
    SetupNamespaces,
    /// Restore: the namespaces are set up.
    PostSetupNamespaces,
    /// Restore: a terminal whose master was outside the tree.
    OrphanPtsMaster,
    /// Restore: all processes exist, memory is filled, none runs.
    PostRestore,
    /// Restore: all processes are about to run.
    PreResume,
    /// Restore: all processes run.
    PostResume,
    /// Lazy pages: the page server listens.
    StatusReady,
    /// One that this crate does not know. It is acknowledged.
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

    /// By the name that CRIU sends (`action_names` in criu/action-scripts.c).
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

/// Callbacks of a dump, in the order in which CRIU reaches them. Those that are not overridden succeed.
///
/// When one fails, CRIU lets the tree run again and the dump fails with its error. After a failed `network_unlock` of a
/// tree that is left running, which CRIU does not heed, the images are whole and stay.
#[async_trait]
pub trait NotifyDump: Send {
    /// Nothing is touched yet.
    async fn pre_dump(&mut self) -> Result<(), BoxError> {
        Ok(())
    }

    /// The tree is stopped. CRIU blocks its network namespace next, unless [`crate::NetworkLock::Skip`] was asked for.
    async fn network_lock(&mut self) -> Result<(), BoxError> {
        Ok(())
    }

    /// External files in CRIU's notation, to be added to the request's.
    async fn query_external_files(&mut self) -> Result<Vec<String>, BoxError> {
        Ok(vec![])
    }

    /// The images are whole and the tree is still stopped: the last chance to refuse. Once this has succeeded, the
    /// dump stands, even if the operation is cancelled.
    async fn post_dump(&mut self) -> Result<(), BoxError> {
        Ok(())
    }

    /// The network is unblocked next: after a failure, or when the tree is left running. Also called while CRIU undoes
    /// its work because another callback failed. CRIU does not heed a failure.
    async fn network_unlock(&mut self) -> Result<(), BoxError> {
        Ok(())
    }
}

impl NotifyDump for () {}

/// Callbacks of a restore, in the order in which CRIU reaches them. Those that are not overridden succeed.
///
/// When one fails, every process of the tree is killed and the restore fails with its error.
#[async_trait]
pub trait NotifyRestore: Send {
    /// criu runs and has no request yet. The place to move it to the cgroup in which the tree is to be restored.
    async fn started(&mut self, criu: &Child) -> Result<(), BoxError> {
        let _ = criu;
        Ok(())
    }

    /// Nothing exists yet.
    async fn pre_restore(&mut self) -> Result<(), BoxError> {
        Ok(())
    }

    /// The root process exists in its namespaces, which are empty. Not reached by a tree without namespaces of its own.
    async fn setup_namespaces(&mut self, root: &Child) -> Result<(), BoxError> {
        let _ = root;
        Ok(())
    }

    /// The namespaces are set up.
    async fn post_setup_namespaces(&mut self) -> Result<(), BoxError> {
        Ok(())
    }

    /// The master of a restored terminal whose holder was outside the tree ([`crate::Options::orphan_pts_master`]).
    async fn orphan_pts_master(&mut self, master: OwnedFd) -> Result<(), BoxError> {
        drop(master);
        Ok(())
    }

    /// All processes exist with their memory, none runs. The root is watched by the reaper already.
    async fn post_restore(&mut self, root: &Child) -> Result<(), BoxError> {
        let _ = root;
        Ok(())
    }

    /// The network is unblocked next.
    async fn network_unlock(&mut self) -> Result<(), BoxError> {
        Ok(())
    }

    /// All processes are stopped at their last system call before they run again.
    async fn pre_resume(&mut self) -> Result<(), BoxError> {
        Ok(())
    }

    /// All processes run.
    async fn post_resume(&mut self) -> Result<(), BoxError> {
        Ok(())
    }
}

impl NotifyRestore for () {}

/// A callback for the moment in which the processes of a failed restore are killed and have not ended. A process in a
/// frozen cgroup of v1 does not end before the cgroup is thawed; thawed earlier, the process would run.
///
/// Runs also for a restore whose future was dropped, so the callback borrows nothing.
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
