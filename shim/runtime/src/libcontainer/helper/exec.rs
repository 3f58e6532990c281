//! A further process in a running container.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::rc::Rc;

use libcontainer::container::{Container, ContainerStatus};
use libcontainer::process::args::ContainerType;
use proc::{HostPid, Identity};

use super::create::{check_terminal, join_keyring};
use super::error::{Context, Failure, Result};
use super::launch::{Launch, give_stdio, kill, launch};
use super::program::Stdio;
use super::{Helper, adapt, fixup};
use crate::libcontainer::protocol::Exec;

/// Most bytes of a process's last words: a few lines are usual.
const WORDS_LIMIT: u64 = 64 << 10;

pub(super) fn exec(helper: &mut Helper, request: Exec, stdio: Option<Stdio>) -> Result<HostPid> {
    let Exec { bundle, process, console_socket, prepare } = request;
    let allowed = [ContainerStatus::Created, ContainerStatus::Running];
    let (state, init) = helper.directory.expect("exec in", &allowed)?;
    let place = helper.place()?;
    // A frozen container, or a cgroup above: the new process would join it and freeze, and the
    // helper wait for ever.
    if place.is_frozen()? {
        return Err(Failure::new("cannot exec in a paused container"));
    }
    let place = place.for_exec(init.pid)?;
    let mut spec = adapt::load(&bundle)?;
    let uid_mappings = adapt::linux(&spec)?.uid_mappings().clone();
    let mut program =
        adapt::for_exec(&mut spec, process, init.pid, place.path().to_owned(), prepare, &mut helper.warnings)?;
    check_terminal(&spec, console_socket.is_some())?;
    let uid = spec.process().as_ref().map_or(0, |process| process.user().uid());
    let uid = adapt::host_id(uid_mappings.as_deref(), uid);
    if let Some(stdio) = &stdio {
        give_stdio(stdio, uid)?;
    }
    program.stdio = stdio.map(Rc::new);
    join_keyring(helper)?;

    // Named by the helper's pid: unique while the helper lives, and needed no longer.
    let notify_socket = format!("exec-{}.sock", std::process::id());
    let notify_path = helper.directory.path().join(&notify_socket);
    let container = Container { state, root: helper.directory.path().to_owned() };
    let (words, end) = io::pipe().context(|| "make a pipe")?;
    let launched = launch(Launch {
        kind: ContainerType::TenantContainer { exec_notify_fd: end.as_raw_fd() },
        container,
        spec: spec.clone(),
        rootfs: PathBuf::from("/"),
        place: &place,
        program,
        no_pivot_root: false,
        notify_socket: &notify_path,
        console_socket: console_socket.as_deref(),
    });
    let result = launched.and_then(|launched| {
        let pid = launched.pid;
        finish(init, pid, console_socket.is_some().then_some(uid))
            .and_then(|()| helper.directory.notify(&notify_socket))
            .and_then(|()| {
                drop(end);
                last_words(OwnedFd::from(words).into())
            })
            .map(|()| pid)
            .inspect_err(|_| kill(pid))
    });
    let _ = fs::remove_file(&notify_path);
    result
}

/// Runs the steps between the process's birth and start.
fn finish(init: Identity, pid: HostPid, terminal_user: Option<u32>) -> Result<()> {
    // The process joined the namespaces by pid. The pid was init's before, and is now: so also
    // meanwhile.
    if !init.is_alive().context(|| "look for the container's init")? {
        return Err(Failure::new("cannot exec in a stopped container"));
    }
    terminal_user.map_or(Ok(()), |uid| fixup::give_terminal(pid, uid))
}

/// Reads the pipe: empty after the exec of the user's program, else with an error message.
fn last_words(pipe: File) -> Result<()> {
    let mut words = Vec::new();
    pipe.take(WORDS_LIMIT).read_to_end(&mut words).context(|| "wait for the process to start")?;
    if words.is_empty() { Ok(()) } else { Err(Failure::new(String::from_utf8_lossy(&words))) }
}
