//! What the installed criu, and the kernel under it, can do.

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

/// Bounds `criu check`, which tries the kernel's features one by one: about 0.1 s, more on a busy machine.
const CHECK_TIMEOUT: Duration = Duration::from_secs(60);

/// Optional features of CRIU and the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// Memory that changed since an earlier dump can be told (soft-dirty bits): pre-dump, parent images.
    pub mem_track: bool,
    /// Memory can be filled after the restore, by userfaultfd.
    pub lazy_pages: bool,
    /// Pids can be told from later ones with the same number across pre-dumps.
    pub pidfd_store: bool,
}

impl Criu {
    /// The version of the installed criu.
    ///
    /// # Errors
    /// When it is not installed or does not answer.
    pub async fn version(&self) -> Result<Version, CallError> {
        let answer = self.ask(Criu_req_type::VERSION, None).await?;
        answer.version.as_ref().and_then(Version::of).ok_or_else(|| strange("it has no version"))
    }

    /// The error that tells that criu is too old, if it is. To be asked when criu has failed: what it says then need not
    /// make that clear.
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

    /// Which optional features criu and the kernel have.
    ///
    /// # Errors
    /// When it is not installed or does not answer.
    pub async fn features(&self) -> Result<Features, CallError> {
        let mut wanted = Criu_features::new();
        wanted.set_mem_track(true);
        wanted.set_lazy_pages(true);
        wanted.set_pidfd_store(true);
        let answer = self.ask(Criu_req_type::FEATURE_CHECK, Some(wanted)).await?;
        let found = answer.features.as_ref().ok_or_else(|| strange("it has no features"))?;
        Ok(Features { mem_track: found.mem_track(), lazy_pages: found.lazy_pages(), pidfd_store: found.pidfd_store() })
    }

    /// Checks that checkpoint and restore can work here: criu is there and new enough, and `criu check` finds
    /// everything it needs in the kernel. Takes about 0.1 s.
    ///
    /// # Errors
    /// One line for each thing that is missing.
    pub async fn preflight(&self) -> Result<Version, PreflightError> {
        let found = self.version().await?;
        let mut missing = vec![];
        if found < MINIMUM {
            missing.push(Missing::Version { found, needed: MINIMUM });
        }
        missing.extend(self.check().await?);
        if missing.is_empty() { Ok(found) } else { Err(PreflightError::Missing { missing }) }
    }

    /// `criu check`: its exit code and a line for each thing.
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

    /// One question of the kind that needs no stages.
    async fn ask(&self, kind: Criu_req_type, features: Option<Criu_features>) -> Result<Criu_resp, CallError> {
        let mut message = Criu_req::new();
        message.set_type(kind);
        message.features = features.into();
        let swrk = Swrk::start(self, Path::new("/"), "", vec![], Reaper::spawn)?;
        // It writes no log; what it says of errors comes with its output.
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

/// No stages, and nothing to undo.
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
