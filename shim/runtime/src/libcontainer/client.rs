//! The shim's side: starts a helper, waits for the end, reads the reply, and cleans up after a dead
//! helper.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cgroup::Cgroup;
use proc::{HostPid, ProcessHandle};
use reaper::{Adoption, Child, Exit, Reaper};
use rustix::process::Signal;

use super::executable::Protected;
use super::protocol::{self, Create, Exec, Reply, Request, Step};
use super::{HELPER, NAME, helper, sys};
use crate::{CreateRequest, ExecRequest, Operation, ProcessIo, RuntimeError};

/// Name in `ps` of a helper, and of clones before the exec of the user's program.
const ARGUMENT_ZERO: &str = "containerd-shim-gpusnap-v2";
/// Environment variable that marks the processes of one helper.
const MARK: &str = "GPUSNAP_HELPER";
/// Environment of a helper: access to systemd, and the path to newuidmap.
const KEPT_ENVIRONMENT: [&str; 2] = ["PATH", "DBUS_SYSTEM_BUS_ADDRESS"];

static NEXT_MARK: AtomicU64 = AtomicU64::new(0);

#[derive(Clone, Debug)]
pub(super) struct Client {
    pub(super) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(super) struct Inner {
    pub(super) reaper: Reaper,
    pub(super) root: PathBuf,
    pub(super) systemd_cgroup: bool,
}

/// Result of a helper.
struct Outcome {
    reply: Reply,
    /// Mark of the helper's processes.
    mark: String,
}

/// Container and operation of a step: the common part of all errors.
#[derive(Clone, Copy)]
pub(super) struct Subject<'a> {
    pub(super) operation: Operation,
    pub(super) id: &'a str,
}

impl Subject<'_> {
    pub(super) fn refused(&self, message: String) -> RuntimeError {
        let Self { operation, id } = *self;
        RuntimeError::Refused { runtime: NAME.into(), operation, container: id.into(), message }
    }

    pub(super) fn answer(&self, message: String) -> RuntimeError {
        let Self { operation, id } = *self;
        RuntimeError::Answer { runtime: NAME.into(), operation, container: id.into(), message }
    }

    pub(super) fn file(&self, action: &'static str, path: PathBuf, source: io::Error) -> RuntimeError {
        let Self { operation, id } = *self;
        RuntimeError::File { action, path, operation, container: id.into(), source }
    }

    fn spawn(&self, source: io::Error) -> RuntimeError {
        let Self { operation, id } = *self;
        RuntimeError::Spawn { binary: "/proc/self/exe".into(), operation, container: id.into(), source }
    }
}

impl Client {
    pub(super) fn new(reaper: Reaper, root: PathBuf, systemd_cgroup: bool) -> Self {
        Self { inner: Arc::new(Inner { reaper, root, systemd_cgroup }) }
    }

    /// Runs a step that leaves no process behind.
    pub(super) async fn run(&self, operation: Operation, id: &str, step: Step) -> Result<(), RuntimeError> {
        let client = self.clone();
        let id = id.to_owned();
        detached(Subject { operation, id: &id.clone() }, async move {
            let subject = Subject { operation, id: &id };
            let request = client.request(subject, step);
            let reply = match client.here(subject, request.clone()).await? {
                Some(reply) => reply,
                None => client.helper(subject, &request, None).await?.reply,
            };
            client.pid(subject, reply).map(|_| ())
        })
        .await
    }

    pub(super) async fn create(&self, request: CreateRequest) -> Result<Child, RuntimeError> {
        let CreateRequest { id, bundle, io, no_pivot_root, no_new_keyring, prepare } = request;
        let client = self.clone();
        detached(Subject { operation: Operation::Create, id: &id.clone() }, async move {
            let subject = Subject { operation: Operation::Create, id: &id };
            let state = client.inner.root.join(&id);
            // Checked here too, not only by the helper: an existing container must not be undone
            // below.
            match std::fs::symlink_metadata(&state) {
                Ok(_) => return Err(subject.refused("a container with this id exists".into())),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(subject.file("read", state, error)),
            }
            let console_socket = console_socket(&io);
            let step = Step::Create(Create { bundle, console_socket, no_pivot_root, no_new_keyring, prepare });
            let result = client.process(subject, step, io).await;
            if result.is_err()
                && let Err(error) = client.run(Operation::Delete, &id, Step::Delete).await
            {
                tracing::error!(container = id, %error, "cannot undo the creation of a container");
            }
            result
        })
        .await
    }

    pub(super) async fn exec(&self, request: ExecRequest) -> Result<Child, RuntimeError> {
        let ExecRequest { id, exec_id: _, bundle, process, io, prepare } = request;
        let client = self.clone();
        detached(Subject { operation: Operation::Exec, id: &id.clone() }, async move {
            let subject = Subject { operation: Operation::Exec, id: &id };
            let console_socket = console_socket(&io);
            let step = Step::Exec(Box::new(Exec { bundle, process, console_socket, prepare }));
            client.process(subject, step, io).await
        })
        .await
    }

    /// Freezes or thaws a container without a helper: a few files are written, and a begun
    /// operation always ends.
    pub(super) async fn freezer(
        &self,
        operation: Operation,
        id: &str,
        act: fn(&Path, &str, bool) -> Result<(), String>,
    ) -> Result<(), RuntimeError> {
        let client = self.clone();
        let id = id.to_owned();
        detached(Subject { operation, id: &id.clone() }, async move {
            let name = id.clone();
            let act = move |inner: &Inner| act(&inner.root, &name, inner.systemd_cgroup);
            client.blocking(Subject { operation, id: &id }, act).await
        })
        .await
    }

    pub(super) fn cgroup(&self, id: &str) -> Result<Cgroup, RuntimeError> {
        let Inner { root, systemd_cgroup, .. } = &*self.inner;
        helper::cgroup(root, id, *systemd_cgroup).map_err(|message| RuntimeError::Cgroup {
            runtime: NAME.into(),
            container: id.into(),
            message,
        })
    }

    /// Runs a step that leaves a process behind, and adopts the process.
    async fn process(&self, subject: Subject<'_>, step: Step, io: ProcessIo) -> Result<Child, RuntimeError> {
        let adoption = self.inner.reaper.adoption();
        let outcome = self.helper(subject, &self.request(subject, step), Some(io)).await?;
        let result = match self.pid(subject, outcome.reply) {
            Ok(Some(pid)) => adoption
                .adopt(pid.raw())
                .map_err(|error| subject.answer(format!("its process {pid} cannot be adopted: {error}"))),
            Ok(None) => Err(subject.answer("the reply names no process".into())),
            Err(error) => Err(error),
        };
        if result.is_err() {
            kill_marked(&outcome.mark, &adoption);
        }
        result
    }

    fn pid(&self, subject: Subject<'_>, reply: Reply) -> Result<Option<HostPid>, RuntimeError> {
        match reply {
            Reply::Done { pid, warnings } => {
                for warning in warnings {
                    tracing::warn!(container = subject.id, operation = %subject.operation, "{warning}");
                }
                Ok(pid)
            }
            Reply::Failed { message } => Err(subject.refused(message)),
            Reply::Panicked { message } => Err(subject.answer(message)),
        }
    }

    fn request(&self, subject: Subject<'_>, step: Step) -> Request {
        let Inner { root, systemd_cgroup, .. } = &*self.inner;
        Request { root: root.clone(), id: subject.id.into(), systemd_cgroup: *systemd_cgroup, step }
    }

    /// Runs work that blocks for a moment, with text as the error.
    pub(super) async fn blocking<T: Send + 'static>(
        &self,
        subject: Subject<'_>,
        work: impl FnOnce(&Inner) -> Result<T, String> + Send + 'static,
    ) -> Result<T, RuntimeError> {
        let inner = Arc::clone(&self.inner);
        match tokio::task::spawn_blocking(move || work(&inner)).await {
            Ok(result) => result.map_err(|message| subject.refused(message)),
            Err(error) => Err(subject.answer(format!("the call was given up: {error}"))),
        }
    }

    /// Runs a step without a helper.
    async fn here(&self, subject: Subject<'_>, request: Request) -> Result<Option<Reply>, RuntimeError> {
        // Killing a container takes as long as its processes take to die.
        let done = tokio::task::spawn_blocking(move || helper::without_helper(&request)).await;
        done.map_err(|error| subject.answer(format!("the call was given up: {error}")))
    }

    /// Starts a helper and waits for the end.
    async fn helper(
        &self,
        subject: Subject<'_>,
        request: &Request,
        io: Option<ProcessIo>,
    ) -> Result<Outcome, RuntimeError> {
        let Inner { reaper, .. } = &*self.inner;
        let memory = |error| subject.file("make", "memfd:gpusnap-helper".into(), error);
        let request = protocol::memory_file(Some(request)).map_err(memory)?;
        let mut reply = protocol::memory_file(None).map_err(memory)?;
        let mark = format!("{}-{}", std::process::id(), NEXT_MARK.fetch_add(1, Ordering::Relaxed));

        let helper = spawn(reaper, &request, &reply, &mark, io.as_ref()).map_err(|error| subject.spawn(error))?;
        // The process has its descriptors now. Open copies here would hide their end from the
        // peers.
        drop(io);
        let exit = helper.wait().await;
        let reply = match protocol::read_reply(&mut reply) {
            Ok(Some(reply)) => reply,
            Ok(None) => Reply::Panicked { message: death(exit) },
            Err(error) => Reply::Panicked { message: format!("its reply cannot be read: {error}") },
        };
        Ok(Outcome { reply, mark })
    }
}

/// Runs an operation to its end even after the caller has gone: half an operation would leave half
/// a container.
pub(super) async fn detached<T, F>(subject: Subject<'_>, operation: F) -> Result<T, RuntimeError>
where
    T: Send + 'static,
    F: Future<Output = Result<T, RuntimeError>> + Send + 'static,
{
    match tokio::spawn(operation).await {
        Ok(result) => result,
        Err(error) => Err(subject.answer(format!("the call was given up: {error}"))),
    }
}

fn console_socket(io: &ProcessIo) -> Option<PathBuf> {
    match io {
        ProcessIo::Fds { .. } => None,
        ProcessIo::Terminal { console_socket } => Some(console_socket.clone()),
    }
}

fn spawn(reaper: &Reaper, request: &File, reply: &File, mark: &str, io: Option<&ProcessIo>) -> io::Result<Child> {
    let executable = Protected::own()?;
    let mut command = Command::new(executable.path());
    command
        .arg0(ARGUMENT_ZERO)
        .arg(HELPER)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .env_clear()
        .env(MARK, mark);
    for name in KEPT_ENVIRONMENT {
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
    let mut fds = vec![request.as_fd(), reply.as_fd()];
    if let Some(ProcessIo::Fds { stdin, stdout, stderr }) = io {
        fds.extend([stdin.as_fd(), stdout.as_fd(), stderr.as_fd()]);
    }
    command.args(fds.iter().map(|fd| fd.as_raw_fd().to_string()));
    sys::inherit(&mut command, &fds);
    reaper.spawn(&mut command)
}

fn death(exit: Exit) -> String {
    match exit.code {
        code @ 129.. => format!("the helper was killed by signal {}", code - 128),
        code => format!("the helper ended with exit code {code} and no reply"),
    }
}

/// Kills a helper's leftover processes, except the user's program. The helper's init would wait for
/// a start for ever, and may not be in the container's cgroup yet.
///
/// The leftovers are children of this process, and the adoption keeps their pids from reuse
/// meanwhile.
fn kill_marked(mark: &str, _adoption: &Adoption) {
    let marked = format!("{MARK}={mark}");
    let mut killed = HashSet::new();
    // A killed process may have cloned another just before, so repeat until nothing new is found.
    loop {
        let found: Vec<HostPid> = proc::children(HostPid::own())
            .into_iter()
            .filter(|pid| !killed.contains(pid) && is_marked(*pid, &marked))
            .collect();
        if found.is_empty() {
            return;
        }
        found.iter().copied().for_each(kill);
        killed.extend(found);
    }
}

/// Returns whether a process has the mark in its environment. The user's program has none, nor has
/// a dead process.
fn is_marked(pid: HostPid, marked: &str) -> bool {
    let environment = std::fs::read(pid.path("environ")).unwrap_or_default();
    environment.split(|&byte| byte == 0).any(|variable| variable == marked.as_bytes())
}

fn kill(pid: HostPid) {
    match ProcessHandle::open(pid).and_then(|process| process.signal(Signal::KILL)) {
        Ok(()) => tracing::debug!(%pid, "killed a leftover process of a failed helper"),
        Err(error) => tracing::debug!(%pid, %error, "cannot kill a leftover process of a failed helper"),
    }
}
