//! What CRIU is told about a running container, in the terms in which runc tells it: images made here can be restored
//! by runc, and the other way round.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use cgroup::Place;
use criu::{CgroupRoot, DumpRequest, External, ExternalMount, Namespace, Options};
use libcontainer::container::ContainerStatus;
use oci_spec::runtime::{Linux, LinuxNamespaceType, Spec};
use proc::HostPid;
use rustix::fs::OFlags;

use super::error::{Context, Failure, Result};
use super::rootfs::Root;
use super::{Helper, adapt, descriptors};
use crate::{Allow, CheckpointRequest, Tcp};

/// What stands for a masked file in images.
pub(super) const MASK: &str = "/dev/null";
/// What the OCI runtime specification gives to every container.
const DEVICES: [&str; 6] = ["/dev/full", "/dev/null", "/dev/random", "/dev/tty", "/dev/urandom", "/dev/zero"];
/// Largest deleted file that is kept in the images. CRIU's own limit of 1 MiB refuses what programs do every day, a
/// log that was rotated away; a bound it needs, because such files are copied byte by byte.
const GHOST_LIMIT: u32 = 1 << 30;

/// Has to be called while the container's processes stand still or do nothing to its mounts.
pub(super) fn request(helper: &Helper, request: &CheckpointRequest) -> Result<DumpRequest> {
    let allowed = [ContainerStatus::Running, ContainerStatus::Paused];
    let (state, init) = helper.directory.expect("checkpoint", &allowed)?;
    if init.pid != request.init {
        return Err(Failure::new(format!("its init is process {}, and not {}", init.pid, request.init)));
    }
    let spec = adapt::load(&state.bundle)?;
    let place = helper.place()?;
    let root = Root::open(Path::new(&format!("/proc/{}/root", init.pid)))?;
    descriptors::copy(helper.directory.path(), &request.images)?;
    let mut external = external_namespaces(&spec)?;
    for path in &request.external_files {
        let file = File::open(path).and_then(|file| External::of_file(&file));
        external.push(file.context(|| format!("tell CRIU of {}", path.display()))?);
    }
    Ok(DumpRequest {
        pid: init.pid.raw(),
        images_dir: request.images.clone(),
        work_dir: Some(request.work.clone()),
        root: spec.root().as_ref().map(|root| root.path().clone()),
        leave_running: request.leave_running,
        freeze_cgroup: freezer(&place)?,
        cgroup_roots: cgroup_roots(&place, init.pid)?,
        external_mounts: external_mounts(&spec, &place, &root)?,
        external,
        options: criu_options(request.allow),
        ..DumpRequest::default()
    })
}

/// What a dump and a restore have in common.
pub(in crate::libcontainer) fn criu_options(allow: Allow) -> Options {
    Options {
        tcp_established: allow.tcp == Tcp::Keep,
        tcp_close: allow.tcp == Tcp::Close,
        // What nobody has accepted yet is closed like the rest.
        tcp_skip_in_flight: allow.tcp == Tcp::Close,
        ext_unix_sk: allow.external_unix_sockets,
        shell_job: allow.shell_job,
        file_locks: true,
        link_remap: true,
        ghost_limit: Some(GHOST_LIMIT),
        orphan_pts_master: true,
        // A network is made by whoever makes the container: hooks, or the CRI.
        empty_network_namespace: true,
        // CRIU blocks a network by running iptables-restore four times, 70 ms each way, so that nobody notices that the
        // ends of connections are gone for a while. Where none survives there is nobody.
        network_lock: (allow.tcp != Tcp::Keep).then_some(criu::NetworkLock::Skip),
        manage_cgroups: Some(criu::CgroupMode::Default),
        config_file: Some("/etc/criu/gpusnap.conf".into()),
        ..Options::default()
    }
}

/// The container's cgroup in each hierarchy, wherever init is below it.
fn cgroup_roots(place: &Place, init: HostPid) -> Result<Vec<CgroupRoot>> {
    let paths = place.paths_of(init)?.into_iter();
    Ok(paths.map(|(controller, path)| CgroupRoot { controller, path: path.to_string_lossy().into_owned() }).collect())
}

/// The cgroup by which the container is frozen.
fn freezer(place: &Place) -> Result<Option<PathBuf>> {
    let directories = place.directories()?;
    let with = |file: &str| directories.iter().find(|directory| directory.join(file).exists()).cloned();
    // On a machine with both, libcgroups freezes by v1.
    Ok(with("freezer.state").or_else(|| with("cgroup.freeze")))
}

/// Mounts whose contents come from outside.
fn external_mounts(spec: &Spec, place: &Place, root: &Root) -> Result<Vec<ExternalMount>> {
    let mut mounts = Vec::new();
    let mut add = |path: &Path| {
        let path = path.to_string_lossy().into_owned();
        mounts.push(ExternalMount { key: path.clone(), value: path });
    };
    let linux = adapt::linux(spec)?;
    for mount in spec.mounts().iter().flatten() {
        let destination = mount.destination();
        let real =
            root.real_path(destination).context(|| format!("find {} in the container", destination.display()))?;
        if is_bind(mount) {
            add(&real);
        } else if mount.typ().as_deref() == Some("cgroup") && !has_new_cgroup(linux) {
            // In a namespace of their own they are mounts that CRIU can make again.
            place.v1_directories().iter().for_each(|(name, _)| add(&real.join(name)));
        }
    }
    // With a user namespace they are bind mounts. Otherwise there is no mount of this name, which CRIU does not mind.
    device_paths(linux).for_each(&mut add);
    for masked in linux.masked_paths().iter().flatten() {
        let path = Path::new(masked);
        match root.resolve(path, OFlags::PATH) {
            Ok(file) if is_directory(&file)? => {}
            Ok(_) => mounts.push(ExternalMount { key: masked.clone(), value: MASK.into() }),
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {}
            Err(error) => return Err(Failure::because(format!("find {masked} in the container"), &error)),
        }
    }
    Ok(mounts)
}

/// Devices of every container and those of this one.
pub(super) fn device_paths(linux: &Linux) -> impl Iterator<Item = &Path> {
    let own = linux.devices().iter().flatten().map(|device| device.path().as_path());
    DEVICES.into_iter().map(Path::new).chain(own)
}

/// The container has a cgroup namespace of its own.
fn has_new_cgroup(linux: &Linux) -> bool {
    let namespaces = linux.namespaces().iter().flatten();
    namespaces.into_iter().any(|namespace| namespace.typ() == LinuxNamespaceType::Cgroup)
}

pub(super) fn is_bind(mount: &oci_spec::runtime::Mount) -> bool {
    mount.typ().as_deref() == Some("bind")
        || mount.options().iter().flatten().any(|option| option == "bind" || option == "rbind")
}

fn is_directory(file: impl std::os::fd::AsFd) -> Result<bool> {
    let stat = rustix::fs::fstat(file).context(|| "look at a masked path")?;
    Ok(rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::Directory)
}

/// Where the masked files of an image come from.
pub(super) fn mask() -> ExternalMount {
    ExternalMount { key: MASK.into(), value: MASK.into() }
}

/// Namespaces of others in which the container is.
fn external_namespaces(spec: &Spec) -> Result<Vec<External>> {
    let mut external = Vec::new();
    for (kind, path) in joined_namespaces(spec)? {
        if is_inherited(kind) {
            let inode = std::fs::metadata(&path).context(|| format!("look at {}", path.display()))?.ino();
            external.push(External::Namespace { kind, inode });
        }
    }
    Ok(external)
}

/// CRIU takes these by a descriptor; others are joined by their path.
pub(super) fn is_inherited(kind: Namespace) -> bool {
    matches!(kind, Namespace::Network | Namespace::Pid)
}

/// The namespaces that the specification takes from somewhere, with their paths.
pub(super) fn joined_namespaces(spec: &Spec) -> Result<Vec<(Namespace, PathBuf)>> {
    let namespaces = adapt::linux(spec)?.namespaces().iter().flatten();
    Ok(namespaces
        .filter_map(|namespace| {
            let path = namespace.path().clone().filter(|path| !path.as_os_str().is_empty())?;
            Some((kind(namespace.typ()), path))
        })
        .collect())
}

fn kind(kind: LinuxNamespaceType) -> Namespace {
    match kind {
        LinuxNamespaceType::Mount => Namespace::Mount,
        LinuxNamespaceType::Cgroup => Namespace::Cgroup,
        LinuxNamespaceType::Uts => Namespace::Uts,
        LinuxNamespaceType::Ipc => Namespace::Ipc,
        LinuxNamespaceType::User => Namespace::User,
        LinuxNamespaceType::Pid => Namespace::Pid,
        LinuxNamespaceType::Network => Namespace::Network,
        LinuxNamespaceType::Time => Namespace::Time,
    }
}
