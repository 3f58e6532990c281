//! What libcontainer leaves undone in a new container, done from outside between its creation and its start, when
//! nothing of the user's runs in it.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Mount, Spec};
use rustix::fs::{Mode, OFlags};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::error::{Context, Failure, Result};
use super::launch::give;
use super::rootfs::Root;
use super::{adapt, sys};

/// What is to be done to the mount at one place in the container.
#[derive(Debug, PartialEq, Eq)]
struct MountFixup {
    destination: PathBuf,
    propagation: Option<Propagation>,
    read_only: Option<ReadOnly>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Propagation {
    /// `MS_PRIVATE` and so on.
    kind: u64,
    recursive: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ReadOnly {
    /// The mount.
    Itself,
    /// It and all below it.
    AllBelow,
}

/// Finishes a container whose init waits.
pub(super) fn finish(spec: &Spec, cgroup_v2: bool, init: i32, terminal: bool) -> Result<()> {
    if terminal {
        let uid = spec.process().as_ref().map_or(0, |process| process.user().uid());
        give_terminal(init, adapt::host_id(adapt::linux(spec)?.uid_mappings().as_deref(), uid))?;
    }
    let fixups: Vec<MountFixup> =
        spec.mounts().iter().flatten().filter_map(|mount| mount_fixup(mount, cgroup_v2)).collect();
    if fixups.is_empty() {
        return Ok(());
    }
    inside(init, || fixups.iter().try_for_each(|fixup| fixup.apply()))
}

/// Gives the process's terminal to the user who is to use it.
pub(super) fn give_terminal(pid: i32, uid: u32) -> Result<()> {
    let path = format!("/proc/{pid}/fd/0");
    let terminal = rustix::fs::open(&path, OFlags::RDONLY | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())
        .context(|| format!("open {path}"))?;
    give(terminal.as_fd(), uid)
}

/// libcontainer parses propagation options, but does not apply them. It mounts `/dev` and the v1 hierarchies writable
/// whatever the options say, and for v1 that would let the container's root raise its own limits.
fn mount_fixup(mount: &Mount, cgroup_v2: bool) -> Option<MountFixup> {
    let options = mount.options().as_deref().unwrap_or_default();
    let propagation = options.iter().rev().find_map(|option| propagation(option));
    let is_read_only = options.iter().rev().find_map(|option| match option.as_str() {
        "ro" => Some(true),
        "rw" => Some(false),
        _ => None,
    });
    let read_only = match is_read_only {
        Some(true) if mount.typ().as_deref() == Some("cgroup") && !cgroup_v2 => Some(ReadOnly::AllBelow),
        Some(true) if mount.destination() == Path::new("/dev") => Some(ReadOnly::Itself),
        _ => None,
    };
    (propagation.is_some() || read_only.is_some()).then(|| MountFixup {
        destination: mount.destination().clone(),
        propagation,
        read_only,
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
    fn apply(&self) -> Result<()> {
        let root = Root::open(Path::new("/"))?;
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
        if let Some(read_only) = self.read_only {
            sys::make_read_only(mount.as_fd(), read_only == ReadOnly::AllBelow).context(action)?;
        }
        Ok(())
    }
}

/// Does something in the mount namespace of a process, with its root as root, and comes back.
fn inside<T>(pid: i32, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let namespace = |pid: &str| {
        let path = format!("/proc/{pid}/ns/mnt");
        File::open(&path).context(|| format!("open {path}"))
    };
    let target = namespace(&pid.to_string())?;
    let own = namespace("self")?;
    // Coming back by namespace alone would lead to the namespace's root, which need not have been this process's.
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
    use oci_spec::runtime::MountBuilder;

    use super::*;

    fn fixup(kind: &str, destination: &str, options: &[&str]) -> Option<MountFixup> {
        let options = options.iter().map(|&option| option.to_owned()).collect::<Vec<_>>();
        let mount = MountBuilder::default().typ(kind).destination(destination).options(options).build().unwrap();
        mount_fixup(&mount, false)
    }

    #[test]
    fn the_last_propagation_option_counts() {
        let fixup = fixup("bind", "/data", &["rbind", "rshared", "ro", "rprivate", "nosuid"]).unwrap();
        assert_eq!(fixup.propagation, Some(Propagation { kind: libc::MS_PRIVATE, recursive: true }));
        assert_eq!(fixup.read_only, None);
    }

    #[test]
    fn ordinary_mounts_need_no_fixup() {
        assert_eq!(fixup("proc", "/proc", &["nosuid", "noexec", "nodev"]), None);
        assert_eq!(fixup("tmpfs", "/tmp", &["ro", "relatime", "rnoexec"]), None);
        assert_eq!(fixup("bind", "/data", &["rbind", "ro"]), None);
    }

    #[test]
    fn read_only_cgroups_of_v1_are_read_only_throughout() {
        assert_eq!(fixup("cgroup", "/sys/fs/cgroup", &["ro"]).unwrap().read_only, Some(ReadOnly::AllBelow));
        assert_eq!(fixup("cgroup", "/sys/fs/cgroup", &["ro", "rw"]), None);
        assert_eq!(fixup("tmpfs", "/dev", &["ro"]).unwrap().read_only, Some(ReadOnly::Itself));
    }
}
