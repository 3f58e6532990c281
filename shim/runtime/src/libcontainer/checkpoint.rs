//! Checkpoint: CRIU does it, told what libcontainer and the bundle know of the container.
//!
//! libcontainer's own is not used: it refuses paused containers, and containerd pauses first; it knows no masked files
//! and no devices; and it removes the container's cgroup afterwards, which the shim still reads.

use async_trait::async_trait;
use criu::{BoxError, Criu, NotifyDump};

use super::client::{Client, Subject, detached};
use super::helper;
use crate::{Caller, CheckpointRequest, Operation, Review, RuntimeError};

impl Client {
    pub(super) async fn checkpoint(&self, mut request: CheckpointRequest) -> Result<(), RuntimeError> {
        let client = self.clone();
        let id = request.id.clone();
        detached(Subject { operation: Operation::Checkpoint, id: &id.clone() }, async move {
            let subject = Subject { operation: Operation::Checkpoint, id: &id };
            let caller = (!request.leave_running).then(|| request.caller.clone());
            let mut last_word = LastWord { review: request.review.take(), caller };
            let dump = client
                .blocking(subject, move |inner| helper::dump_request(&inner.root, inner.systemd_cgroup, &request))
                .await?;
            Criu::new(client.inner.reaper.clone()).dump(dump, &mut last_word).await?;
            Ok(())
        })
        .await
    }
}

/// Before CRIU ends a container or lets it go on.
struct LastWord {
    review: Option<Review>,
    /// If nobody waits for the checkpoint any more, containerd has removed its directory. None if the container goes on anyway.
    caller: Option<Caller>,
}

#[async_trait]
impl NotifyDump for LastWord {
    async fn post_dump(&mut self) -> Result<(), BoxError> {
        if let Some(review) = self.review.take() {
            review.ask().await?;
        }
        match &self.caller {
            Some(caller) if caller.is_gone() => Err("nobody waits for it any more: the container goes on".into()),
            _ => Ok(()),
        }
    }
}
