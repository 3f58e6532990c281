//! The place of a container in the cgroup hierarchies, by the path in its specification: where its directories are,
//! whether or not they are there yet, and whoever of its processes has moved to where.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

use proc::HostPid;

use crate::{Cgroup, CgroupError, Hierarchy, file, freezer, locate, process, v1};

const MOUNT: &str = "/sys/fs/cgroup";

/// The v1 controllers that libcgroups handles.
const CONTROLLERS: [&str; 12] = [
    "cpu",
    "cpuacct",
    "cpuset",
    "devices",
    "hugetlb",
    "memory",
    "pids",
    "perf_event",
    "blkio",
    "net_prio",
    "net_cls",
    "freezer",
];

/// A container's place.
#[derive(Clone, Debug)]
pub struct Place {
    path: PathBuf,
    systemd: bool,
    hierarchies: Hierarchies,
}

#[derive(Clone, Debug)]
enum Hierarchies {
    /// All v1 hierarchies, and the unified one beside them.
    V1(Vec<Mount>),
    V2,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Mount {
    point: PathBuf,
    /// Controllers, or `name=NAME`; none for the unified hierarchy.
    names: Vec<String>,
}

impl Mount {
    /// Returns whether libcgroups makes the container's cgroup in it.
    fn is_known(&self) -> bool {
        self.names.iter().any(|name| CONTROLLERS.contains(&name.as_str()))
    }

    /// Returns the path in it that a process is in, and the hierarchy's names as the kernel writes them, by the
    /// process's `/proc/PID/cgroup`.
    fn membership<'a>(&self, cgroup: &'a str) -> Option<(&'a str, &'a Path)> {
        cgroup.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let names = fields.next()?;
            let is_this = match names {
                "" => self.names.is_empty(),
                names => names.split(',').any(|name| self.names.iter().any(|own| own == name)),
            };
            is_this.then(|| fields.next())?.map(|path| (names, Path::new(path)))
        })
    }

    fn directory(&self, cgroup: &str) -> Option<PathBuf> {
        self.membership(cgroup).map(|(_, path)| below(&self.point, path))
    }
}

impl Place {
    /// Finds it. `path` is `cgroupsPath` as the specification has it: `slice:prefix:name` for systemd, else below the
    /// mounts.
    ///
    /// # Errors
    /// When the path names no cgroup, or leads elsewhere; or the mounts cannot be read.
    pub fn new(path: &Path, systemd: bool) -> Result<Self, CgroupError> {
        let hierarchies = hierarchies()?;
        // libcgroups takes an absolute path for a path even if systemd was asked for.
        let systemd = systemd && path.is_relative();
        if systemd {
            if matches!(hierarchies, Hierarchies::V1(_)) {
                return Err(CgroupError::SystemdV1);
            }
            systemd_path(path)?;
        } else {
            validate(path)?;
        }
        Ok(Self { path: path.to_owned(), systemd, hierarchies })
    }

    /// Returns the path that it was found by.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns whether the machine has cgroup v2 alone.
    #[must_use]
    pub fn is_v2(&self) -> bool {
        matches!(self.hierarchies, Hierarchies::V2)
    }

    /// Returns whether it is a unit of systemd.
    #[must_use]
    pub fn is_systemd(&self) -> bool {
        self.systemd
    }

    /// Returns its directories as one cgroup, in this process's view of the hierarchies.
    ///
    /// # Errors
    /// When the path does not name a directory.
    pub fn cgroup(&self) -> Result<Cgroup, CgroupError> {
        let Hierarchies::V1(mounts) = &self.hierarchies else {
            return Ok(Cgroup { hierarchy: Hierarchy::V2(below(Path::new(MOUNT), &self.within()?)) });
        };
        let all = mounts.iter().flat_map(|mount| {
            let directory = below(&mount.point, &self.path);
            mount.names.iter().map(move |name| (name.clone(), directory.clone()))
        });
        let (there, missing): (Vec<_>, Vec<_>) = all.partition(|(_, directory)| directory.is_dir());
        // A cgroup that was removed is asked in vain, wherever it was.
        let directories = if there.is_empty() { missing } else { there };
        Ok(Cgroup { hierarchy: Hierarchy::V1(v1::Directories::new(directories)) })
    }

    /// Returns its path in each hierarchy in which a process of the container is in it, or below it, with the
    /// hierarchy's names as `/proc/PID/cgroup` has them: `cpu,cpuacct`, or nothing for version 2.
    ///
    /// # Errors
    /// When the process has ended, or the path does not name a directory.
    pub fn paths_of(&self, member: HostPid) -> Result<Vec<(String, PathBuf)>, CgroupError> {
        let cgroup = memberships(member)?;
        let own = Path::new("/").join(self.within()?.strip_prefix("/").unwrap_or(&self.path));
        let unified = [Mount { point: MOUNT.into(), names: Vec::new() }];
        let mounts = match &self.hierarchies {
            Hierarchies::V1(mounts) => mounts.as_slice(),
            Hierarchies::V2 => &unified,
        };
        let found = mounts.iter().filter_map(|mount| mount.membership(&cgroup));
        Ok(found.filter(|(_, path)| path.starts_with(&own)).map(|(names, _)| (names.to_owned(), own.clone())).collect())
    }

    /// Returns where a further process of the container belongs: with the first one, if that has made cgroups of its
    /// own below and passes controllers on to them. Then v2 allows no process in the container's cgroup itself.
    ///
    /// # Errors
    /// When the init has ended.
    pub fn for_exec(self, init: HostPid) -> Result<Self, CgroupError> {
        let passes_on = |directory: &PathBuf| {
            fs::read_to_string(directory.join("cgroup.subtree_control"))
                .is_ok_and(|controllers| !controllers.trim().is_empty())
        };
        let Some(own) = self.directories()?.into_iter().find(passes_on).filter(|_| self.is_v2()) else {
            return Ok(self);
        };
        let unified = Mount { point: MOUNT.into(), names: Vec::new() };
        match unified.directory(&memberships(init)?).filter(|directory| directory.starts_with(&own)) {
            Some(directory) => {
                let path = Path::new("/").join(directory.strip_prefix(MOUNT).unwrap_or(&directory));
                // By its path and not as a unit: systemd knows nothing of what the container makes.
                Ok(Self { path, systemd: false, ..self })
            }
            None => Ok(self),
        }
    }

    /// Returns its directory in every hierarchy in which it has one.
    ///
    /// # Errors
    /// When the path does not name a directory.
    pub fn directories(&self) -> Result<Vec<PathBuf>, CgroupError> {
        let candidates = match (&self.hierarchies, self.v2_directory()?) {
            (Hierarchies::V1(mounts), _) => mounts.iter().map(|mount| below(&mount.point, &self.path)).collect(),
            (Hierarchies::V2, directory) => Vec::from_iter(directory),
        };
        Ok(candidates.into_iter().filter(|directory| directory.is_dir()).collect())
    }

    /// Returns its directory on v2, whether or not it is there yet; none on v1.
    ///
    /// # Errors
    /// This process's own cgroup, below which systemd's are, cannot be read.
    pub fn v2_directory(&self) -> Result<Option<PathBuf>, CgroupError> {
        if !self.is_v2() {
            return Ok(None);
        }
        Ok(Some(below(Path::new(MOUNT), &self.within()?)))
    }

    /// Returns its directory in every v1 hierarchy, with the hierarchy's name, whether or not it is there yet; none on
    /// v2.
    #[must_use]
    pub fn v1_directories(&self) -> Vec<(String, PathBuf)> {
        let Hierarchies::V1(mounts) = &self.hierarchies else { return Vec::new() };
        let mounts = mounts.iter().filter(|mount| !mount.names.is_empty());
        mounts
            .filter_map(|mount| Some((mount.point.file_name()?.to_str()?.to_owned(), below(&mount.point, &self.path))))
            .collect()
    }

    /// Returns whether any process is in it, or in a cgroup below it.
    ///
    /// # Errors
    /// When its files cannot be read.
    pub fn is_populated(&self) -> Result<bool, CgroupError> {
        for directory in self.directories()? {
            if !process::pids(&directory)?.is_empty() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Returns whether a process that joined it would stand still: it, or a cgroup above it, is frozen or about to be.
    ///
    /// # Errors
    /// When its files cannot be read.
    pub fn is_frozen(&self) -> Result<bool, CgroupError> {
        for directory in self.directories()? {
            if freezer::stands_still(&directory)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Kills every process in it and removes it, with all below it. Tries until it is gone, a minute at most.
    ///
    /// # Errors
    /// When it is there after a minute: processes do not die, or others come. What is gone by then stays so, and the
    /// call can be repeated.
    pub fn remove(&self) -> Result<(), CgroupError> {
        crate::remove::remove(&self.directories()?)
    }

    /// Makes this process a member in the hierarchies that libcgroups leaves alone: systemd's, the unified one beside
    /// v1, and controllers it does not know. What it clones before the guard is dropped is a member too.
    ///
    /// This process and not its child, because a cgroup namespace, if the container gets one, begins where its first
    /// process is when it is made.
    ///
    /// # Errors
    /// When a directory cannot be made or joined.
    pub fn join_the_rest(&self) -> Result<Membership, CgroupError> {
        let mut membership = Membership { left: Vec::new() };
        self.move_into_the_rest(HostPid::own(), &mut membership.left)?;
        Ok(membership)
    }

    /// Makes another process a member there, for good.
    ///
    /// # Errors
    /// When a directory cannot be made or joined.
    pub fn adopt_into_the_rest(&self, pid: HostPid) -> Result<(), CgroupError> {
        self.move_into_the_rest(pid, &mut Vec::new())
    }

    /// `left` is told where the process was before.
    fn move_into_the_rest(&self, pid: HostPid, left: &mut Vec<PathBuf>) -> Result<(), CgroupError> {
        let Hierarchies::V1(mounts) = &self.hierarchies else { return Ok(()) };
        let cgroup = memberships(pid)?;
        for mount in mounts.iter().filter(|mount| !mount.is_known()) {
            // Not in it: then this process is not to be found in it either.
            let Some(before) = mount.directory(&cgroup) else { continue };
            let directory = below(&mount.point, &self.path);
            fs::create_dir_all(&directory).map_err(|source| CgroupError::File {
                action: "make",
                path: directory.clone(),
                source,
            })?;
            left.push(before);
            file::write(&directory.join("cgroup.procs"), &pid.to_string())?;
        }
        Ok(())
    }

    /// Its path below a mount.
    fn within(&self) -> Result<PathBuf, CgroupError> {
        if self.systemd { systemd_path(&self.path) } else { Ok(self.path.clone()) }
    }
}

/// Membership of this process in a container's cgroup, until it is dropped.
#[derive(Debug)]
pub struct Membership {
    /// The directories that the process was in before.
    left: Vec<PathBuf>,
}

impl Drop for Membership {
    fn drop(&mut self) {
        for directory in &self.left {
            if let Err(error) = file::write(&directory.join("cgroup.procs"), &HostPid::own().to_string()) {
                tracing::error!("cannot go back to {}: {}", directory.display(), phase::chain(&error));
            }
        }
    }
}

fn memberships(pid: HostPid) -> Result<String, CgroupError> {
    let path = pid.path("cgroup");
    fs::read_to_string(&path).map_err(|source| CgroupError::File { action: "read", path, source })
}

fn hierarchies() -> Result<Hierarchies, CgroupError> {
    let failed = |path: &str| {
        let path = path.into();
        move |source: io::Error| CgroupError::File { action: "read", path, source }
    };
    let statfs = rustix::fs::statfs(MOUNT).map_err(io::Error::from).map_err(failed(MOUNT))?;
    if statfs.f_type == libc::CGROUP2_SUPER_MAGIC {
        return Ok(Hierarchies::V2);
    }
    let path = "/proc/self/mountinfo";
    let mountinfo = fs::read_to_string(path).map_err(failed(path))?;
    Ok(Hierarchies::V1(cgroup_mounts(&mountinfo)))
}

/// Mounts of whole hierarchies. A mount of a part of one, like those in containers, has another root.
fn cgroup_mounts(mountinfo: &str) -> Vec<Mount> {
    let mut mounts = Vec::new();
    for mount in mountinfo.lines().filter_map(locate::mount).filter(|mount| mount.root == Path::new("/")) {
        let is_name =
            |name: &String| CONTROLLERS.contains(&name.as_str()) || name.starts_with("name=") || is_other(name);
        let names = if mount.unified { Vec::new() } else { mount.options.into_iter().filter(is_name).collect() };
        if !mounts.iter().any(|known: &Mount| known.point == mount.point) {
            mounts.push(Mount { point: mount.point, names });
        }
    }
    mounts
}

/// Controllers that libcgroups does not know. Anything else among the options of a mount is no controller.
fn is_other(option: &str) -> bool {
    matches!(option, "rdma" | "misc" | "debug")
}

/// A path below the mounts that names a cgroup other than their root, and leads nowhere else.
fn validate(path: &Path) -> Result<(), CgroupError> {
    let invalid = |why| Err(CgroupError::Path { path: path.to_owned(), why });
    if path.components().any(|component| component == Component::ParentDir) {
        return invalid("leads upwards");
    }
    if !path.components().any(|component| matches!(component, Component::Normal(_))) {
        return invalid("names no cgroup");
    }
    Ok(())
}

fn below(mount: &Path, path: &Path) -> PathBuf {
    mount.join(path.strip_prefix("/").unwrap_or(path))
}

/// Returns the directory in which systemd puts the unit for `slice:prefix:name`: `a-b.slice` is the directory `a.slice/a-b.slice`.
fn systemd_path(path: &Path) -> Result<PathBuf, CgroupError> {
    let invalid = || CgroupError::Path { path: path.to_owned(), why: "is not slice:prefix:name" };
    let mut parts = path.to_str().ok_or_else(invalid)?.split(':');
    let (Some(slice), Some(prefix), Some(name), None) = (parts.next(), parts.next(), parts.next(), parts.next()) else {
        return Err(invalid());
    };
    let slice = if slice.is_empty() { "system.slice" } else { slice };
    let stem = slice.strip_suffix(".slice").ok_or_else(invalid)?;
    let names = |text: &str| !text.contains('/') && text != "..";
    if name.is_empty() || !names(slice) || !names(prefix) || !names(name) {
        return Err(invalid());
    }
    let mut directory = PathBuf::new();
    if stem != "-" {
        for (index, _) in stem.match_indices('-').chain([(stem.len(), "")]) {
            directory.push(format!("{}.slice", &stem[..index]));
        }
    }
    directory.push(if name.ends_with(".slice") { name.to_owned() } else { format!("{prefix}-{name}.scope") });
    Ok(directory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cgroup_path_names_a_cgroup_below_the_root() {
        for path in ["/a", "a/b", "/k8s.io/c1"] {
            validate(Path::new(path)).unwrap();
        }
        for path in ["", "/", ".", "/a/..", "../a", "/a/../b"] {
            validate(Path::new(path)).unwrap_err();
        }
    }

    #[test]
    fn a_slice_becomes_directories() {
        let directory = |path: &str| systemd_path(Path::new(path)).map(|path| path.display().to_string());
        assert_eq!(directory("a-b-c.slice:p:n").unwrap(), "a.slice/a-b.slice/a-b-c.slice/p-n.scope");
        assert_eq!(directory(":cri-containerd:n").unwrap(), "system.slice/cri-containerd-n.scope");
        assert_eq!(directory("-.slice:p:n").unwrap(), "p-n.scope");
        assert_eq!(directory("a.slice:p:b.slice").unwrap(), "a.slice/b.slice");
        for path in ["a", "a:b", "a:b:c", "a.slice:b:", "a.slice:b:c:d", "/.slice:b:c", "a.slice:b:../c"] {
            directory(path).unwrap_err();
        }
    }

    #[test]
    fn only_whole_hierarchies_count_each_once() {
        let mountinfo = "\
            25 1 0:22 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
            30 25 0:26 / /sys/fs/cgroup/memory rw,relatime shared:3 - cgroup cgroup rw,memory\n\
            31 25 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
            40 39 0:26 /x /run/root/sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n";
        let mounts = cgroup_mounts(mountinfo);
        let points: Vec<&Path> = mounts.iter().map(|mount| mount.point.as_path()).collect();
        assert_eq!(points, ["/sys/fs/cgroup/memory", "/sys/fs/cgroup/unified"].map(Path::new));
        assert_eq!([true, false], [mounts[0].is_known(), mounts[1].is_known()]);
    }

    #[test]
    fn the_own_cgroup_is_found_in_each_hierarchy() {
        let mountinfo = "\
            30 25 0:26 / /c/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
            31 25 0:27 / /c/systemd rw - cgroup cgroup rw,xattr,name=systemd\n\
            32 25 0:28 / /c/unified rw - cgroup2 cgroup2 rw,nsdelegate\n\
            33 25 0:29 / /c/misc rw - cgroup none rw,misc\n";
        let cgroup = "3:cpu,cpuacct:/one\n2:name=systemd:/two:2\n0::/three\n";
        let found: Vec<Option<PathBuf>> =
            cgroup_mounts(mountinfo).iter().map(|mount| mount.directory(cgroup)).collect();
        let expected = [Some("/c/cpu,cpuacct/one"), Some("/c/systemd/two:2"), Some("/c/unified/three"), None];
        assert_eq!(found, expected.map(|path| path.map(PathBuf::from)));
    }
}
