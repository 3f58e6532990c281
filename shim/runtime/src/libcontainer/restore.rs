//! Restore, missing from libcontainer: CRIU makes the processes, this module everything around.
//!
//! ```text
//!  prepare        state directory, mount points, the root as a mount point       helper::prepare_restore
//!  criu starts ─► the cgroup with its limits is made around criu                 Step::Join
//!  CRIU:          new namespaces ─► network, prestart and createRuntime hooks    Step::SetUp
//!                 terminal ─► its master goes to the console socket
//!                 processes and memory ─► state files                            helper::finish_restore
//!                 each may do no more than the specification gives               privileges::Allowed
//!                 (the cgroup is frozen, if that was asked for)
//!                 the processes run
//!  clean          the root's extra mount goes                                    helper::clean_restore
//! ```
//!
//! criu is the shim's child, and so is the restored init (`rst_sibling`): the same parent as after
//! a creation. A failure is undone by the criu crate for CRIU's part, and by `delete` for the rest.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use criu::{BoxError, CgroupRoots, Criu, Inherit, NotifyRestore, OnKilled};
use oci_spec::runtime::LinuxResources;
use phase::Cancel;
use proc::HostPid;
use reaper::Child;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use super::client::{Client, Inner, Subject, detached};
use super::helper;
use super::helper::HostName;
use super::helper::restore::{Prepared, Streams};
use super::privileges::Allowed;
use super::protocol::{Join, Step};
use crate::{Operation, Phase, Privileges, ProcessIo, RestoreRequest, RuntimeError, Timeline};

/// CRIU's log level: errors and warnings. All processes write to one log, each line at once, and at
/// level 4 two lines for most pages: half of the restore of a tree of forked processes
/// (docs/benchmarks.md).
const LOG_LEVEL: i32 = 2;
/// Environment variable for another level, up to 4.
const LOG_LEVEL_VARIABLE: &str = "GPUSNAP_CRIU_LOG_LEVEL";

impl Client {
    pub(super) async fn restore(&self, request: RestoreRequest) -> Result<Child, RuntimeError> {
        let client = self.clone();
        let id = request.id.clone();
        detached(Subject { operation: Operation::Restore, id: &id.clone() }, async move {
            client.restore_now(Subject { operation: Operation::Restore, id: &id }, request).await
        })
        .await
    }

    async fn restore_now(&self, subject: Subject<'_>, request: RestoreRequest) -> Result<Child, RuntimeError> {
        request.timeline.enter(Phase::Prepare);
        let (request, prepared) = self
            .blocking(subject, move |inner| {
                helper::prepare_restore(&inner.root, inner.systemd_cgroup, &request).map(|prepared| (request, prepared))
            })
            .await?;
        let restored = match self.restore_prepared(subject, request, prepared).await {
            Ok(root) => self.clean(subject).await.map(|()| root),
            Err(error) => Err(error),
        };
        if restored.is_err()
            && let Err(error) = self.run(Operation::Delete, subject.id, Step::Delete).await
        {
            tracing::error!(container = subject.id, %error, "cannot undo a restore");
        }
        restored
    }

    async fn clean(&self, subject: Subject<'_>) -> Result<(), RuntimeError> {
        let id = subject.id.to_owned();
        self.blocking(subject, move |inner| helper::clean_restore(&inner.root, &id)).await
    }

    async fn restore_prepared(
        &self,
        subject: Subject<'_>,
        request: RestoreRequest,
        prepared: Prepared,
    ) -> Result<Child, RuntimeError> {
        let RestoreRequest { images, work, io, allow, frozen, cut, timeline, cancel, privileges, .. } = request;
        let mut inherit = Vec::new();
        for (kind, path) in prepared.inherited {
            let file = File::open(&path).map_err(|source| subject.file("open", path, source))?;
            inherit.push(Inherit { key: kind.external_key(), fd: file.into() });
        }
        let mut noted = Streams { dumped: prepared.streams.clone(), new: Vec::new() };
        let console_socket = match io {
            ProcessIo::Fds { stdin, stdout, stderr } => {
                for fd in [&stdin, &stdout, &stderr] {
                    helper::give_to(fd.as_fd(), prepared.uid).map_err(|message| subject.refused(message))?;
                }
                let links = [&stdin, &stdout, &stderr].map(|fd| link(fd.as_fd()));
                noted.new = links
                    .into_iter()
                    .collect::<io::Result<_>>()
                    .map_err(|source| subject.file("look at", "the container's standard streams".into(), source))?;
                inherit.extend(streams(&prepared.streams, [stdin, stdout, stderr]));
                None
            }
            ProcessIo::Terminal { console_socket } => Some(console_socket),
        };
        timeline.enter(Phase::Cgroup);
        let mut stages = Stages {
            client: self,
            subject,
            resources: Some(prepared.resources),
            raise_loopback: prepared.raise_loopback,
            has_hooks: prepared.has_hooks,
            host_name: prepared.host_name,
            console_socket,
            frozen,
            streams: noted,
            allowed: (privileges == Privileges::Container).then(|| prepared.allowed.clone()),
            criu: None,
            root: None,
            timeline,
            cancel,
        };
        let criu_request = criu::RestoreRequest {
            images_dir: images,
            cut,
            work_dir: Some(work),
            root: Some(prepared.root),
            external_mounts: prepared.external_mounts,
            inherit,
            join_namespaces: prepared.joined,
            lsm_profile: (privileges == Privileges::Container).then(|| prepared.allowed.lsm_profile()).flatten(),
            cgroup_roots: CgroupRoots::OfCriu,
            on_killed: frozen.then(|| self.thaw_the_killed(subject.id)),
            options: criu::Options {
                evasive_devices: true,
                log_level: Some(log_level()),
                ..helper::criu_options(allow)
            },
        };
        let restored = Criu::new(self.inner.reaper.clone()).restore(criu_request, &mut stages).await;
        if restored.is_err()
            && let Err(error) = stages.put_back_host_name().await
        {
            tracing::error!(container = subject.id, %error, "cannot undo a restore");
        }
        Ok(restored?.root)
    }

    /// Returns a callback that lets the killed processes of a frozen tree end. Without the
    /// callback, a restore whose criu died after the freeze would wait for ever.
    fn thaw_the_killed(&self, id: &str) -> OnKilled {
        let (client, id) = (self.clone(), id.to_owned());
        OnKilled::new(move || {
            let thawed = client.cgroup(&id).map(|cgroup| cgroup.let_the_killed_die());
            if let Ok(Err(error)) = thawed {
                tracing::error!(container = id, %error, "cannot thaw the killed processes of a failed restore");
            }
        })
    }
}

fn log_level() -> i32 {
    let asked = std::env::var(LOG_LEVEL_VARIABLE).ok().and_then(|level| level.parse().ok());
    asked.unwrap_or(LOG_LEVEL)
}

/// Returns the link of a descriptor of this process, as in `/proc/PID/fd`.
fn link(fd: BorrowedFd<'_>) -> io::Result<String> {
    let link = std::fs::read_link(HostPid::own().path(&format!("fd/{}", fd.as_raw_fd())))?;
    Ok(link.to_string_lossy().into_owned())
}

/// Returns the new streams in place of the dumped process's pipes.
fn streams(dumped: &[String], new: [OwnedFd; 3]) -> Vec<Inherit> {
    let pairs = dumped.iter().zip(new).filter(|(link, _)| helper::is_pipe(link));
    pairs.map(|(link, fd)| Inherit { key: link.clone(), fd }).collect()
}

/// State across CRIU's stages.
struct Stages<'a> {
    client: &'a Client,
    subject: Subject<'a>,
    /// `None` once the cgroup is made.
    resources: Option<LinuxResources>,
    raise_loopback: bool,
    has_hooks: bool,
    /// `None` unless the container joins one.
    host_name: Option<Arc<HostName>>,
    /// Receiver of the terminal; `None` once sent, or without a terminal.
    console_socket: Option<PathBuf>,
    /// Freeze the tree before the processes run.
    frozen: bool,
    streams: Streams,
    /// Most rights for the tree; `None` allows the saved rights.
    allowed: Option<Allowed>,
    /// criu and the tree's root, once known.
    criu: Option<HostPid>,
    root: Option<HostPid>,
    timeline: Timeline,
    cancel: Cancel,
}

impl Stages<'_> {
    async fn put_back_host_name(&self) -> Result<(), RuntimeError> {
        let Some(host_name) = self.host_name.clone() else { return Ok(()) };
        self.client.blocking(self.subject, move |_| helper::put_back(&host_name)).await
    }
}

#[async_trait]
impl NotifyRestore for Stages<'_> {
    async fn started(&mut self, criu: &Child) -> Result<(), BoxError> {
        self.criu = Some(criu.process());
        let resources = self.resources.take().unwrap_or_default();
        let step = Step::Join(Box::new(Join { pid: criu.process(), resources }));
        self.client.run(self.subject.operation, self.subject.id, step).await?;
        self.timeline.enter(Phase::Restore);
        Ok(())
    }

    async fn setup_namespaces(&mut self, root: &Child) -> Result<(), BoxError> {
        if self.raise_loopback || self.has_hooks {
            self.timeline.enter(Phase::Hooks);
            let step = Step::SetUp { pid: root.process(), raise_loopback: self.raise_loopback };
            self.client.run(self.subject.operation, self.subject.id, step).await?;
            self.timeline.enter(Phase::Restore);
        }
        Ok(())
    }

    async fn post_setup_namespaces(&mut self) -> Result<(), BoxError> {
        Ok(self.put_back_host_name().await?)
    }

    async fn orphan_pts_master(&mut self, master: OwnedFd) -> Result<(), BoxError> {
        let socket = self.console_socket.take();
        let socket = socket.ok_or("the checkpoint is of a container with a terminal, and this one has none")?;
        Ok(send(&socket, &master)?)
    }

    async fn post_restore(&mut self, root: &Child) -> Result<(), BoxError> {
        if self.console_socket.is_some() {
            return Err("the process wants a terminal, but the one in the checkpoint has none".into());
        }
        self.root = Some(root.process());
        let (id, pid, streams) = (self.subject.id.to_owned(), root.process(), self.streams.clone());
        let finish = move |inner: &Inner| helper::finish_restore(&inner.root, &id, pid, &streams);
        self.client.blocking(self.subject, finish).await?;
        self.timeline.enter(Phase::Resume);
        Ok(())
    }

    async fn pre_resume(&mut self) -> Result<(), BoxError> {
        self.cancel.check()?;
        if let (Some(allowed), Some(root)) = (self.allowed.take(), self.root) {
            self.client.blocking(self.subject, move |_| allowed.check(root)).await?;
        }
        let (true, Some(criu)) = (self.frozen, self.criu) else { return Ok(()) };
        let cgroup = self.client.cgroup(self.subject.id)?;
        // criu holds every thread of the tree here, so that none runs before the freeze.
        let frozen = move |_: &_| cgroup.freeze_around(&[criu], HostPid::own()).map_err(|error| phase::chain(&error));
        self.client.blocking(self.subject, frozen).await?;
        Ok(())
    }
}

/// Sends a terminal to the listener at a socket, as runtimes do at creation.
fn send(socket: &PathBuf, master: &OwnedFd) -> io::Result<()> {
    let stream = UnixStream::connect(socket)?;
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors = [master.as_fd()];
    ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
    // Ancillary data travels with at least one byte; the name is runc's.
    rustix::net::sendmsg(&stream, &[io::IoSlice::new(b"/dev/ptmx")], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}
