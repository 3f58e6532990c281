//! Loggers: programs that read a process's output.
//!
//! The protocol is containerd's: the logger gets standard output on descriptor 3, standard error on
//! 4, and closes 5 when ready (`binary-v2`: after writing a byte there). `CONTAINER_ID` and
//! `CONTAINER_NAMESPACE` name the container.

use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};
use reaper::{Child, Reaper};
use rustix::process::Signal;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

use super::target::LoggerUri;
use super::{Owner, StdioError};

/// Longest time for a logger to get ready, as in containerd's Go shim.
const READY_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest time for a logger to finish alone after the end of all output.
const FINISH_TIMEOUT: Duration = Duration::from_secs(1);
/// Longest time for a logger to end after SIGTERM, as in containerd's Go shim.
const TERM_TIMEOUT: Duration = Duration::from_secs(12);

/// A running logger.
pub(super) struct Logger {
    child: Child,
}

/// Pipes for a logger to read.
pub(super) struct LoggerPipes {
    pub(super) stdout: OwnedFd,
    /// `None` with a terminal, which has one output.
    pub(super) stderr: Option<OwnedFd>,
}

impl Logger {
    pub(super) async fn start(
        uri: &LoggerUri,
        pipes: LoggerPipes,
        owner: &Owner,
        reaper: &Reaper,
    ) -> Result<Self, StdioError> {
        let failed = |source| StdioError::Logger { path: uri.path.clone(), source };
        let (ready, ready_write) = io::pipe().map_err(failed)?;
        let stderr = match pipes.stderr {
            Some(stderr) => stderr,
            // At its end from the start. Not /dev/null: nerdctl's logger polls, and a device cannot
            // be polled.
            None => io::pipe().map_err(failed)?.0.into(),
        };
        let mut command = Command::new(&uri.path);
        command
            .args(&uri.arguments)
            .env("CONTAINER_ID", &owner.id)
            .env("CONTAINER_NAMESPACE", &owner.namespace)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command
            .fd_mappings(vec![
                FdMapping { parent_fd: pipes.stdout, child_fd: 3 },
                FdMapping { parent_fd: stderr, child_fd: 4 },
                FdMapping { parent_fd: ready_write.into(), child_fd: 5 },
            ])
            .map_err(|error| failed(io::Error::other(error)))?;
        let child = reaper.spawn(&mut command).map_err(failed)?;
        // The command holds the shim's copies of the descriptors, and would keep the pipes open.
        drop(command);
        let logger = Self { child };
        if let Err(error) = tokio::time::timeout(READY_TIMEOUT, wait_ready(ready, uri.writes_when_ready))
            .await
            .unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::TimedOut, "the logger did not get ready")))
        {
            logger.kill().await;
            return Err(failed(error));
        }
        Ok(logger)
    }

    /// Waits until the logger has processed its input; signals a logger that does not end.
    pub(super) async fn stop(self) {
        if tokio::time::timeout(FINISH_TIMEOUT, self.child.wait()).await.is_ok() {
            return;
        }
        // A logger already gone is the goal.
        let _ = self.child.signal(Signal::TERM);
        if tokio::time::timeout(TERM_TIMEOUT, self.child.wait()).await.is_err() {
            tracing::warn!(pid = self.child.pid(), "a logger does not end, and is killed");
            self.kill().await;
        }
    }

    async fn kill(&self) {
        let _ = self.child.signal(Signal::KILL);
        self.child.wait().await;
    }
}

/// Waits for the end of the pipe, or for its first byte.
async fn wait_ready(ready: impl Into<OwnedFd> + Read, needs_byte: bool) -> io::Result<()> {
    let mut byte = [0];
    let read = pipe::Receiver::from_owned_fd(ready.into())?.read(&mut byte).await?;
    if read == 0 && needs_byte {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the logger gave up before it was ready"));
    }
    Ok(())
}
