//! Removal of a container in any state.

use std::path::PathBuf;

use cgroup::Place;
use libcontainer::config::YoukiConfig;
use libcontainer::container::{ContainerStatus, State};
use libcontainer::hooks::run_hooks;
use libcontainer::process::intel_rdt::cleanup_intel_rdt;

use super::error::{Result, chain};
use super::{Helper, adapt};

/// Returns whether the shim can delete the container. Hooks need a helper, systemd must not keep
/// the shim waiting, and anything unusual is better examined in a separate process.
pub(super) fn needs_no_helper(helper: &Helper) -> bool {
    if helper.directory.exists().is_ok_and(|exists| !exists) {
        return true;
    }
    let (Ok(state), Ok(config)) = (helper.directory.state(), helper.directory.config()) else { return false };
    !helper.systemd_cgroup
        && state.intel_rdt_dir.is_none()
        && state.intel_rdt_monitoring_dir.is_none()
        && config.hooks.is_none_or(|hooks| hooks.poststop().as_ref().is_none_or(Vec::is_empty))
}

/// Removes the container. A missing container is no error.
///
/// No signal goes by the pid in the state: the pid may be another process's by now. The cgroup
/// lists the container's processes.
pub(super) fn delete(helper: &mut Helper) -> Result<()> {
    if !helper.directory.exists()? {
        return Ok(());
    }
    let state = helper.readable("state", |helper| helper.directory.state());
    let config = helper.readable("configuration", |helper| helper.directory.config());

    let path = config.as_ref().map(|config| config.cgroup_path.clone()).or_else(|| helper.cgroup_path(state.as_ref()));
    match path {
        Some(path) => super::cgroup::remove(&Place::new(&path, helper.systemd_cgroup)?, &helper.id)?,
        // Both files are written before the cgroup is made.
        None => helper.warnings.push("the container's cgroup is not known: nothing was made, or it is left".into()),
    }
    if let Some(state) = &state
        && let Err(error) = cleanup_intel_rdt(
            state.intel_rdt_dir.as_deref(),
            state.intel_rdt_monitoring_dir.as_deref(),
            state.clean_up_intel_rdt_subdirectory,
            &helper.id,
        )
    {
        helper.warnings.push(format!("cannot clean up resctrl: {}", chain(&error)));
    }
    if let (Some(state), Some(config)) = (state, config) {
        poststop(helper, state, config)?;
    }
    helper.directory.remove()
}

/// Runs the poststop hooks, unless an earlier attempt did. The specification wants a failure to be
/// a warning.
fn poststop(helper: &mut Helper, mut state: State, mut config: YoukiConfig) -> Result<()> {
    let Some(hooks) = config.hooks.take() else { return Ok(()) };
    if hooks.poststop().as_ref().is_none_or(Vec::is_empty) {
        return Ok(());
    }
    // Before the hooks run, so that a later failure does not run them again.
    helper.directory.save_config(&config)?;
    state.status = ContainerStatus::Stopped;
    state.pid = None;
    if let Err(error) = run_hooks(hooks.poststop().as_ref(), Some(&state), None, None, None) {
        helper.warnings.push(format!("a poststop hook failed: {}", chain(&error)));
    }
    Ok(())
}

impl Helper {
    fn readable<T>(&mut self, what: &str, read: impl FnOnce(&Self) -> Result<T>) -> Option<T> {
        read(self).map_err(|failure| self.warnings.push(format!("the container's {what} is lost: {failure}"))).ok()
    }

    /// Returns the cgroup in the bundle's config.json, in case libcontainer's own note is lost.
    fn cgroup_path(&self, state: Option<&State>) -> Option<PathBuf> {
        let spec = adapt::load(&state?.bundle).ok()?;
        Some(adapt::cgroup_path(spec.linux().as_ref()?, self.systemd_cgroup, &self.id))
    }
}
