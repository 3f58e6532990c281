//! Start, pause, resume and update of an existing container.

use std::time::Duration;

use cgroup::Place;
use libcgroups::common::{CgroupManager, ControllerOpt};
use libcontainer::container::ContainerStatus;
use libcontainer::hooks::run_hooks;
use libcontainer::notify_socket::NOTIFY_FILE;
use oci_spec::runtime::LinuxResources;

use super::Helper;
use super::error::{Context, Failure, Result, chain};
use super::state::StateDirectory;

/// Longest time for a container to freeze. The kernel needs a millisecond, but a process waiting
/// for a disk or a network filesystem freezes only after the answer. libcgroups and runc wait as
/// long on version 2.
const PAUSE_LIMIT: Duration = Duration::from_secs(10);

impl Helper {
    /// Returns the container's place in the cgroup hierarchies.
    pub(super) fn place(&self) -> Result<Place> {
        Ok(Place::new(&self.directory.config()?.cgroup_path, self.systemd_cgroup)?)
    }
}

/// Returns whether the shim can start the container: only hooks need a helper.
pub(super) fn needs_no_helper(helper: &Helper) -> bool {
    let config = helper.directory.config();
    config.is_ok_and(|config| config.hooks.is_none_or(|hooks| hooks.poststart().as_ref().is_none_or(Vec::is_empty)))
}

pub(super) fn start(helper: &mut Helper) -> Result<()> {
    let (mut state, _) = helper.directory.expect("start", &[ContainerStatus::Created])?;
    let config = helper.directory.config()?;
    helper.directory.notify(NOTIFY_FILE)?;
    state.status = ContainerStatus::Running;
    helper.directory.save_state(&state)?;
    let hooks = config.hooks.as_ref().and_then(|hooks| hooks.poststart().as_ref()).filter(|hooks| !hooks.is_empty());
    if hooks.is_some() {
        // Poststart hooks come after the program's start, and the start after the startContainer
        // hooks.
        if !helper.directory.wait_started()? {
            helper.warnings.push("the program does not start: the poststart hooks are run before it has".into());
        }
        // The process runs already. The specification wants a warning, and to go on.
        if let Err(error) = run_hooks(hooks, Some(&state), None, None, None) {
            helper.warnings.push(format!("a poststart hook failed: {}", chain(&error)));
        }
    }
    Ok(())
}

/// Freezes the container. The state says paused before the freeze, and running again after a
/// failure: a reader never takes a frozen container for a running one.
pub(super) fn pause(helper: &Helper) -> Result<()> {
    pause_by(&helper.directory, || Ok(helper.place()?.cgroup()?.freeze_within(PAUSE_LIMIT)?))
}

/// Freezes by `freeze`, which undoes a failed attempt.
fn pause_by(directory: &StateDirectory, freeze: impl FnOnce() -> Result<()>) -> Result<()> {
    let (mut state, _) = directory.expect("pause", &[ContainerStatus::Running])?;
    state.status = ContainerStatus::Paused;
    directory.save_state(&state)?;
    let Err(failure) = freeze() else { return Ok(()) };
    state.status = ContainerStatus::Running;
    Err(match directory.save_state(&state) {
        Ok(()) => Failure::new(format!("cannot freeze the container: {failure}")),
        Err(unsaved) => Failure::new(format!("{failure}; it runs, and its state says that it is paused: {unsaved}")),
    })
}

/// Thaws the container. The state says running afterwards: after a failed thaw, resume can be tried
/// again.
pub(super) fn resume(helper: &Helper) -> Result<()> {
    let (mut state, _) = helper.directory.expect("resume", &[ContainerStatus::Paused])?;
    helper.place()?.cgroup()?.thaw().context(|| "thaw the container")?;
    state.status = ContainerStatus::Running;
    helper.directory.save_state(&state)
}

pub(super) fn update(helper: &Helper, resources: &LinuxResources) -> Result<()> {
    let allowed = [ContainerStatus::Created, ContainerStatus::Running, ContainerStatus::Paused];
    helper.directory.expect("update", &allowed)?;
    let mut resources = resources.clone();
    // An update never concerns devices. On v1 libcgroups would only add rules already in the list.
    resources.set_devices(None);
    let options =
        ControllerOpt { resources: &resources, disable_oom_killer: false, oom_score_adj: None, freezer_state: None };
    super::cgroup::manager(&helper.place()?, &helper.id)?
        .apply(&options)
        .context(|| "change the limits of the container")
}

#[cfg(test)]
mod tests {
    use libcontainer::container::State;
    use proc::{HostPid, Identity};

    use super::*;

    fn running(root: &std::path::Path) -> StateDirectory {
        let directory = StateDirectory::new(root, "one");
        directory.create().unwrap();
        let own = Identity::of(HostPid::own()).unwrap();
        directory
            .save_state(&State::new("one", ContainerStatus::Running, Some(own.pid.raw()), "/bundle".into()))
            .unwrap();
        directory.save_init(own).unwrap();
        directory
    }

    #[test]
    fn a_pause_that_fails_leaves_a_running_container() {
        let root = tempfile::tempdir().unwrap();
        let directory = running(root.path());
        let failure = pause_by(&directory, || {
            assert_eq!(directory.state().unwrap().status, ContainerStatus::Paused, "it says so before it is frozen");
            Err(Failure::new("a process does not stop"))
        });
        assert_eq!(failure.unwrap_err().to_string(), "cannot freeze the container: a process does not stop");
        assert_eq!(directory.state().unwrap().status, ContainerStatus::Running);
        pause_by(&directory, || Ok(())).unwrap();
        assert_eq!(directory.state().unwrap().status, ContainerStatus::Paused);
        pause_by(&directory, || Ok(())).unwrap_err();
    }
}
