//! Taking a checkpoint: the shim's part. A session does the work (crate `session`).
//!
//! As a rule, containerd has paused the container and resumes it after the answer. `State`, `Kill`
//! and `Wait` are answered meanwhile. A checkpoint is cancelled when the client disconnects or the
//! container is killed.
//!
//! A disconnected client cannot resume the container after pausing it for the checkpoint:
//! containerd's deadline has passed for the resume too. The shim resumes such a container.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use ::checkpoint::CheckpointOptions;
use containerd_shim_protos::events::task::TaskCheckpointed;
use session::{CheckpointOrder, Failed, Stop, Subject};

use super::{Actor, Status};
use crate::error::TaskError;

/// Time after a pause during which a checkpoint counts as the reason for the pause. containerd
/// saves a writable layer in between.
const PAUSED_FOR_IT: Duration = Duration::from_secs(60);

impl Actor {
    /// Returns this container, as described to sessions.
    pub(super) fn subject(&self) -> Subject {
        Subject {
            id: self.id.clone(),
            namespace: self.context.namespace.clone(),
            bundle: self.bundle.clone(),
            logs: self.context.logs.clone(),
            runtime: self.choice.clone(),
            prepare: self.config.prepare,
            store: self.context.store.clone(),
        }
    }

    /// Saves the container with `options`. `stop` cancels the checkpoint.
    pub(crate) fn checkpoint(
        &mut self,
        options: CheckpointOptions,
        stop: Stop,
    ) -> Result<impl Future<Output = impl FnOnce(&mut Self) -> Result<(), TaskError> + use<>> + use<>, TaskError> {
        let paused = match self.init.true_status() {
            Status::Running => false,
            Status::Paused => true,
            Status::Created | Status::Stopped => return Err(self.wrong_state("checkpoint")),
        };
        let Some(child) = self.init.child.clone() else {
            return Err(self.wrong_state("checkpoint"));
        };
        let paused_for_it = self.init.paused_since().is_some_and(|since| since.elapsed() < PAUSED_FOR_IT);
        let resume = self.resume();
        let (folder, exit) = (options.folder.to_string_lossy().into_owned(), options.exit);
        let order = CheckpointOrder {
            subject: self.subject(),
            init: child.process(),
            began: CheckpointOrder::now(),
            paused,
            shm: self.config.shm.clone(),
            devices: self.config.devices.clone(),
            options,
        };
        let conductor = Arc::clone(&self.context.conductor);
        self.freezer.lend();
        self.session = Some(stop.clone());
        Ok(async move {
            let taken = conductor.checkpoint(order, stop.clone()).await;
            if taken.is_ok() && exit {
                child.wait().await;
            }
            let resumed = match resume {
                Ok(resume) if paused_for_it && stop.is_stopped() => Some(resume.await),
                _ => None,
            };
            move |actor: &mut Self| {
                actor.session = None;
                actor.take_freezer_back();
                if let Some(resumed) = resumed {
                    tracing::warn!(container = actor.id, "resumed, since the client of its checkpoint is gone");
                    if let Err(error) = resumed(actor) {
                        tracing::error!(container = actor.id, "the container stays paused: {}", phase::chain(&error));
                    }
                }
                let container_id = actor.id.clone();
                taken.map_err(|failed| {
                    let Failed { phase, cause: source, owed } = failed;
                    TaskError::Checkpoint { container: container_id.clone(), phase, owed, source }
                })?;
                let checkpointed = TaskCheckpointed { container_id, checkpoint: folder, ..TaskCheckpointed::default() };
                actor.context.events.publish(checkpointed);
                Ok(())
            }
        })
    }
}
