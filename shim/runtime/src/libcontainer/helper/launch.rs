//! Start of a process by libcontainer, as the first of a container or a further one.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use cgroup::Place;
use libcontainer::container::Container;
use libcontainer::notify_socket::NotifyListener;
use libcontainer::process::args::{ContainerArgs, ContainerType};
use libcontainer::process::container_main_process::container_main_process;
use libcontainer::process::intel_rdt::setup_intel_rdt;
use libcontainer::syscall::syscall::SyscallType;
use oci_spec::runtime::Spec;
use proc::{HostPid, ProcessHandle};
use rustix::fs::Uid;
use rustix::io::Errno;
use rustix::process::{DumpableBehavior, Signal};

use super::error::{Context, Result};
use super::id_maps;
use super::program::{Program, Stdio, is_null};

/// Arguments of a start.
pub(super) struct Launch<'a> {
    pub(super) kind: ContainerType,
    pub(super) container: Container,
    pub(super) spec: Spec,
    pub(super) rootfs: PathBuf,
    pub(super) place: &'a Place,
    pub(super) program: Program,
    pub(super) no_pivot_root: bool,
    /// Socket at which the new process waits.
    pub(super) notify_socket: &'a Path,
    pub(super) console_socket: Option<&'a Path>,
}

/// A process waiting at its notify socket.
pub(super) struct Launched {
    pub(super) pid: HostPid,
    pub(super) intel_rdt_dir: Option<PathBuf>,
    pub(super) intel_rdt_monitoring_dir: Option<PathBuf>,
}

/// Starts the process, up to the wait. After a failure the process ends; but see [`kill`].
pub(super) fn launch(launch: Launch<'_>) -> Result<Launched> {
    let Launch { kind, container, spec, rootfs, place, program, no_pivot_root, notify_socket, console_socket } = launch;
    let console_socket = console_socket
        .map(|path| UnixStream::connect(path).context(|| format!("connect to the console socket {}", path.display())))
        .transpose()?;
    let folder = notify_socket.parent().unwrap_or(Path::new("/"));
    let (user_ns_config, mappers) = id_maps::config(&spec, folder)?;
    let notify_listener = NotifyListener::new(notify_socket)?;
    if let Some(score) = spec.process().as_ref().and_then(|process| process.oom_score_adj()) {
        let path = "/proc/self/oom_score_adj";
        fs::write(path, score.to_string()).context(|| format!("write {score} to {path}"))?;
    }
    // Processes already in the container must not look into a process about to join.
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable).context(|| "make the process undumpable")?;

    let intel_rdt = spec.linux().as_ref().and_then(|linux| linux.intel_rdt().clone());
    let id = container.id().to_owned();
    let arguments = ContainerArgs {
        container_type: kind,
        syscall: SyscallType::default(),
        spec: Rc::new(spec),
        rootfs,
        console_socket: console_socket.as_ref().map(AsRawFd::as_raw_fd),
        notify_listener,
        preserve_fds: 0,
        container: Some(container),
        user_ns_config,
        cgroup_config: super::cgroup::config(place, &id),
        detached: true,
        executor: Box::new(program),
        no_pivot: no_pivot_root,
        stdin: None,
        stdout: None,
        stderr: None,
        as_sibling: true,
        pid_file: None,
    };
    let membership = place.join_the_rest()?;
    let pid = match container_main_process(&arguments) {
        Ok(pid) => pid,
        Err(error) => return Err(mappers.and_then(|mappers| mappers.failure()).unwrap_or_else(|| error.into())),
    };
    drop(membership);
    let process = HostPid::try_from(pid.as_raw())?;
    let (intel_rdt_dir, intel_rdt_monitoring_dir) = match intel_rdt {
        Some(intel_rdt) if matches!(kind, ContainerType::InitContainer) => {
            setup_intel_rdt(Some(&id), &pid, &intel_rdt).inspect_err(|_| kill(process))?
        }
        _ => (None, None),
    };
    Ok(Launched { pid: process, intel_rdt_dir, intel_rdt_monitoring_dir })
}

/// Kills a launched process. The process is a child of the shim, not reaped while the helper runs,
/// so the pid still belongs to the process.
pub(super) fn kill(pid: HostPid) {
    if let Ok(process) = ProcessHandle::open(pid) {
        // An ended process needs no signal.
        let _ = process.signal(Signal::KILL);
    }
}

/// Gives pipes to the process's user: otherwise a process without root could not open /dev/stdout.
pub(super) fn give_stdio(stdio: &Stdio, uid: u32) -> Result<()> {
    for fd in [&stdio.stdin, &stdio.stdout, &stdio.stderr] {
        give(fd.as_fd(), uid)?;
    }
    Ok(())
}

/// Gives one file to a user, for callers outside.
pub(in crate::libcontainer) fn give_to(fd: BorrowedFd<'_>, uid: u32) -> std::result::Result<(), String> {
    give(fd, uid).map_err(|failure| failure.to_string())
}

/// Gives one file to a user, as runc does: except /dev/null, and except where the filesystem
/// cannot.
pub(super) fn give(fd: BorrowedFd<'_>, uid: u32) -> Result<()> {
    let stat = rustix::fs::fstat(fd).context(|| "look at the process's standard input and output")?;
    if stat.st_uid == uid || is_null(fd).context(|| "look at the process's standard input and output")? {
        return Ok(());
    }
    match rustix::fs::fchown(fd, Some(Uid::from_raw(uid)), None) {
        Ok(()) | Err(Errno::INVAL | Errno::PERM | Errno::ROFS) => Ok(()),
        Err(error) => Err(error).context(|| "give the process's standard input and output to its user"),
    }
}
