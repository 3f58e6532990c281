//! Abilities of the installed criu, and of the kernel.

use std::io;
use std::path::Path;
use std::time::Duration;

use async_trait::async_trait;
use reaper::{Exit, Reaper};
use rust_criu::rust_criu_protobuf::rpc::{Criu_features, Criu_opts, Criu_req, Criu_req_type, Criu_resp};

use crate::call::{Answers, Call, Notification, Undo};
use crate::client::Criu;
use crate::error::{CallError, Missing, PreflightError};
use crate::log;
use crate::notify::BoxError;
use crate::swrk::{self, Swrk};
use crate::version::{MINIMUM, Version};

/// Limit for `criu check`, which tries the kernel's features one by one: about 0.1 s, more on a
/// busy machine.
const CHECK_TIMEOUT: Duration = Duration::from_secs(60);

/// Optional features of CRIU and the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// Changes of memory since an earlier dump can be tracked (soft-dirty bits): pre-dump, parent
    /// images.
    pub mem_track: bool,
    /// Memory can be filled after the restore, by userfaultfd.
    pub lazy_pages: bool,
    /// Reused pids can be detected across pre-dumps.
    pub pidfd_store: bool,
}

impl Criu {
    /// Returns the version of the installed criu.
    ///
    /// # Errors
    /// Fails if criu is not installed or does not answer.
    pub async fn version(&self) -> Result<Version, CallError> {
        let answer = self.ask(Criu_req_type::VERSION, None).await?;
        answer.version.as_ref().and_then(Version::of).ok_or_else(|| strange("it has no version"))
    }

    /// Returns the error for an old criu, if criu is too old. For use after a failure of criu, when
    /// criu's own message need not make that clear.
    pub async fn too_old(&self) -> Option<CallError> {
        let mut command = swrk::command(self);
        command.arg("--version").current_dir("/");
        let (child, output) = swrk::spawn(self, command, vec![], Reaper::spawn).ok()?;
        if tokio::time::timeout(CHECK_TIMEOUT, child.wait()).await.is_err() {
            let _ = child.signal(rustix::process::Signal::KILL);
            return None;
        }
        let found = Version::in_text(&output.text())?;
        (found < MINIMUM).then_some(CallError::TooOld { found, needed: MINIMUM })
    }

    /// Returns the optional features of criu and the kernel.
    ///
    /// # Errors
    /// Fails if criu is not installed or does not answer.
    pub async fn features(&self) -> Result<Features, CallError> {
        let mut wanted = Criu_features::new();
        wanted.set_mem_track(true);
        wanted.set_lazy_pages(true);
        wanted.set_pidfd_store(true);
        let answer = self.ask(Criu_req_type::FEATURE_CHECK, Some(wanted)).await?;
        let found = answer.features.as_ref().ok_or_else(|| strange("it has no features"))?;
        Ok(Features { mem_track: found.mem_track(), lazy_pages: found.lazy_pages(), pidfd_store: found.pidfd_store() })
    }

    /// Checks whether checkpoint and restore can work here: criu exists, is new enough, and `criu
    /// check` finds every kernel feature. Takes about 0.1 s.
    ///
    /// # Errors
    /// Fails with one line for each missing requirement.
    pub async fn preflight(&self) -> Result<Version, PreflightError> {
        let found = self.version().await?;
        let mut missing = vec![];
        if found < MINIMUM {
            missing.push(Missing::Version { found, needed: MINIMUM });
        }
        missing.extend(self.check().await?);
        if missing.is_empty() { Ok(found) } else { Err(PreflightError::Missing { missing }) }
    }

    /// Runs `criu check`; returns a line for each missing feature.
    async fn check(&self) -> Result<Vec<Missing>, CallError> {
        let mut command = swrk::command(self);
        command.arg("check").current_dir("/");
        let (child, output) = swrk::spawn(self, command, vec![], Reaper::spawn)?;
        let exit = match tokio::time::timeout(CHECK_TIMEOUT, child.wait()).await {
            Ok(exit) => exit,
            Err(_) => {
                let _ = child.signal(rustix::process::Signal::KILL);
                child.wait().await
            }
        };
        Ok(missing(exit, &output.text()))
    }

    /// Sends a request without stages.
    async fn ask(&self, kind: Criu_req_type, features: Option<Criu_features>) -> Result<Criu_resp, CallError> {
        let mut message = Criu_req::new();
        message.set_type(kind);
        message.features = features.into();
        let swrk = Swrk::start(self, Path::new("/"), "", vec![], Reaper::spawn)?;
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

fn missing(exit: Exit, output: &str) -> Vec<Missing> {
    if exit.code == 0 {
        return vec![];
    }
    let mut missing: Vec<Missing> = log::errors(output.as_bytes()).into_iter().map(Missing::Kernel).collect();
    if missing.is_empty() {
        let last = output.trim().lines().last().unwrap_or("nothing").to_owned();
        missing.push(Missing::Kernel(format!("criu check ended with code {} and said {last}", exit.code)));
    }
    missing
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
