//! Abilities of the installed criu, and of the kernel.

use std::io;
use std::path::Path;
use std::time::Duration;

use async_trait::async_trait;
use reaper::Reaper;
use rust_criu::rust_criu_protobuf::rpc::{Criu_opts, Criu_req, Criu_req_type, Criu_resp};

use crate::call::{Answers, Call, Notification, Undo};
use crate::client::Criu;
use crate::error::CallError;
use crate::notify::BoxError;
use crate::swrk::{self, Loaded, Swrk};
use crate::version::{MINIMUM, Version};

/// Limit for `criu check`, which tries the kernel's features one by one: about 0.1 s, more on a
/// busy machine.
const CHECK_TIMEOUT: Duration = Duration::from_secs(60);

impl Criu {
    /// Returns the version of the installed criu.
    ///
    /// # Errors
    /// Fails if criu is not installed or does not answer.
    pub async fn version(&self) -> Result<Version, CallError> {
        let answer = self.ask(Criu_req_type::VERSION).await?;
        answer.version.as_ref().and_then(Version::of).ok_or_else(|| strange("it has no version"))
    }

    /// Returns the error for an old criu, if criu is too old. For use after a failure of criu, when
    /// criu's own message need not make that clear.
    pub async fn too_old(&self) -> Option<CallError> {
        let mut command = swrk::command(self, None);
        command.arg("--version").current_dir("/");
        let (child, output) = swrk::spawn(self, command, vec![], Reaper::spawn).ok()?;
        if tokio::time::timeout(CHECK_TIMEOUT, child.wait()).await.is_err() {
            let _ = child.signal(rustix::process::Signal::KILL);
            return None;
        }
        let found = Version::in_text(&output.text())?;
        (found < MINIMUM).then_some(CallError::TooOld { found, needed: MINIMUM })
    }

    /// Sends a request without stages.
    async fn ask(&self, kind: Criu_req_type) -> Result<Criu_resp, CallError> {
        let mut message = Criu_req::new();
        message.set_type(kind);
        let swrk = Swrk::start(self, Loaded::default(), Path::new("/"), "", vec![], Reaper::spawn)?;
        // No log is written; errors come with criu's output.
        let mut call = Call::new(swrk, Nothing, Path::new("").to_owned());
        match call.converse(message, &mut Nothing).await {
            Ok(answer) => {
                call.complete().await;
                Ok(answer)
            }
            Err(error) => {
                call.abandon().await;
                Err(error)
            }
        }
    }
}

fn strange(what: &'static str) -> CallError {
    let source = io::Error::new(io::ErrorKind::InvalidData, what);
    CallError::Protocol { action: "read its answer", stage: None, source }
}

/// A call without stages, and without work to undo.
struct Nothing;

#[async_trait]
impl Undo for Nothing {
    async fn undo(&mut self) {}
}

#[async_trait]
impl Answers<Nothing> for Nothing {
    async fn notified(&mut self, _: Notification, _: &mut Nothing) -> Result<Option<Criu_opts>, BoxError> {
        Ok(None)
    }
}
