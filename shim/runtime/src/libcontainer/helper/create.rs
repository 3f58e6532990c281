//! Creation of a container, up to an init waiting for the start.

use std::ffi::CString;
use std::rc::Rc;

use cgroup::Place;
use libcontainer::config::YoukiConfig;
use libcontainer::container::{Container, ContainerStatus, State};
use libcontainer::notify_socket::NOTIFY_FILE;
use libcontainer::process::args::ContainerType;
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use proc::{HostPid, Identity};

use super::error::{Context, Failure, Result};
use super::launch::{Launch, give_stdio, launch};
use super::program::{StartHooks, Stdio};
use super::{Helper, adapt, delete, descriptors, devices, fixup, sys, v1_mounts};
use crate::libcontainer::protocol::Create;

pub(super) fn create(helper: &mut Helper, request: &Create, stdio: Option<Stdio>) -> Result<HostPid> {
    let spec = adapt::load(&request.bundle)?;
    adapt::validate(&spec)?;
    check_terminal(&spec, request.console_socket.is_some())?;
    let path = adapt::cgroup_path(adapt::linux(&spec)?, helper.systemd_cgroup, &helper.id);
    let place = Place::new(&path, helper.systemd_cgroup)?;
    // The cgroup is the container's alone: processes inside die with the container.
    if place.is_populated()? {
        return Err(Failure::new(format!("the cgroup {} is in use", path.display())));
    }

    helper.directory.create()?;
    build(helper, request, spec, &place, stdio).inspect_err(|_| {
        if let Err(failure) = delete::delete(helper) {
            tracing::error!("cannot undo the creation: {failure}");
        }
    })
}

fn build(
    helper: &mut Helper,
    request: &Create,
    mut spec: Spec,
    place: &Place,
    stdio: Option<Stdio>,
) -> Result<HostPid> {
    let container =
        Container::new(&helper.id, ContainerStatus::Creating, None, &request.bundle, helper.directory.path())?;
    let mut state = container.state.clone();
    state.use_systemd = place.is_systemd();
    state.annotations = spec.annotations().clone();
    // The path of the cgroup is written down before the cgroup exists.
    helper.directory.save_state(&state)?;
    let mut program = adapt::for_init(&mut spec, place.path().to_owned(), request.prepare, &mut helper.warnings)?;
    let cgroups = v1_mounts::expand(&mut spec, place)?;
    helper.directory.save_config(&YoukiConfig::from_spec(&spec, &helper.id)?)?;

    if let Some(stdio) = &stdio {
        let linux = adapt::linux(&spec)?;
        let uid = spec.process().as_ref().map_or(0, |process| process.user().uid());
        give_stdio(stdio, adapt::host_id(linux.uid_mappings().as_deref(), uid))?;
    }
    program.stdio = stdio.map(Rc::new);
    if !request.no_new_keyring {
        join_keyring(helper)?;
    }
    // State for hooks in the container. The first process of a new pid namespace knows its pid
    // beforehand.
    let mut launched_state = state.clone();
    launched_state.pid = adapt::has_new(adapt::linux(&spec)?, LinuxNamespaceType::Pid).then_some(1);
    program.hooks = start_hooks(&mut spec, &launched_state).map(Rc::new);
    // Only hooks need to know when the program has started.
    let has_poststart = spec.hooks().as_ref().is_some_and(|hooks| hooks.poststart().iter().flatten().next().is_some());
    let _starting = has_poststart.then(|| helper.directory.starting()).transpose()?;
    let rootfs = spec.root().as_ref().ok_or_else(|| Failure::new("the specification has no root"))?.path().clone();
    let mut launched_container = container.clone();
    launched_container.state = launched_state;
    let launched = launch(Launch {
        kind: ContainerType::InitContainer,
        container: launched_container,
        spec: spec.clone(),
        rootfs,
        place,
        program,
        no_pivot_root: request.no_pivot_root,
        notify_socket: &helper.directory.path().join(NOTIFY_FILE),
        console_socket: request.console_socket.as_deref(),
    })?;
    let pid = launched.pid;
    let died = || Failure::new("the container's init died while it was created");
    let init = Identity::of_living(pid).context(|| "look at the container's init")?.ok_or_else(died)?;
    if place.is_v2() {
        let devices = adapt::linux(&spec)?.resources().as_ref().and_then(|resources| resources.devices().as_deref());
        for directory in place.directories()? {
            devices::confine(&directory, devices.unwrap_or_default())?;
        }
    }
    fixup::finish(&spec, &cgroups, pid, request.console_socket.is_some())?;

    descriptors::note(pid, helper.directory.path())?;
    helper.directory.save_init(init)?;
    state.status = ContainerStatus::Created;
    state.pid = Some(pid.raw());
    state.creator = Some(rustix::process::geteuid().as_raw());
    state.intel_rdt_dir = launched.intel_rdt_dir;
    state.intel_rdt_monitoring_dir = launched.intel_rdt_monitoring_dir;
    helper.directory.save_state(&state)?;
    Ok(pid)
}

/// Takes the startContainer hooks out of the specification: [`Program`](super::program::Program)
/// runs them.
fn start_hooks(spec: &mut Spec, state: &State) -> Option<StartHooks> {
    let hooks = spec.hooks_mut().as_mut()?;
    let start = hooks.start_container().clone().filter(|hooks| !hooks.is_empty())?;
    hooks.set_start_container(None);
    let mut state = state.clone();
    state.status = ContainerStatus::Created;
    Some(StartHooks { hooks: start, state })
}

/// Checks that a terminal has a receiver for its master.
pub(super) fn check_terminal(spec: &Spec, has_socket: bool) -> Result<()> {
    match (spec.process().as_ref().and_then(|process| process.terminal()).unwrap_or(false), has_socket) {
        (true, false) => Err(Failure::new("the process wants a terminal, but there is no console socket")),
        (false, true) => Err(Failure::new("there is a console socket, but the process wants no terminal")),
        _ => Ok(()),
    }
}

/// Joins a session keyring of the container's own, without the keys in the shim's. Best effort, as
/// in runc: a kernel may be without keyrings.
pub(super) fn join_keyring(helper: &mut Helper) -> Result<()> {
    let name = CString::new(format!("_ses.{}", helper.id)).context(|| "name the session keyring")?;
    if let Err(error) = sys::join_session_keyring(&name)
        && error.raw_os_error() != Some(libc::ENOSYS)
    {
        helper.warnings.push(format!("cannot make a session keyring for the container: {error}"));
    }
    Ok(())
}
