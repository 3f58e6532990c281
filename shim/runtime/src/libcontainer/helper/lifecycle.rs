//! Start, pause, resume and update of a container that is there.

use libcgroups::common::{CgroupManager, ControllerOpt, FreezerState};
use libcontainer::container::ContainerStatus;
use libcontainer::hooks::run_hooks;
use libcontainer::notify_socket::NOTIFY_FILE;
use oci_spec::runtime::LinuxResources;

use super::Helper;
use super::cgroup::Place;
use super::error::{Context, Result, chain};

impl Helper {
    /// Where the container is accounted.
    pub(super) fn place(&self) -> Result<Place> {
        Place::new(&self.directory.config()?.cgroup_path, self.systemd_cgroup, &self.id)
    }
}

/// Only hooks need one.
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
        // They come after the program has started, and that after the startContainer hooks.
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

pub(super) fn pause(helper: &Helper) -> Result<()> {
    let (mut state, _) = helper.directory.expect("pause", &[ContainerStatus::Running])?;
    helper.place()?.manager()?.freeze(FreezerState::Frozen).context(|| "freeze the container")?;
    state.status = ContainerStatus::Paused;
    helper.directory.save_state(&state)
}

pub(super) fn resume(helper: &Helper) -> Result<()> {
    let (mut state, _) = helper.directory.expect("resume", &[ContainerStatus::Paused])?;
    helper.place()?.manager()?.freeze(FreezerState::Thawed).context(|| "thaw the container")?;
    state.status = ContainerStatus::Running;
    helper.directory.save_state(&state)
}

pub(super) fn update(helper: &Helper, resources: &LinuxResources) -> Result<()> {
    let allowed = [ContainerStatus::Created, ContainerStatus::Running, ContainerStatus::Paused];
    helper.directory.expect("update", &allowed)?;
    let mut resources = resources.clone();
    // An update is not about devices. On v1 what libcgroups adds to these is in the list already.
    resources.set_devices(None);
    let options =
        ControllerOpt { resources: &resources, disable_oom_killer: false, oom_score_adj: None, freezer_state: None };
    helper.place()?.manager()?.apply(&options).context(|| "change the limits of the container")
}
