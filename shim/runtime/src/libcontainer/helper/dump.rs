//! CRIU's arguments for a running container, in runc's terms: runc can restore our images, and
//! gpusnap runc's.

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

/// Stand-in for a masked file in images.
pub(super) const MASK: &str = "/dev/null";
/// Devices of every container, by the OCI runtime specification.
const DEVICES: [&str; 6] = ["/dev/full", "/dev/null", "/dev/random", "/dev/tty", "/dev/urandom", "/dev/zero"];
/// Largest deleted file kept in the images. CRIU's own limit of 1 MiB refuses everyday cases, such
/// as a rotated log. A bound is needed, because such files are copied byte by byte.
const GHOST_LIMIT: u32 = 1 << 30;

/// Returns the request. The container's processes must stand still, or leave the mounts alone.
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
        sparse: request.sparse.clone(),
        devices: request.devices,
        options: criu_options(request.allow),
    })
}

/// Returns the options common to a dump and a restore.
pub(in crate::libcontainer) fn criu_options(allow: Allow) -> Options {
    Options {
        tcp_established: matches!(allow.tcp, Tcp::Auto | Tcp::Keep),
        tcp_close: allow.tcp == Tcp::Close,
        // Connections still to be accepted are closed like others that lead outside.
        tcp_skip_in_flight: matches!(allow.tcp, Tcp::Auto | Tcp::Close),
        ext_unix_sk: allow.external_unix_sockets,
        shell_job: allow.shell_job,
        file_locks: true,
        link_remap: true,
        ghost_limit: Some(GHOST_LIMIT),
        orphan_pts_master: true,
        // The creator of a container makes its network: hooks, or the CRI.
        empty_network_namespace: true,
        // CRIU blocks a network by four runs of iptables-restore, 70 ms each way, to hide the
        // missing ends of connections for a while. Without surviving connections to the outside
        // nobody would notice.
        network_lock: (allow.tcp != Tcp::Keep).then_some(criu::NetworkLock::Skip),
        manage_cgroups: Some(criu::CgroupMode::Default),
        config_file: Some("/etc/criu/gpusnap.conf".into()),
        ..Options::default()
    }
}

/// Returns the container's cgroup in each hierarchy, wherever init is below.
fn cgroup_roots(place: &Place, init: HostPid) -> Result<Vec<CgroupRoot>> {
    let paths = place.paths_of(init)?.into_iter();
    Ok(paths.map(|(controller, path)| CgroupRoot { controller, path: path.to_string_lossy().into_owned() }).collect())
}

/// Returns the cgroup with the container's freezer.
fn freezer(place: &Place) -> Result<Option<PathBuf>> {
    let directories = place.directories()?;
    let with = |file: &str| directories.iter().find(|directory| directory.join(file).exists()).cloned();
    // With both versions on a machine, libcgroups freezes by v1.
    Ok(with("freezer.state").or_else(|| with("cgroup.freeze")))
}

/// Returns the mounts with contents from outside.
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
            // In their own namespace they are mounts that CRIU can make again.
            bound_cgroups(linux, place, &real)?.iter().for_each(|(path, _)| add(path));
        }
    }
    // With a user namespace, devices are bind mounts. Otherwise there is no mount of this name, and
    // CRIU does not mind.
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

/// Directories of the cgroup that libcontainer has bind-mounted below the container's mount of cgroups at `mount`: the
/// path of each, and the directory. On version 2 only a user namespace without a cgroup namespace has one: the kernel
/// refuses it a mount of its own.
pub(super) fn bound_cgroups(linux: &Linux, place: &Place, mount: &Path) -> Result<Vec<(PathBuf, PathBuf)>> {
    if let Some(directory) = place.v2_directory()? {
        let is_bound = adapt::has_new(linux, LinuxNamespaceType::User) && !has_new_cgroup(linux);
        return Ok(Vec::from_iter(is_bound.then(|| (mount.to_owned(), directory))));
    }
    let directories = place.v1_directories().into_iter();
    Ok(directories.map(|(name, directory)| (mount.join(name), directory)).collect())
}

/// Returns the devices of every container and of this one.
pub(super) fn device_paths(linux: &Linux) -> impl Iterator<Item = &Path> {
    let own = linux.devices().iter().flatten().map(|device| device.path().as_path());
    DEVICES.into_iter().map(Path::new).chain(own)
}

/// Returns whether the container has its own cgroup namespace.
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

/// Returns the source of the masked files in images.
pub(super) fn mask() -> ExternalMount {
    ExternalMount { key: MASK.into(), value: MASK.into() }
}

/// Returns the namespaces shared with others.
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

/// Returns whether CRIU takes a namespace of this kind by a descriptor; others are joined by path.
pub(super) fn is_inherited(kind: Namespace) -> bool {
    matches!(kind, Namespace::Network | Namespace::Pid)
}

/// Returns the namespaces that the specification joins, with their paths.
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
