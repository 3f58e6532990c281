//! A conversation with criu, and what has to be undone when it does not come to its end.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use async_trait::async_trait;
use rust_criu::rust_criu_protobuf::rpc::{Criu_opts, Criu_req, Criu_req_type, Criu_resp};

use crate::error::{CallError, Refusal};
use crate::log;
use crate::notify::{BoxError, Stage};
use crate::swrk::Swrk;

/// What CRIU says when it stops at a stage.
#[derive(Debug)]
pub(crate) struct Notification {
    pub(crate) stage: Stage,
    /// The root, in setup-namespaces and post-restore.
    pub(crate) pid: Option<i32>,
    /// The terminal, in orphan-pts-master.
    pub(crate) descriptors: Vec<OwnedFd>,
    /// A callback has failed before: CRIU is undoing its work, or is about to.
    pub(crate) failed: bool,
}

/// The operation's side of the conversation.
#[async_trait]
pub(crate) trait Answers<U: Undo>: Send {
    /// Runs what belongs to the stage, and notes in `undo` what it changes. The options, if any, go into the
    /// acknowledgement.
    async fn notified(&mut self, notification: Notification, undo: &mut U) -> Result<Option<Criu_opts>, BoxError>;
}

/// What has to be undone after an operation that failed or was cancelled.
#[async_trait]
pub(crate) trait Undo: Send {
    /// Called once, when criu has ended.
    async fn undo(&mut self);

    /// A stage is about to be refused. True if CRIU would not heed that, and is to be killed instead.
    async fn refusing(&mut self, _: &Stage) -> bool {
        false
    }
}

/// A run of criu with what has to be undone. Dropped before [`Call::complete`], it undoes in a task of its own.
pub(crate) struct Call<U: Undo + 'static> {
    /// None once it is over.
    running: Option<(Swrk, U)>,
    log: PathBuf,
}

impl<U: Undo + 'static> Call<U> {
    pub(crate) fn new(swrk: Swrk, undo: U, log: PathBuf) -> Self {
        Self { running: Some((swrk, undo)), log }
    }

    /// criu and the operation's state.
    ///
    /// # Errors
    /// None is left after the call is over.
    pub(crate) fn parts(&mut self) -> Result<(&mut Swrk, &mut U), CallError> {
        let gone = || protocol("the run is over", None, io::ErrorKind::NotConnected.into());
        self.running.as_mut().map(|(swrk, undo)| (swrk, undo)).ok_or_else(gone)
    }

    /// Sends `request` and answers CRIU's notifications until its last word.
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
            // It may have died at once: how says more than a broken pipe.
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
                // The next read finds it gone.
                swrk.kill();
                continue;
            }
            answer.set_notify_success(refused.is_none());
            stage = Some(now);
            // If it has died meanwhile, the next read says so.
            if let Err(error) = talk(swrk.channel(), &answer).await {
                tracing::debug!(%error, "criu does not take an answer");
            }
        };
        if let Some(refused) = refused {
            return Err(refused);
        }
        // The answer to a request that CRIU cannot make sense of is of type EMPTY.
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

    /// The operation has succeeded: waits for criu's end, and nothing is undone.
    pub(crate) async fn complete(mut self) -> Option<U> {
        // Stays in place while waiting: a drop meanwhile must not lose criu. What was reached by then stands, since
        // undoing is told so by its own state.
        if let Some((swrk, _)) = &mut self.running {
            swrk.end().await;
        }
        self.running.take().map(|(_, undo)| undo)
    }

    /// The operation has failed: waits for criu's end and undoes.
    pub(crate) async fn abandon(mut self) {
        if let Some(running) = self.running.take() {
            let undone = tokio::spawn(abandon(running));
            // In a task of its own, so that a cancellation does not stop it. It does not panic; if the runtime shuts
            // down, nobody is left to wait for it.
            let _ = undone.await;
        }
    }
}

impl<U: Undo + 'static> Drop for Call<U> {
    fn drop(&mut self) {
        let Some(running) = self.running.take() else { return };
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn(abandon(running))),
            // The runtime is being shut down, and with it this process. A killed criu lets the tree go.
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

/// How criu ended, if it did so by itself.
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
