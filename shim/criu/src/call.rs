//! A conversation with criu, and the undoing of an unfinished one.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use async_trait::async_trait;
use rust_criu::rust_criu_protobuf::rpc::{Criu_opts, Criu_req, Criu_req_type, Criu_resp};

use crate::error::{CallError, Refusal};
use crate::log;
use crate::notify::{BoxError, Stage};
use crate::swrk::Swrk;

/// CRIU's message at a stage.
#[derive(Debug)]
pub(crate) struct Notification {
    pub(crate) stage: Stage,
    /// The root, in setup-namespaces and post-restore.
    pub(crate) pid: Option<i32>,
    /// The terminal, in orphan-pts-master.
    pub(crate) descriptors: Vec<OwnedFd>,
    /// A callback has failed before: CRIU is undoing the work so far, or is about to.
    pub(crate) failed: bool,
}

/// The operation's side of the conversation.
#[async_trait]
pub(crate) trait Answers<U: Undo>: Send {
    /// Runs the stage's work, and records its changes in `undo`. The options, if any, go into the
    /// acknowledgement.
    async fn notified(&mut self, notification: Notification, undo: &mut U) -> Result<Option<Criu_opts>, BoxError>;
}

/// Undoing of an operation that failed or was cancelled.
#[async_trait]
pub(crate) trait Undo: Send {
    /// Called once, after criu's end.
    async fn undo(&mut self);

    /// A stage is about to be refused. Returns true if CRIU would ignore the refusal, and must be
    /// killed instead.
    async fn refusing(&mut self, _: &Stage) -> bool {
        false
    }
}

/// A run of criu, with the work to undo. Dropped before [`Call::complete`], the work is undone in a
/// separate task.
pub(crate) struct Call<U: Undo + 'static> {
    /// `None` once the run is over.
    running: Option<(Swrk, U)>,
    log: PathBuf,
}

impl<U: Undo + 'static> Call<U> {
    pub(crate) fn new(swrk: Swrk, undo: U, log: PathBuf) -> Self {
        Self { running: Some((swrk, undo)), log }
    }

    /// Returns criu and the operation's state.
    ///
    /// # Errors
    /// Fails after the end of the call.
    pub(crate) fn parts(&mut self) -> Result<(&mut Swrk, &mut U), CallError> {
        let gone = || protocol("the run is over", None, io::ErrorKind::NotConnected.into());
        self.running.as_mut().map(|(swrk, undo)| (swrk, undo)).ok_or_else(gone)
    }

    /// Sends `request` and answers CRIU's notifications until the last message.
    pub(crate) async fn converse(
        &mut self,
        request: Criu_req,
        answers: &mut dyn Answers<U>,
    ) -> Result<Criu_resp, CallError> {
        let expected = request.type_();
        let log = self.log.clone();
        let (swrk, undo) = self.parts()?;
        let mut stage = None;
        let mut refused: Option<CallError> = None;
        if let Err(source) = talk(swrk.channel(), &request).await {
            // criu may have died at once: the exit says more than a broken pipe.
            return Err(ended(swrk, None, &log).await.unwrap_or_else(|| protocol("send the request", None, source)));
        }
        let response = loop {
            let received = match swrk.receive().await {
                Ok(Some(received)) => received,
                Ok(None) => {
                    let died = ended(swrk, stage.clone(), &log).await;
                    let closed = || protocol("it closed the socket", stage, io::ErrorKind::UnexpectedEof.into());
                    return Err(refused.or(died).unwrap_or_else(closed));
                }
                Err(source) => return Err(refused.unwrap_or_else(|| protocol("read its answer", stage, source))),
            };
            if received.message.type_() != Criu_req_type::NOTIFY {
                break received.message;
            }
            let now = Stage::named(received.message.notify.script());
            tracing::debug!(stage = %now, "criu is at a stage");
            let notification = Notification {
                stage: now.clone(),
                pid: received.message.notify.pid,
                descriptors: received.descriptors,
                failed: refused.is_some(),
            };
            let mut answer = Criu_req::new();
            answer.set_type(Criu_req_type::NOTIFY);
            match answers.notified(notification, undo).await {
                Ok(options) => answer.opts = options.into(),
                Err(source) if refused.is_none() => refused = Some(CallError::Notify { stage: now.clone(), source }),
                Err(error) => tracing::warn!(stage = %now, error, "a callback failed while criu undoes its work"),
            }
            if refused.is_some() && undo.refusing(&now).await {
                // The next read finds criu gone.
                swrk.kill();
                continue;
            }
            answer.set_notify_success(refused.is_none());
            stage = Some(now);
            // If criu has died meanwhile, the next read reports the death.
            if let Err(error) = talk(swrk.channel(), &answer).await {
                tracing::debug!(%error, "criu does not take an answer");
            }
        };
        if let Some(refused) = refused {
            return Err(refused);
        }
        // CRIU answers an unknown request with type EMPTY.
        if !response.success() {
            swrk.end().await;
            return Err(CallError::Refused(Box::new(refusal(swrk, &response, &log))));
        }
        if response.type_() != expected {
            let what = format!("it answers {expected:?} with {:?}", response.type_());
            return Err(protocol("read its answer", stage, io::Error::new(io::ErrorKind::InvalidData, what)));
        }
        Ok(response)
    }

    /// Ends a successful operation: waits for criu's end, and undoes nothing.
    pub(crate) async fn complete(mut self) -> Option<U> {
        // Stays in place while waiting: a drop meanwhile must not lose criu. The result reached by
        // then stands, because the undo's own state says so.
        if let Some((swrk, _)) = &mut self.running {
            swrk.end().await;
        }
        self.running.take().map(|(_, undo)| undo)
    }

    /// Ends a failed operation: waits for criu's end and undoes.
    pub(crate) async fn abandon(mut self) {
        if let Some(running) = self.running.take() {
            let undone = tokio::spawn(abandon(running));
            // In a separate task, safe from a cancellation. The task does not panic; after a
            // shutdown of the runtime nobody waits.
            let _ = undone.await;
        }
    }
}

impl<U: Undo + 'static> Drop for Call<U> {
    fn drop(&mut self) {
        let Some(running) = self.running.take() else { return };
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn(abandon(running))),
            // The async runtime is shutting down, and this process too. A killed criu releases the
            // tree.
            Err(_) => running.0.kill(),
        }
    }
}

async fn abandon<U: Undo>((mut swrk, mut undo): (Swrk, U)) {
    swrk.end().await;
    undo.undo().await;
}

async fn talk(channel: io::Result<&crate::transport::Channel>, message: &Criu_req) -> io::Result<()> {
    channel?.send(message).await
}

fn protocol(action: &'static str, stage: Option<Stage>, source: io::Error) -> CallError {
    CallError::Protocol { action, stage, source }
}

/// Returns criu's failure, if criu has ended without an answer.
async fn ended(swrk: &mut Swrk, stage: Option<Stage>, log: &std::path::Path) -> Option<CallError> {
    let exit = swrk.end().await;
    let output = swrk.output();
    let read = log::read(log, &output);
    Some(CallError::Died { exit, stage, errors: read.errors, log: read.path })
}

fn refusal(swrk: &Swrk, response: &Criu_resp, log: &std::path::Path) -> Refusal {
    let read = log::read(log, &swrk.output());
    Refusal {
        cause: log::cause(&read.errors),
        errors: read.errors,
        errno: response.cr_errno,
        message: response.cr_errmsg.clone(),
        log: read.path,
    }
}
