//! Checkpoint and restore by a runtime that drives CRIU. CRIU's log is read too, because the
//! runtime says little about a failure.

use std::ffi::OsString;

use criu::DevicePlugin;
use reaper::Child;

use super::Command;
use super::call::Call;
use crate::{Allow, CheckpointRequest, Operation, Phase, RestoreRequest, RuntimeError, Tcp};

/// Flag for connections in the images.
const ESTABLISHED: &str = "--tcp-established";
/// Flag, of runc since 1.3, to leave out connections that nobody has accepted.
const SKIP_IN_FLIGHT: &str = "--tcp-skip-in-flight";

impl Call<'_> {
    /// Returns whether the runtime's dumps can leave out connections that nobody has accepted.
    async fn skips_in_flight(&self) -> bool {
        let Ok(scratch) = self.scratch() else { return false };
        let asked = self.run(&scratch, vec!["checkpoint".into(), "--help".into()]).await;
        let output = asked.and_then(|()| scratch.output(self)).unwrap_or_default();
        String::from_utf8_lossy(&output).contains(SKIP_IN_FLIGHT)
    }
}

impl Command {
    pub(super) async fn checkpoint_now(&self, request: CheckpointRequest) -> Result<(), RuntimeError> {
        let CheckpointRequest { id, init, images, work, leave_running, allow, devices, .. } = request;
        let call = self.call(Operation::Checkpoint, &id);
        let mut arguments: Vec<OsString> = vec!["checkpoint".into(), "--image-path".into(), images.into()];
        arguments.extend(["--work-path".into(), work.clone().into()]);
        if leave_running {
            arguments.push("--leave-running".into());
        }
        arguments.extend(flags(allow).map(OsString::from));
        match allow.tcp {
            Tcp::Close => return Err(call.refused("this runtime cannot be told to close TCP connections".into())),
            // Otherwise the dump refuses connections, and the images have none.
            Tcp::Auto if call.skips_in_flight().await => {
                arguments.extend([ESTABLISHED.into(), SKIP_IN_FLIGHT.into()]);
            }
            _ => {}
        }
        arguments.push(id.clone().into());
        let scratch = call.scratch()?;
        let plugin = devices.then(|| DevicePlugin::within(&work)).transpose();
        let plugin = plugin.map_err(|source| call.file("put a plugin into", work.clone(), source))?;
        let mut command = call.command(&scratch, arguments);
        command.envs(plugin.as_ref().map(|plugin| (DevicePlugin::VARIABLE, plugin.folder())));
        let dumped = call.run_command(&scratch, command).await;
        if dumped.is_err() {
            // After the death of the runtime criu may go on; after criu's death the container's
            // network may still be blocked.
            criu::end_orphans(&work, &self.inner.reaper).await;
            criu::unblock_network(init.raw(), &self.inner.reaper).await;
        }
        match dumped {
            Ok(()) => Ok(()),
            Err(error) => Err(call.explained(error, &work.join("dump.log")).await),
        }
    }

    pub(super) async fn restore_now(&self, request: RestoreRequest) -> Result<Child, RuntimeError> {
        let RestoreRequest { id, bundle, images, work, io, no_pivot_root, frozen, allow, timeline, .. } = request;
        let call = self.call(Operation::Restore, &id);
        if self.knows(&call)? {
            return Err(call.refused(format!("container with id {id} exists already")));
        }
        // With a damaged image CRIU would wait for ever, and the runtime too.
        images::check(&images).map_err(criu::RestoreError::Image)?;
        timeline.enter(Phase::Restore);
        let scratch = call.scratch()?;
        let mut arguments: Vec<OsString> = vec!["restore".into(), "--detach".into(), "--bundle".into(), bundle.into()];
        arguments.extend(["--image-path".into(), images.into(), "--work-path".into(), work.clone().into()]);
        if no_pivot_root {
            arguments.push("--no-pivot".into());
        }
        arguments.extend(flags(allow).map(OsString::from));
        if allow.tcp == Tcp::Auto {
            arguments.push(ESTABLISHED.into());
        }
        // crun keeps its own process in the container's cgroup until criu is done. A freeze would
        // catch that process, and crun wait for ever.
        let is_crun = self.inner.binary.file_name().is_some_and(|name| name == "crun");
        let criu_wrapper = (frozen && !is_crun).then_some(work.as_path());
        let restored = match call.process(&scratch, arguments, io, criu_wrapper).await {
            // A container already frozen stays frozen.
            Ok(child) if frozen => {
                let frozen = self
                    .cgroup_now(&id, child.process())
                    .and_then(|cgroup| cgroup.freeze().map_err(|error| call.refused(phase::chain(&error))));
                frozen.map(|()| child)
            }
            restored => restored,
        };
        if restored.is_err() {
            criu::end_orphans(&work, &self.inner.reaper).await;
            criu::remove_cgroup_mounts(&work);
        }
        if restored.is_err()
            && let Err(error) = self.delete_now(&id).await
        {
            tracing::error!(container = id, %error, "cannot undo a restore");
        }
        match restored {
            Ok(child) => {
                timeline.enter(Phase::Resume);
                Ok(child)
            }
            Err(error) => Err(call.explained(error, &work.join("restore.log")).await),
        }
    }
}

/// Returns the flags common to all runtimes and both directions.
fn flags(allow: Allow) -> impl Iterator<Item = &'static str> {
    let flags = [
        (allow.tcp == Tcp::Keep, ESTABLISHED),
        (allow.external_unix_sockets, "--ext-unix-sk"),
        (allow.shell_job, "--shell-job"),
        (true, "--file-locks"),
    ];
    flags.into_iter().filter_map(|(is_set, flag)| is_set.then_some(flag))
}
