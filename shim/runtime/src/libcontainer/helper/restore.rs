//! Parts of a restore outside CRIU: state, mount points, cgroup, hooks.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use cgroup::Place;
use criu::{ExternalMount, JoinNamespace, Namespace};
use libcgroups::common::{CgroupManager, ControllerOpt};
use libcontainer::config::YoukiConfig;
use libcontainer::container::{Container, ContainerStatus};
use libcontainer::hooks::run_hooks;
use oci_spec::runtime::{LinuxNamespaceType, LinuxResources, Mount, Spec};
use proc::{HostPid, Identity};

use super::create::check_terminal;
use super::dump::{MASK, bound_cgroups, device_paths, is_bind, is_inherited, joined_namespaces, mask};
use super::error::{Context, Failure, Result};
use super::host_name::HostName;
use super::rootfs::Root;
use super::{Helper, adapt, delete, descriptors, devices, fixup};
use crate::libcontainer::privileges::Allowed;
use crate::libcontainer::protocol::Join;

/// Links of a container's standard streams, as in `/proc/PID/fd`.
#[derive(Clone, Debug, Default)]
pub(in crate::libcontainer) struct Streams {
    /// Links at the dump.
    pub(in crate::libcontainer) dumped: Vec<String>,
    /// Links of the new streams; none with a terminal.
    pub(in crate::libcontainer) new: Vec<String>,
}

/// A complete container except for the processes.
#[derive(Debug)]
pub(in crate::libcontainer) struct Prepared {
    /// The root, in CRIU's form: a mount point.
    pub(in crate::libcontainer) root: PathBuf,
    pub(in crate::libcontainer) external_mounts: Vec<ExternalMount>,
    /// Namespaces joined by CRIU.
    pub(in crate::libcontainer) joined: Vec<JoinNamespace>,
    /// Namespaces inherited by CRIU as descriptors.
    pub(in crate::libcontainer) inherited: Vec<(Namespace, PathBuf)>,
    /// Standard streams at the time of the dump.
    pub(in crate::libcontainer) streams: Vec<String>,
    /// Host name of the joined namespace, to be set again after CRIU's own.
    pub(in crate::libcontainer) host_name: Option<Arc<HostName>>,
    /// Most rights for the processes.
    pub(in crate::libcontainer) allowed: Allowed,
    /// The container's limits.
    pub(in crate::libcontainer) resources: LinuxResources,
    /// The network is new, with the loopback device down.
    pub(in crate::libcontainer) raise_loopback: bool,
    /// Hooks have to run in the container's namespaces.
    pub(in crate::libcontainer) has_hooks: bool,
    /// Future owner of the standard streams, as a host id.
    pub(in crate::libcontainer) uid: u32,
}

/// Makes everything needed before CRIU; undone by [`delete`].
pub(super) fn prepare(helper: &mut Helper, bundle: &Path, images: &Path, terminal: bool) -> Result<Prepared> {
    let mut spec = adapt::load(bundle)?;
    adapt::validate(&spec)?;
    check_terminal(&spec, terminal)?;
    let streams = descriptors::read(images)?;
    // Without pipes a terminal is possible: runc records the streams before the terminal exists.
    if terminal && streams.iter().any(|stream| stream.starts_with("pipe:[")) {
        return Err(Failure::new("the process wants a terminal, but the one in the checkpoint has none"));
    }
    // Before the check of the cgroup, which would find the container's own in use.
    helper.directory.expect_none()?;
    let path = adapt::cgroup_path(adapt::linux(&spec)?, helper.systemd_cgroup, &helper.id);
    let place = Place::new(&path, helper.systemd_cgroup)?;
    if place.is_populated()? {
        return Err(Failure::new(format!("the cgroup {} is in use", path.display())));
    }
    helper.directory.create()?;
    let prepared = (|| {
        let mut container =
            Container::new(&helper.id, ContainerStatus::Creating, None, bundle, helper.directory.path())?;
        container.state.use_systemd = place.is_systemd();
        container.state.annotations = spec.annotations().clone();
        helper.directory.save_state(&container.state)?;
        adapt::for_restore(&mut spec, place.path().to_owned())?;
        helper.directory.save_config(&YoukiConfig::from_spec(&spec, &helper.id)?)?;
        let rootfs = spec.root().as_ref().ok_or_else(|| Failure::new("the specification has no root"))?.path().clone();
        make_mount_points(&spec, &rootfs)?;
        let root = helper.directory.mount_root(&rootfs)?;
        let (inherited, joined) =
            joined_namespaces(&spec)?.into_iter().partition::<Vec<_>, _>(|(kind, _)| is_inherited(*kind));
        let linux = adapt::linux(&spec)?;
        let uid = spec.process().as_ref().map_or(0, |process| process.user().uid());
        let hooks = spec.hooks().as_ref();
        let is_set = |hooks: Option<&Vec<_>>| hooks.is_some_and(|hooks| !hooks.is_empty());
        Ok(Prepared {
            external_mounts: external_mounts(&spec, &place, bundle)?,
            host_name: host_name(&joined)?,
            allowed: allowed(&spec, images)?,
            joined: joined.into_iter().map(|(kind, path)| JoinNamespace { kind, path }).collect(),
            inherited,
            streams,
            resources: linux.resources().clone().unwrap_or_default(),
            raise_loopback: adapt::has_new(linux, LinuxNamespaceType::Network),
            has_hooks: is_set(hooks.and_then(|hooks| hooks.prestart().as_ref()))
                || is_set(hooks.and_then(|hooks| hooks.create_runtime().as_ref())),
            uid: adapt::host_id(linux.uid_mappings().as_deref(), uid),
            root,
        })
    })();
    prepared.inspect_err(|_| {
        if let Err(failure) = delete::delete(helper) {
            tracing::error!("cannot undo the preparation of a restore: {failure}");
        }
    })
}

fn host_name(joined: &[(Namespace, PathBuf)]) -> Result<Option<Arc<HostName>>> {
    let path = joined.iter().find_map(|(kind, path)| (*kind == Namespace::Uts).then_some(path));
    path.map(|path| HostName::of(path).map(Arc::new)).transpose()
}

/// Returns the rights of the new container's processes.
fn allowed(spec: &Spec, images: &Path) -> Result<Allowed> {
    let mut allowed = Allowed::by(spec).context(|| "find what the container may do")?;
    allowed.look_at_filters(images).context(|| "read the seccomp filters of the images")?;
    Ok(allowed)
}

/// Returns the images' mounts, under the names given by [`dump`](super::dump) and runc.
fn external_mounts(spec: &Spec, place: &Place, bundle: &Path) -> Result<Vec<ExternalMount>> {
    let mut mounts = vec![mask()];
    let mut add = |key: &Path, value: &Path| {
        let text = |path: &Path| path.to_string_lossy().into_owned();
        mounts.push(ExternalMount { key: text(key), value: text(value) });
    };
    for mount in spec.mounts().iter().flatten() {
        if is_bind(mount) {
            add(mount.destination(), &bundle.join(source(mount)?));
        } else if mount.typ().as_deref() == Some("cgroup") {
            let bound = bound_cgroups(adapt::linux(spec)?, place, mount.destination())?;
            bound.iter().for_each(|(path, directory)| add(path, directory));
        }
    }
    // crun's name for a masked file is its place.
    for masked in adapt::linux(spec)?.masked_paths().iter().flatten() {
        add(Path::new(masked), Path::new(MASK));
    }
    for device in device_paths(adapt::linux(spec)?) {
        add(device, device);
    }
    Ok(mounts)
}

fn source(mount: &Mount) -> Result<&PathBuf> {
    let missing = || Failure::new(format!("the mount at {} has no source", mount.destination().display()));
    mount.source().as_ref().ok_or_else(missing)
}

/// Makes missing files and directories for CRIU's mounts in the new container's root. CRIU makes
/// those in filesystems that it fills.
fn make_mount_points(spec: &Spec, rootfs: &Path) -> Result<()> {
    let root = Root::open(rootfs)?;
    let owner = adapt::host_root(adapt::linux(spec)?);
    let mounts: Vec<&Mount> = spec.mounts().iter().flatten().collect();
    for (index, mount) in mounts.iter().enumerate() {
        let destination = mount.destination();
        let is_file = is_bind(mount) && source(mount)?.is_file();
        let over = mounts[..index]
            .iter()
            .rfind(|over| destination.starts_with(over.destination()) && over.destination() != Path::new("/"));
        let make = |root: &Root, path: &Path| match is_file {
            true => root.make_file(path, owner),
            false => root.make_directory(path, owner),
        };
        match over {
            None => make(&root, destination)?,
            Some(over) if is_bind(over) && over.destination() != destination => {
                let inner = destination.strip_prefix(over.destination()).unwrap_or(destination);
                // A mounted file has nothing below.
                if source(over)?.is_dir() {
                    make(&Root::open(source(over)?)?, inner)?;
                }
            }
            Some(_) => {}
        }
    }
    Ok(())
}

/// Makes the cgroup with its limits, and moves criu inside, so that all forks of criu are inside.
pub(super) fn join(helper: &Helper, join: &Join) -> Result<()> {
    let place = helper.place()?;
    let manager = super::cgroup::manager(&place, &helper.id)?;
    let path = place.path().display();
    // The type comes from libcgroups' own version of nix.
    let mut container = Container::default();
    let criu = container.set_pid(join.pid.raw()).pid().ok_or_else(|| Failure::new("criu has no pid"))?;
    manager.add_task(criu).context(|| format!("put criu into the cgroup {path}"))?;
    let options = ControllerOpt {
        resources: &join.resources,
        disable_oom_killer: false,
        oom_score_adj: None,
        freezer_state: None,
    };
    manager.apply(&options).context(|| format!("set the limits of the cgroup {path}"))?;
    place.adopt_into_the_rest(join.pid)?;
    if place.is_v2() {
        for directory in place.directories()? {
            devices::confine(&directory, join.resources.devices().as_deref().unwrap_or_default())?;
        }
    }
    Ok(())
}

/// Prepares the container's namespaces while empty. Hooks make the network, as with runc at this
/// stage; without hooks, [`fixup`] treats a new network.
pub(super) fn set_up(helper: &Helper, pid: HostPid, raise_loopback: bool) -> Result<()> {
    let mut state = helper.directory.state()?;
    state.pid = Some(pid.raw());
    if raise_loopback {
        fixup::raise_loopback(pid)?;
    }
    let Some(hooks) = helper.directory.config()?.hooks else { return Ok(()) };
    let run = |hooks: Option<&Vec<_>>| run_hooks(hooks, Some(&state), None, None, None);
    run(hooks.prestart().as_ref()).context(|| "run the prestart hooks")?;
    run(hooks.create_runtime().as_ref()).context(|| "run the createRuntime hooks")
}

/// Completes the container: from now on like any other.
pub(super) fn finish(helper: &Helper, pid: HostPid, streams: &Streams) -> Result<()> {
    let died = || Failure::new("the container's init died while it was restored");
    let init = Identity::of_living(pid).context(|| "look at the restored init")?.ok_or_else(died)?;
    descriptors::note_restored(&streams.dumped, &streams.new, helper.directory.path())?;
    helper.directory.save_init(init)?;
    let mut state = helper.directory.state()?;
    state.status = ContainerStatus::Running;
    state.pid = Some(pid.raw());
    state.creator = Some(rustix::process::geteuid().as_raw());
    helper.directory.save_state(&state)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use oci_spec::runtime::{LinuxBuilder, MountBuilder, RootBuilder, SpecBuilder};

    use super::*;

    #[test]
    fn mount_points_are_made_where_they_will_be_seen() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::create_dir_all(path("root")).unwrap();
        fs::create_dir_all(path("volume")).unwrap();
        fs::write(path("file"), "").unwrap();
        let mount = |kind: &str, source: PathBuf, destination: &str| {
            MountBuilder::default().typ(kind).source(source).destination(destination).build().unwrap()
        };
        let spec = SpecBuilder::default()
            .root(RootBuilder::default().path(path("root")).build().unwrap())
            .linux(LinuxBuilder::default().build().unwrap())
            .mounts(vec![
                mount("proc", "proc".into(), "/proc"),
                mount("tmpfs", "tmpfs".into(), "/dev"),
                mount("tmpfs", "shm".into(), "/dev/shm"),
                mount("bind", path("file"), "/etc/hosts"),
                mount("bind", path("volume"), "/data"),
                mount("bind", path("file"), "/data/inner/file"),
            ])
            .build()
            .unwrap();
        make_mount_points(&spec, &path("root")).unwrap();
        assert!(path("root/proc").is_dir());
        assert!(path("root/dev").is_dir());
        assert!(!path("root/dev/shm").exists());
        assert!(path("root/etc/hosts").is_file());
        assert!(path("volume/inner/file").is_file());
        assert!(!path("root/data/inner").exists());
        // Existing files stay.
        fs::write(path("root/etc/hosts"), "kept").unwrap();
        make_mount_points(&spec, &path("root")).unwrap();
        assert_eq!(fs::read_to_string(path("root/etc/hosts")).unwrap(), "kept");
    }
}
