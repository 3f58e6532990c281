//! criu that another program has driven, `runc checkpoint` for one, and has left behind when it was killed.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use proc::HostPid;
use reaper::Reaper;
use tokio::time::{Instant, timeout_at};

use crate::client::CANCEL_GRACE;
use crate::residue::kill_tree;

/// Waits for the end of each criu that a killed program has left, and of each process that such a criu was about to
/// restore. criu finds at its next stage that nobody listens any more, and undoes its work; if that takes longer than
/// [`CANCEL_GRACE`], it is killed.
///
/// `work` is the working directory that the program has given to criu, by which it is found: criu writes its title over
/// its environment. To be called when the program has ended, in a process to which orphans come.
pub async fn end_orphans(work: &Path, reaper: &Reaper) {
    let Ok(work) = std::fs::metadata(work) else { return };
    let is_orphan = |pid: HostPid| {
        let is_criu = proc::name(pid).is_ok_and(|name| name == "criu");
        let works_there = std::fs::metadata(pid.path("cwd"))
            .is_ok_and(|folder| (folder.dev(), folder.ino()) == (work.dev(), work.ino()));
        is_criu && works_there
    };
    let adoption = reaper.adoption();
    let deadline = Instant::now() + CANCEL_GRACE;
    loop {
        let pids = proc::children(reaper.parent_of_orphans());
        // One that is known is this process's own, and has somebody who waits for it.
        let Some(pid) = pids.into_iter().find(|pid| !adoption.knows(pid.raw()) && is_orphan(*pid)) else { return };
        tracing::warn!(%pid, "a runtime has left criu behind, whose end is waited for");
        let Ok(child) = adoption.adopt(pid.raw()) else { continue };
        if timeout_at(deadline, child.wait()).await.is_err() {
            tracing::warn!(%pid, "criu does not end, and is killed");
            kill_tree(&child);
            child.wait().await;
        }
    }
}
