//! Root filesystems with the users of a user namespace as owners.
//!
//! A snapshotter keeps files as in the image; the options `uidmap=` and `gidmap=` ask the shim to
//! show other owners. The options are containerd's own: the kernel wants an id-mapped mount. An
//! overlay cannot be mapped, but the lower folders can:
//!
//! ```text
//!   lower folder ── clone of its mount ── map_ids ──► FOLDER/0 ──┐
//!   lower folder ── clone of its mount ── map_ids ──► FOLDER/1 ──┴─► overlay, with clones of its own of these mounts
//! ```
//!
//! The upper folder is not mapped: its files have the container's host ids.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use containerd_shim_protos::types::mount::Mount;
use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags};
use rustix::process::{Pid, Signal};
use tempfile::TempDir;

use super::{RootfsError, mount_plainly};
use crate::sys;

const USERS: &str = "uidmap";
const GROUPS: &str = "gidmap";
const LOWER: &str = "lowerdir=";
/// Parent of the folder for mapped lower folders. Every shim has it, on a tmpfs as a rule.
const FOLDER: &str = "/run/containerd/gpusnap";

/// Ids of a user namespace, in the format of `uid_map` and `gid_map`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct IdMap {
    users: String,
    groups: String,
}

impl IdMap {
    /// Splits mount options into the mapping and the rest.
    pub(super) fn take(options: &[String]) -> Result<(Option<Self>, Vec<String>), RootfsError> {
        let (mut users, mut groups, mut others) = (None, None, Vec::new());
        for option in options {
            match option.split_once('=') {
                Some((USERS, ranges)) => users = Some(parse(USERS, option, ranges)?),
                Some((GROUPS, ranges)) => groups = Some(parse(GROUPS, option, ranges)?),
                _ => others.push(option.clone()),
            }
        }
        match (users, groups) {
            (Some(users), Some(groups)) => Ok((Some(Self { users, groups }), others)),
            (None, None) => Ok((None, others)),
            _ => Err(RootfsError::HalfAnIdMap),
        }
    }

    /// Makes a user namespace with these ids, by a short-lived process. The descriptor keeps the
    /// namespace.
    fn namespace(&self) -> Result<OwnedFd, RootfsError> {
        let pid = sys::spawn_in_user_namespace().map_err(RootfsError::Start)?;
        let made = self.namespace_of(pid);
        if let Some(pid) = Pid::from_raw(pid)
            && let Err(error) = rustix::process::kill_process(pid, Signal::KILL)
        {
            tracing::warn!("process {pid} of a user namespace is left: {error}");
        }
        made
    }

    fn namespace_of(&self, pid: i32) -> Result<OwnedFd, RootfsError> {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        for (name, ids) in [("uid_map", &self.users), ("gid_map", &self.groups)] {
            fs::write(proc.join(name), ids).map_err(file("write", &proc.join(name)))?;
        }
        let path = proc.join("ns/user");
        Ok(fs::File::open(&path).map_err(file("open", &path))?.into())
    }
}

/// Turns `0:100000:65536,...` into a line for each range.
fn parse(name: &'static str, option: &str, ranges: &str) -> Result<String, RootfsError> {
    let wrong = || RootfsError::IdMap { option: option.to_owned(), name };
    let mut lines = String::new();
    for range in ranges.split(',') {
        let ids: Result<Vec<u32>, _> = range.split(':').map(str::parse).collect();
        let Ok([inside, outside, length]) = ids.map_err(|_| wrong())?[..].try_into().map(|ids: [u32; 3]| ids) else {
            return Err(wrong());
        };
        lines.push_str(&format!("{inside} {outside} {length}\n"));
    }
    Ok(lines)
}

fn file(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> RootfsError + use<> {
    let path = path.to_owned();
    move |source| RootfsError::File { action, path, source }
}

/// Mounts `mount` on `target`, with `options`, the mount's own without the mapping.
pub(super) fn mount(mount: &Mount, mut options: Vec<String>, map: &IdMap, target: &Path) -> Result<(), RootfsError> {
    let namespace = map.namespace()?;
    if mount.type_ != "overlay" {
        mount_plainly(mount, &options, target)?;
        let mapped = mapped(target, &namespace)?;
        rustix::mount::unmount(target, UnmountFlags::DETACH).map_err(|error| file("unmount", target)(error.into()))?;
        return attach(&mapped, target);
    }
    let mut folders = MappedFolders::new()?;
    for option in &mut options {
        if let Some(lower) = option.strip_prefix(LOWER) {
            let mapped: Result<Vec<String>, RootfsError> =
                lower.split(':').map(|lower| folders.add(Path::new(lower), &namespace)).collect();
            *option = format!("{LOWER}{}", mapped?.join(":"));
        }
    }
    Ok(mount_plainly(mount, &options, target)?)
}

/// Returns a detached clone of the mount at `path`, with other owners.
fn mapped(path: &Path, namespace: &OwnedFd) -> Result<OwnedFd, RootfsError> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = rustix::mount::open_tree(CWD, path, flags);
    let tree = tree.map_err(|error| file("clone the mount of", path)(error.into()))?;
    sys::map_ids(tree.as_fd(), namespace.as_fd()).map_err(file("map the ids of files in", path))?;
    Ok(tree)
}

fn attach(mount: &OwnedFd, target: &Path) -> Result<(), RootfsError> {
    let attached = rustix::mount::move_mount(mount, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH);
    attached.map_err(|error| file("mount on", target)(error.into()))
}

/// Lower folders with other owners, during the mount of an overlay.
struct MappedFolders {
    folder: TempDir,
    mounted: Vec<PathBuf>,
}

impl MappedFolders {
    fn new() -> Result<Self, RootfsError> {
        let parent = Path::new(FOLDER);
        let made =
            fs::create_dir_all(parent).and_then(|()| tempfile::Builder::new().prefix("lower-").tempdir_in(parent));
        Ok(Self { folder: made.map_err(file("make a folder in", parent))?, mounted: Vec::new() })
    }

    /// Adds a lower folder; returns the path for the overlay.
    fn add(&mut self, lower: &Path, namespace: &OwnedFd) -> Result<String, RootfsError> {
        let path = self.folder.path().join(self.mounted.len().to_string());
        let mapped = mapped(lower, namespace)?;
        fs::create_dir(&path).map_err(file("make", &path))?;
        attach(&mapped, &path)?;
        let text = path.to_string_lossy().into_owned();
        self.mounted.push(path);
        Ok(text)
    }
}

impl Drop for MappedFolders {
    fn drop(&mut self) {
        // A folder still mounted must not be removed: its files are the image's.
        for path in &self.mounted {
            if let Err(error) = rustix::mount::unmount(path, UnmountFlags::DETACH) {
                tracing::error!("cannot unmount {}, which stays: {error}", path.display());
                self.folder.disable_cleanup(true);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn options(options: &[&str]) -> Vec<String> {
        options.iter().map(|option| (*option).to_owned()).collect()
    }

    #[test]
    fn a_mapping_is_taken_out_of_the_options() {
        let (map, others) =
            IdMap::take(&options(&["ro", "uidmap=0:1000:10,10:5000:20", "gidmap=0:7:1", "lowerdir=/a:/b"])).unwrap();
        let expected = IdMap { users: "0 1000 10\n10 5000 20\n".into(), groups: "0 7 1\n".into() };
        assert_eq!(map, Some(expected));
        assert_eq!(others, ["ro", "lowerdir=/a:/b"]);
    }

    #[test]
    fn options_without_a_mapping_stay_as_they_are() {
        let (map, others) = IdMap::take(&options(&["ro", "index=off"])).unwrap();
        assert_eq!(map, None);
        assert_eq!(others, ["ro", "index=off"]);
    }

    #[test]
    fn a_mapping_that_is_none_is_named() {
        for wrong in ["uidmap=", "uidmap=0:1000", "uidmap=a:b:c", "uidmap=0:1000:10:2", "gidmap=0:0:1,"] {
            let error = IdMap::take(&options(&[wrong])).unwrap_err().to_string();
            assert!(error.contains(wrong), "{error}");
        }
        assert!(matches!(IdMap::take(&options(&["uidmap=0:1000:10"])), Err(RootfsError::HalfAnIdMap)));
    }

    #[test]
    fn an_overlay_shows_its_lower_files_with_other_owners_and_writes_as_itself() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
        for name in ["lower", "upper", "work", "target", "disk"] {
            fs::create_dir(at(name)).unwrap();
        }
        fs::write(at("lower/file"), "").unwrap();
        let overlay = |map: &[&str]| {
            let dirs = [("lowerdir", "lower"), ("upperdir", "upper"), ("workdir", "work")];
            let mut all: Vec<String> = dirs.iter().map(|(option, name)| format!("{option}={}", at(name))).collect();
            all.extend(options(map));
            Mount { type_: "overlay".into(), source: "overlay".into(), options: all, ..Mount::default() }
        };
        let target = PathBuf::from(at("target"));
        if let Err(error) = super::super::mount_one(&overlay(&[]), &target) {
            eprintln!("skipped: no overlay can be mounted here: {error}");
            return;
        }
        rustix::mount::unmount(&target, UnmountFlags::DETACH).unwrap();
        let mapped = overlay(&["uidmap=0:1000:65536", "gidmap=0:2000:65536"]);
        match super::super::mount_one(&mapped, &target) {
            Err(RootfsError::File { action: "map the ids of files in", source, .. }) => {
                eprintln!("skipped: the filesystem of {} has no id-mapped mounts: {source}", folder.path().display());
                return;
            }
            mounted => mounted.unwrap(),
        }
        let shown = fs::metadata(target.join("file")).unwrap();
        let kept = fs::metadata(at("lower/file")).unwrap();
        rustix::mount::unmount(&target, UnmountFlags::DETACH).unwrap();
        assert_eq!((shown.uid(), shown.gid()), (1000, 2000));
        assert_eq!((kept.uid(), kept.gid()), (0, 0));
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        assert!(!mounts.contains(FOLDER), "{mounts}");
    }
}
