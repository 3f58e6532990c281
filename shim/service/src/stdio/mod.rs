//! Standard input and output of container processes.
//!
//! A process never holds containerd's own files: the shim gives it pipes, or a terminal, and
//! copies. So a process survives containerd's restarts, and CRIU has only pipes and terminals to
//! dump, both restorable.
//!
//! ```text
//!            ┌──────────── shim ────────────┐
//!  fifo ───► copy ──► pipe ──► 0 ┐
//!  fifo ◄─── copy ◄── pipe ◄── 1 ├ process          with a terminal: 0, 1, 2 are its slave, the shim copies the master
//!  file://   copy ◄── pipe ◄── 2 ┘
//!  binary:// the logger reads the pipes itself
//!  (none)    /dev/null
//! ```

mod console;
mod logger;
mod target;
#[cfg(test)]
pub(crate) mod tests;

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use containerd_shim::io::{IoTasks, Pty};
use reaper::Reaper;
use runtime::ProcessIo;
use rustix::fs::{Gid, Uid};
use rustix::termios::Winsize;
use tokio::net::unix::pipe;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::console::{ConsoleSocket, TerminalOutput};
use self::logger::{Logger, LoggerPipes};
pub(crate) use self::target::Target;

/// Longest time for copying a deleted process's output to files, as for fifos in [`IoTasks`].
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// Failure to give a process standard input and output.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StdioError {
    #[error("{uri} is not a place for output: use a fifo's path, file://, binary:// or nothing")]
    Uri { uri: String },
    #[error("cannot {action} {path}")]
    File {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot make a pipe")]
    Pipe(#[source] io::Error),
    #[error("cannot copy through a fifo")]
    Fifo(#[source] containerd_shim::Error),
    #[error("cannot start the logger {path}")]
    Logger {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the runtime sent no terminal")]
    NoTerminal(#[source] io::Error),
}

/// Standard streams of one process, as requested by containerd, from before the start to after the
/// end.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stdio {
    pub(crate) stdin: String,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) terminal: bool,
    input: Input,
}

/// The client's end of standard input, with the lifetime of the process's entry in the shim.
///
/// Clones share one state. The copy out of the fifo exists only from the start on, and CloseIO may
/// come before: a client with short input closes the fifo while the runtime still makes the
/// process.
#[derive(Clone, Default)]
struct Input(Arc<Mutex<InputState>>);

#[derive(Default)]
struct InputState {
    closed: bool,
    /// Copies of the latest start.
    fifos: IoTasks,
}

impl Input {
    fn state(&self) -> MutexGuard<'_, InputState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self) {
        let mut state = self.state();
        state.closed = true;
        state.fifos.close_input();
    }

    /// Returns fresh copies for a start, and applies an earlier [`Input::close`].
    fn renew(&self) -> IoTasks {
        let mut state = self.state();
        state.fifos = IoTasks::default();
        if state.closed {
            state.fifos.close_input();
        }
        state.fifos.clone()
    }
}

impl fmt::Debug for Input {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Input").field("closed", &self.state().closed).finish()
    }
}

/// Identity of the process, for loggers, and owner of the pipes.
#[derive(Clone, Debug)]
pub(crate) struct Owner {
    pub(crate) namespace: String,
    pub(crate) id: String,
    /// Owner of the pipes; 0 leaves root as the owner.
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// The shim's side of a process's standard input and output, before the process exists.
pub(crate) struct Prepared {
    streams: Streams,
    copies: Copies,
}

enum Streams {
    Pipes,
    Terminal { socket: ConsoleSocket, stdin: Option<String>, stdout: Sink },
}

/// Destination of a terminal's output.
enum Sink {
    None,
    Fifo(String),
    File(File),
    Pipe(OwnedFd),
}

/// The shim's side of a process during and after its life.
#[derive(Default)]
pub(crate) struct Copies {
    fifos: IoTasks,
    files: TaskTracker,
    cancel: CancellationToken,
    logger: Option<Logger>,
    console: Option<Pty>,
}

impl Stdio {
    pub(crate) fn new(stdin: String, stdout: String, stderr: String, terminal: bool) -> Self {
        Self { stdin, stdout, stderr, terminal, input: Input::default() }
    }

    /// Ends standard input: the client writes no more. The process first reads everything written.
    ///
    /// A call before or during the process's start counts for the start: the process finds the end
    /// of file.
    pub(crate) fn close_input(&self) {
        self.input.close();
    }

    /// Makes both sides: the process's streams, and the shim's copies.
    pub(crate) async fn prepare(&self, owner: &Owner, reaper: &Reaper) -> Result<(ProcessIo, Prepared), StdioError> {
        let stdout = Target::parse(&self.stdout)?;
        if self.terminal { self.terminal(stdout, owner, reaper).await } else { self.pipes(stdout, owner, reaper).await }
    }

    async fn terminal(
        &self,
        stdout: Target,
        owner: &Owner,
        reaper: &Reaper,
    ) -> Result<(ProcessIo, Prepared), StdioError> {
        let mut copies = Copies::new(self.input.renew());
        let sink = match stdout {
            Target::Null => Sink::None,
            Target::Fifo(path) => Sink::Fifo(path),
            Target::File(path) => Sink::File(open_log(path)?),
            Target::Binary(uri) => {
                let (read, write) = pipe_for(owner)?;
                copies.logger =
                    Some(Logger::start(&uri, LoggerPipes { stdout: read, stderr: None }, owner, reaper).await?);
                Sink::Pipe(write)
            }
        };
        let socket = ConsoleSocket::bind()?;
        let io = ProcessIo::Terminal { console_socket: socket.path().to_owned() };
        let stdin = Some(self.stdin.clone()).filter(|path| !path.is_empty());
        Ok((io, Prepared { streams: Streams::Terminal { socket, stdin, stdout: sink }, copies }))
    }

    async fn pipes(&self, stdout: Target, owner: &Owner, reaper: &Reaper) -> Result<(ProcessIo, Prepared), StdioError> {
        let mut copies = Copies::new(self.input.renew());
        let stdin = if self.stdin.is_empty() {
            null(false)?
        } else {
            let (read, write) = pipe_for(owner)?;
            let to = pipe::Sender::from_owned_fd(write).map_err(StdioError::Pipe)?;
            copies.fifos.copy_from_fifo(&self.stdin, to).map_err(StdioError::Fifo)?;
            read
        };
        let (stdout, stderr) = match (stdout, Target::parse(&self.stderr)?) {
            // One logger serves both, whatever the setting for stderr: the protocol has a
            // descriptor for each.
            (Target::Binary(uri), _) | (_, Target::Binary(uri)) => {
                let (stdout_read, stdout_write) = pipe_for(owner)?;
                let (stderr_read, stderr_write) = pipe_for(owner)?;
                let pipes = LoggerPipes { stdout: stdout_read, stderr: Some(stderr_read) };
                copies.logger = Some(Logger::start(&uri, pipes, owner, reaper).await?);
                (stdout_write, stderr_write)
            }
            (stdout, stderr) => (copies.output(stdout, owner)?, copies.output(stderr, owner)?),
        };
        Ok((ProcessIo::Fds { stdin, stdout, stderr }, Prepared { streams: Streams::Pipes, copies }))
    }
}

impl Prepared {
    /// Takes over the terminal, once the runtime has made the process.
    pub(crate) async fn connect(self) -> Result<Copies, StdioError> {
        let Self { streams, mut copies } = self;
        let Streams::Terminal { socket, stdin, stdout } = streams else { return Ok(copies) };
        let console = Pty::new(socket.receive().await?).map_err(StdioError::Fifo)?;
        if let Some(path) = stdin {
            copies.fifos.copy_from_fifo(&path, console.clone()).map_err(StdioError::Fifo)?;
        }
        let output = TerminalOutput(console.clone());
        match stdout {
            // Somebody must read, or the process stops at a full terminal.
            Sink::None => copies.copy(output, tokio::io::sink()),
            Sink::Fifo(path) => copies.fifos.copy_to_fifo(output, &path).map_err(StdioError::Fifo)?,
            Sink::File(file) => copies.copy(output, tokio::fs::File::from_std(file)),
            Sink::Pipe(write) => copies.copy(output, pipe::Sender::from_owned_fd(write).map_err(StdioError::Pipe)?),
        }
        copies.console = Some(console);
        Ok(copies)
    }

    /// Closes everything after a failed creation.
    pub(crate) async fn abandon(self) {
        self.copies.close(Duration::ZERO).await;
    }
}

impl Copies {
    fn new(fifos: IoTasks) -> Self {
        Self { fifos, ..Self::default() }
    }

    fn output(&self, target: Target, owner: &Owner) -> Result<OwnedFd, StdioError> {
        let file = match target {
            Target::Null => return null(true),
            Target::Fifo(path) => {
                let (read, write) = pipe_for(owner)?;
                let from = pipe::Receiver::from_owned_fd(read).map_err(StdioError::Pipe)?;
                self.fifos.copy_to_fifo(from, &path).map_err(StdioError::Fifo)?;
                return Ok(write);
            }
            Target::File(path) => open_log(path)?,
            // Both callers have handled loggers before.
            Target::Binary(uri) => return Err(StdioError::Uri { uri: uri.to_string() }),
        };
        let (read, write) = pipe_for(owner)?;
        let from = pipe::Receiver::from_owned_fd(read).map_err(StdioError::Pipe)?;
        self.copy(from, tokio::fs::File::from_std(file));
        Ok(write)
    }

    fn copy<R, W>(&self, mut from: R, mut to: W)
    where
        R: tokio::io::AsyncRead + Send + Unpin + 'static,
        W: tokio::io::AsyncWrite + Send + Unpin + 'static,
    {
        let cancel = self.cancel.clone();
        self.files.spawn(async move {
            tokio::select! {
                () = cancel.cancelled() => {}
                copied = tokio::io::copy(&mut from, &mut to) => {
                    // EPIPE from a dead logger ends here.
                    if let Err(error) = copied {
                        tracing::debug!("output copy ended: {error}");
                    }
                    if let Err(error) = tokio::io::AsyncWriteExt::flush(&mut to).await {
                        tracing::warn!("output is lost: {error}");
                    }
                }
            }
        });
    }

    /// Sets the size of the terminal, in characters; does nothing without a terminal.
    pub(crate) fn resize(&self, columns: u16, rows: u16) -> io::Result<()> {
        let Some(console) = &self.console else { return Ok(()) };
        let size = Winsize { ws_col: columns, ws_row: rows, ws_xpixel: 0, ws_ypixel: 0 };
        Ok(rustix::termios::tcsetwinsize(console, size)?)
    }

    /// Delivers the process's remaining output, and closes everything.
    pub(crate) async fn shut_down(self) {
        self.close(DRAIN_TIMEOUT).await;
    }

    async fn close(self, drain: Duration) {
        let fifos = async { if drain.is_zero() { self.fifos.abort().await } else { self.fifos.shutdown().await } };
        let files = async {
            self.files.close();
            if tokio::time::timeout(drain, self.files.wait()).await.is_err() {
                self.cancel.cancel();
                self.files.wait().await;
            }
        };
        let ((), ()) = tokio::join!(fifos, files);
        if let Some(logger) = self.logger {
            logger.stop().await;
        }
    }
}

fn null(write: bool) -> Result<OwnedFd, StdioError> {
    let path = PathBuf::from("/dev/null");
    match OpenOptions::new().read(!write).write(write).open(&path) {
        Ok(file) => Ok(file.into()),
        Err(source) => Err(StdioError::File { action: "open", path, source }),
    }
}

/// Opens a log file of the user's choice for appending; makes missing folders, never truncates.
fn open_log(path: PathBuf) -> Result<File, StdioError> {
    let opened = path.parent().map_or(Ok(()), std::fs::create_dir_all);
    let opened = opened.and_then(|()| OpenOptions::new().create(true).append(true).open(&path));
    opened.map_err(|source| StdioError::File { action: "open", path, source })
}

/// Makes a pipe with ends that the process's user may reopen through /proc.
fn pipe_for(owner: &Owner) -> Result<(OwnedFd, OwnedFd), StdioError> {
    let (read, write) = io::pipe().map_err(StdioError::Pipe)?;
    if owner.uid != 0 || owner.gid != 0 {
        let (uid, gid) = (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid));
        rustix::fs::fchown(&read, Some(uid), Some(gid)).map_err(|error| StdioError::Pipe(error.into()))?;
        rustix::fs::fchown(&write, Some(uid), Some(gid)).map_err(|error| StdioError::Pipe(error.into()))?;
    }
    Ok((read.into(), write.into()))
}
