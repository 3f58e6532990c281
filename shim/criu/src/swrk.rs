//! A single run of `criu swrk`.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};
use reaper::{Child, Exit, Reaper};
use rustix::fs::MemfdFlags;
use rustix::process::Signal;

use crate::client::Criu;
use crate::error::CallError;
use crate::plugin::DevicePlugin;
use crate::residue::MARKER;
use crate::sparse::Preload;
use crate::sys;
use crate::transport::{Channel, Received};

/// Descriptor of criu's socket; the inherited ones follow.
const SOCKET: i32 = 3;
pub(crate) const FIRST_INHERITED: i32 = 4;

/// A directory that exists wherever CRIU works and never holds a plugin: all names are numbers.
const NO_PLUGINS: &str = "/proc/self/fdinfo";

/// Search path for CRIU's programs: iptables-restore, ip and tar.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Most bytes read of standard output and error: a line or two come before the log is open.
const MAX_OUTPUT: u64 = 64 << 10;

/// [`Reaper::spawn`] or [`Reaper::spawn_lasting`].
pub(crate) type SpawnBy = fn(&Reaper, &mut Command) -> io::Result<Child>;

/// Code of ours that criu loads.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Loaded<'a> {
    /// Folder of plugins.
    pub(crate) plugins: Option<&'a Path>,
    pub(crate) preload: Option<&'a Preload>,
}

/// A running criu, or one that has ended alone.
#[derive(Debug)]
pub(crate) struct Swrk {
    pub(crate) child: Child,
    /// `None` once the conversation is over.
    channel: Option<Channel>,
    /// criu's standard output and standard error.
    output: Output,
    grace: Duration,
}

impl Swrk {
    /// Starts criu in `directory`, with `inherited` as descriptors from [`FIRST_INHERITED`] on.
    /// `spawn_by` decides on criu's parent, also the parent of restored trees.
    pub(crate) fn start(
        criu: &Criu,
        loaded: Loaded<'_>,
        directory: &Path,
        marker: &str,
        inherited: Vec<OwnedFd>,
        spawn_by: SpawnBy,
    ) -> Result<Self, CallError> {
        let failed = |source| CallError::Start { path: criu.path.clone(), source };
        let (channel, theirs) = Channel::pair().map_err(failed)?;
        let mut command = command(criu, loaded.plugins);
        if let Some(preload) = loaded.preload {
            preload.add_to(&mut command);
        }
        command.args(["swrk", &SOCKET.to_string()]).env(MARKER, marker).current_dir(directory);
        let mut mappings = vec![FdMapping { parent_fd: theirs, child_fd: SOCKET }];
        for (fd, child_fd) in inherited.into_iter().zip(FIRST_INHERITED..) {
            mappings.push(FdMapping { parent_fd: fd, child_fd });
        }
        let (child, output) = spawn(criu, command, mappings, spawn_by)?;
        Ok(Self { child, channel: Some(channel), output, grace: criu.cancel_grace })
    }

    pub(crate) fn channel(&self) -> io::Result<&Channel> {
        self.channel.as_ref().ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    /// Returns the next message, or `None` after criu's end or the close of the socket. Both are
    /// watched: forked helpers keep the socket of a killed criu open.
    pub(crate) async fn receive(&self) -> io::Result<Option<Received>> {
        let channel = self.channel()?;
        tokio::select! {
            biased;
            received = channel.receive() => received,
            // The last message may have come at the same time.
            _ = self.child.wait() => channel.received(),
        }
    }

    /// Ends the conversation and waits for criu's end. criu has answered, or finds the socket
    /// closed at the next stage and undoes the work so far. After the grace, criu is killed.
    pub(crate) async fn end(&mut self) -> Exit {
        self.channel = None;
        if let Ok(exit) = tokio::time::timeout(self.grace, self.child.wait()).await {
            return exit;
        }
        tracing::warn!(pid = self.child.pid(), "criu does not end, and is killed");
        self.kill();
        self.child.wait().await
    }

    pub(crate) fn kill(&self) {
        // A process already gone is the goal.
        let _ = self.child.signal(Signal::KILL);
    }

    /// Returns criu's standard output and standard error: errors from before the log was open.
    pub(crate) fn output(&self) -> String {
        self.output.text()
    }
}

/// A file in memory for a child's output.
#[derive(Debug)]
pub(crate) struct Output(File);

impl Output {
    pub(crate) fn text(&self) -> String {
        let mut bytes = vec![];
        let mut file = &self.0;
        let read = file.seek(SeekFrom::Start(0)).and_then(|_| file.take(MAX_OUTPUT).read_to_end(&mut bytes));
        if let Err(error) = read {
            tracing::debug!(%error, "cannot read what criu has written");
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// Returns a command for criu, free of environment variables with a meaning for CRIU: no
/// `CRIU_CONFIG_FILE`, no `HOME` with a `.criu`, no plugins but ours.
pub(crate) fn command(criu: &Criu, plugins: Option<&Path>) -> Command {
    let plugins = plugins.unwrap_or(Path::new(NO_PLUGINS));
    let mut command = Command::new(&criu.path);
    command
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_else(|| DEFAULT_PATH.into()))
        .env("LC_ALL", "C")
        .env(DevicePlugin::VARIABLE, plugins)
        // The variable alone yields to a `libdir` in /etc/criu/default.conf.
        .arg("--libdir")
        .arg(plugins);
    command
}

/// Spawns `command` with only null, the output and `mappings`.
pub(crate) fn spawn(
    criu: &Criu,
    mut command: Command,
    mappings: Vec<FdMapping>,
    spawn_by: SpawnBy,
) -> Result<(Child, Output), CallError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => CallError::NotInstalled { path: criu.path.clone() },
        _ => CallError::Start { path: criu.path.clone(), source },
    };
    let start = |source| CallError::Start { path: criu.path.clone(), source };
    let memory = rustix::fs::memfd_create("criu-output", MemfdFlags::CLOEXEC).map_err(|errno| start(errno.into()))?;
    let output = File::from(memory);
    command.stdin(Stdio::null()).stdout(output.try_clone().map_err(start)?).stderr(output.try_clone().map_err(start)?);
    let first_free = mappings.iter().map(|mapping| mapping.child_fd + 1).max().unwrap_or(SOCKET).unsigned_abs();
    command.fd_mappings(mappings).map_err(|error| start(io::Error::other(error)))?;
    sys::close_from(&mut command, first_free);
    let child = spawn_by(&criu.reaper, &mut command).map_err(failed)?;
    // The command holds this process's copies of the descriptors: criu's end of the socket would
    // never close.
    drop(command);
    Ok((child, Output(output)))
}
