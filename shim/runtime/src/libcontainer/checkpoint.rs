//! Checkpoint by CRIU, with the facts about the container from libcontainer and the bundle.
//!
//! libcontainer's own checkpoint is not used: paused containers are refused, and containerd pauses
//! first; masked files and devices are unknown to it; and the container's cgroup, still needed by
//! the shim, is removed afterwards.

use async_trait::async_trait;
use criu::{BoxError, Criu, NotifyDump};
use phase::Cancel;

use super::client::{Client, Subject, detached};
use super::helper;
use crate::{CheckpointRequest, Operation, Review, RuntimeError};

impl Client {
    pub(super) async fn checkpoint(&self, mut request: CheckpointRequest) -> Result<(), RuntimeError> {
        let client = self.clone();
        let id = request.id.clone();
        detached(Subject { operation: Operation::Checkpoint, id: &id.clone() }, async move {
            let subject = Subject { operation: Operation::Checkpoint, id: &id };
            let mut last_word = LastWord { review: request.review.take(), cancel: request.cancel.clone() };
            let dump = client
                .blocking(subject, move |inner| helper::dump_request(&inner.root, inner.systemd_cgroup, &request))
                .await?;
            Criu::new(client.inner.reaper.clone()).dump(dump, &mut last_word).await?;
            Ok(())
        })
        .await
    }
}

/// Last question before a container ends or goes on.
struct LastWord {
    review: Option<Review>,
    cancel: Cancel,
}

#[async_trait]
impl NotifyDump for LastWord {
    async fn post_dump(&mut self) -> Result<(), BoxError> {
        self.cancel.check()?;
        self.review.take().map_or(Ok(()), Review::run)
    }
}
