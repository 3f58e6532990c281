//! Steps missing from libcontainer's creation, done from outside before the start, while no user
//! code runs in the container.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use libcontainer::network::link::LinkClient;
use libcontainer::network::wrapper::create_network_client;
use oci_spec::runtime::{Linux, LinuxNamespaceType, Mount, Spec};
use proc::HostPid;
use rustix::fs::{Mode, OFlags};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::error::{Context, Failure, Result};
use super::launch::give;
use super::rootfs::Root;
use super::v1_mounts::Written;
use super::{adapt, sys};

/// Changes to the mount at one place in the container.
#[derive(Debug, PartialEq, Eq)]
struct MountFixup {
    destination: PathBuf,
    propagation: Option<Propagation>,
    attributes: Option<Attributes>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Propagation {
    /// `MS_PRIVATE` and so on.
    kind: u64,
    recursive: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Attributes {
    /// Additional `MOUNT_ATTR_*`.
    added: u64,
    recursive: bool,
}

/// Finishes a container with a waiting init.
pub(super) fn finish(spec: &Spec, cgroups: &[Written], init: HostPid, terminal: bool) -> Result<()> {
    if terminal {
        let uid = spec.process().as_ref().map_or(0, |process| process.user().uid());
        give_terminal(init, adapt::host_id(adapt::linux(spec)?.uid_mappings().as_deref(), uid))?;
    }
    if adapt::has_new(adapt::linux(spec)?, LinuxNamespaceType::Network) {
        raise_loopback(init)?;
    }
    let fixups: Vec<MountFixup> =
        cgroups.iter().map(cgroup_fixup).chain(spec.mounts().iter().flatten().filter_map(mount_fixup)).collect();
    let directories = device_directories(adapt::linux(spec)?);
    if fixups.is_empty() && directories.is_empty() {
        return Ok(());
    }
    inside(init, || {
        let root = Root::open(Path::new("/"))?;
        directories.iter().try_for_each(|directory| protect(&root, directory))?;
        cgroups.iter().try_for_each(|cgroup| link_controllers(&root, cgroup))?;
        fixups.iter().try_for_each(|fixup| fixup.apply(&root))
    })
}

/// Returns the directories between `/dev` and the devices inside, like `/dev/net`.
fn device_directories(linux: &Linux) -> BTreeSet<PathBuf> {
    let dev = Path::new("/dev");
    let devices = linux.devices().iter().flatten();
    devices
        .flat_map(|device| device.path().ancestors().skip(1))
        .filter(|directory| directory.starts_with(dev) && *directory != dev)
        .map(Path::to_owned)
        .collect()
}

/// Protects a device directory: libcontainer makes it with a mask of 0.
fn protect(root: &Root, directory: &Path) -> Result<()> {
    let action = || format!("protect {}", directory.display());
    let fd = match root.resolve(directory, OFlags::RDONLY | OFlags::DIRECTORY) {
        Ok(fd) => fd,
        // A mount or a link may be in the way: not libcontainer's directory.
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => return Ok(()),
        Err(error) => return Err(Failure::because(action(), &error)),
    };
    let mode = rustix::fs::fstat(&fd).context(action)?.st_mode & 0o7777;
    if mode == 0o777 {
        rustix::fs::fchmod(&fd, Mode::from_raw_mode(0o755)).context(action)?;
    }
    Ok(())
}

/// Gives the process's terminal to its user.
pub(super) fn give_terminal(pid: HostPid, uid: u32) -> Result<()> {
    let path = pid.path("fd/0");
    let terminal = rustix::fs::open(&path, OFlags::RDONLY | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())
        .context(|| format!("open {}", path.display()))?;
    give(terminal.as_fd(), uid)
}

/// Links each controller by name, also in a shared hierarchy: programs look for the name.
fn link_controllers(root: &Root, cgroup: &Written) -> Result<()> {
    let action = || format!("link the controllers at {}", cgroup.destination.display());
    if cgroup.links.is_empty() {
        return Ok(());
    }
    let folder = root.resolve(&cgroup.destination, OFlags::PATH | OFlags::DIRECTORY).context(action)?;
    for (link, target) in &cgroup.links {
        match rustix::fs::symlinkat(target, &folder, link) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(error).context(action),
        }
    }
    Ok(())
}

/// Returns the fixup of a cgroup mount: the container's root must not raise its own limits.
fn cgroup_fixup(cgroup: &Written) -> MountFixup {
    let read_only = if cgroup.read_only { libc::MOUNT_ATTR_RDONLY } else { 0 };
    let always = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
    MountFixup {
        destination: cgroup.destination.clone(),
        propagation: None,
        attributes: Some(Attributes { added: always | read_only, recursive: true }),
    }
}

/// Returns the fixup of a mount. libcontainer parses propagation options without applying them, and
/// mounts `/dev` writable whatever the options.
fn mount_fixup(mount: &Mount) -> Option<MountFixup> {
    let options = mount.options().as_deref().unwrap_or_default();
    let propagation = options.iter().rev().find_map(|option| propagation(option));
    let read_only = options.iter().rev().find_map(|option| match option.as_str() {
        "ro" => Some(libc::MOUNT_ATTR_RDONLY),
        "rw" => Some(0),
        _ => None,
    });
    let attributes = if mount.destination() == Path::new("/dev") && read_only == Some(libc::MOUNT_ATTR_RDONLY) {
        Some(Attributes { added: libc::MOUNT_ATTR_RDONLY, recursive: false })
    } else {
        None
    };
    (propagation.is_some() || attributes.is_some()).then(|| MountFixup {
        destination: mount.destination().clone(),
        propagation,
        attributes,
    })
}

fn propagation(option: &str) -> Option<Propagation> {
    let (option, recursive) = match option.strip_prefix('r') {
        Some(rest) => (rest, true),
        None => (option, false),
    };
    let kind = match option {
        "private" => libc::MS_PRIVATE,
        "shared" => libc::MS_SHARED,
        "slave" => libc::MS_SLAVE,
        "unbindable" => libc::MS_UNBINDABLE,
        _ => return None,
    };
    Some(Propagation { kind, recursive })
}

impl MountFixup {
    fn apply(&self, root: &Root) -> Result<()> {
        let action = || format!("finish the mount at {}", self.destination.display());
        let mount = match root.resolve(&self.destination, OFlags::PATH) {
            Ok(mount) => mount,
            // A later mount hides it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(Failure::because(action(), &error)),
        };
        if let Some(Propagation { kind, recursive }) = self.propagation {
            sys::set_propagation(mount.as_fd(), recursive, kind).context(action)?;
        }
        if let Some(Attributes { added, recursive }) = self.attributes {
            sys::add_mount_attributes(mount.as_fd(), recursive, added).context(action)?;
        }
        Ok(())
    }
}

/// Raises the loopback device of a new network namespace, which starts down. In an older namespace
/// the loopback is its creator's business.
pub(super) fn raise_loopback(init: HostPid) -> Result<()> {
    /// The first device of every network namespace.
    const LOOPBACK: u32 = 1;
    let target = namespace(init, "net")?;
    let own = namespace(HostPid::own(), "net")?;
    let enter = |namespace: &File| move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network));
    enter(&target).context(|| "enter the container's network namespace")?;
    let result = LinkClient::new(create_network_client()).and_then(|mut client| client.set_up(LOOPBACK));
    enter(&own).context(|| "leave the container's network namespace")?;
    result.context(|| "bring up the loopback device")
}

fn namespace(pid: HostPid, name: &str) -> Result<File> {
    let path = pid.path(&format!("ns/{name}"));
    File::open(&path).context(|| format!("open {}", path.display()))
}

/// Runs `work` in the mount namespace of a process, with its root as root, and comes back.
fn inside<T>(pid: HostPid, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let target = namespace(pid, "mnt")?;
    let own = namespace(HostPid::own(), "mnt")?;
    // The namespace alone would lead back to its own root, possibly not this process's.
    let root = rustix::fs::open("/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .context(|| "open the root")?;
    let enter = |namespace: &File| move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Mount));

    enter(&target).context(|| "enter the container's mount namespace")?;
    let result = work();
    enter(&own)
        .and_then(|()| rustix::process::fchdir(&root))
        .and_then(|()| rustix::process::chroot("."))
        .context(|| "leave the container's mount namespace")?;
    result
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::{LinuxBuilder, LinuxDeviceBuilder, MountBuilder};

    use super::*;

    fn fixup(kind: &str, destination: &str, options: &[&str]) -> Option<MountFixup> {
        let options = options.iter().map(|&option| option.to_owned()).collect::<Vec<_>>();
        let mount = MountBuilder::default().typ(kind).destination(destination).options(options).build().unwrap();
        mount_fixup(&mount)
    }

    #[test]
    fn the_last_propagation_option_counts() {
        let fixup = fixup("bind", "/data", &["rbind", "rshared", "ro", "rprivate", "nosuid"]).unwrap();
        assert_eq!(fixup.propagation, Some(Propagation { kind: libc::MS_PRIVATE, recursive: true }));
        assert_eq!(fixup.attributes, None);
    }

    #[test]
    fn ordinary_mounts_need_no_fixup() {
        assert_eq!(fixup("proc", "/proc", &["nosuid", "noexec", "nodev"]), None);
        assert_eq!(fixup("tmpfs", "/tmp", &["ro", "relatime", "rnoexec"]), None);
        assert_eq!(fixup("bind", "/data", &["rbind", "ro"]), None);
    }

    #[test]
    fn cgroups_of_v1_are_as_safe_as_asked_for_throughout() {
        let always = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
        let attributes = |read_only| {
            let written = Written { destination: "/sys/fs/cgroup".into(), read_only, links: vec![] };
            cgroup_fixup(&written).attributes.unwrap()
        };
        assert_eq!(attributes(true), Attributes { added: always | libc::MOUNT_ATTR_RDONLY, recursive: true });
        assert_eq!(attributes(false), Attributes { added: always, recursive: true });
    }

    #[test]
    fn directories_of_devices_are_those_below_dev() {
        let device = |path: &str| LinuxDeviceBuilder::default().path(path).build().unwrap();
        let devices = vec![device("/dev/a"), device("/dev/net/tun"), device("/dev/b/c/d"), device("/x/y/z")];
        let linux = LinuxBuilder::default().devices(devices).build().unwrap();
        let directories: Vec<PathBuf> = device_directories(&linux).into_iter().collect();
        assert_eq!(directories, ["/dev/b", "/dev/b/c", "/dev/net"].map(PathBuf::from));
    }

    #[test]
    fn dev_becomes_read_only_when_the_devices_are_there() {
        let read_only = Attributes { added: libc::MOUNT_ATTR_RDONLY, recursive: false };
        assert_eq!(fixup("tmpfs", "/dev", &["ro"]).unwrap().attributes, Some(read_only));
        assert_eq!(fixup("tmpfs", "/dev", &["strictatime"]), None);
    }
}
