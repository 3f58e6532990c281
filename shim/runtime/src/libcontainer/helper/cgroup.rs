//! The cgroup of a container, found by the path in its specification: whether there is one, and its removal.
//!
//! libcgroups makes it and sets its limits. Its removal is not used: it looks at one level, signals by pid and gives up
//! after three short waits.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use libcgroups::common::{AnyCgroupManager, CgroupConfig, CgroupManager, create_cgroup_manager};
use rustix::process::{Pid, PidfdFlags, Signal};

use super::error::{Context, Failure, Result};

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
/// Killed processes are gone within milliseconds, unless they are stuck in the kernel.
const DEADLINE: Duration = Duration::from_secs(10);
const SHORTEST_WAIT: Duration = Duration::from_micros(200);
const LONGEST_WAIT: Duration = Duration::from_millis(20);

/// Where a container is accounted, whether or not it is there yet.
#[derive(Debug)]
pub(super) struct Place {
    path: PathBuf,
    systemd: bool,
    id: String,
    hierarchies: Hierarchies,
}

#[derive(Debug)]
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
    /// libcgroups makes the container's cgroup in it.
    fn is_known(&self) -> bool {
        self.names.iter().any(|name| CONTROLLERS.contains(&name.as_str()))
    }

    /// The directory in it that a process is in, by the process's `/proc/PID/cgroup`.
    fn directory(&self, cgroup: &str) -> Option<PathBuf> {
        cgroup.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let names = fields.next()?;
            let is_this = match names {
                "" => self.names.is_empty(),
                names => names.split(',').any(|name| self.names.iter().any(|own| own == name)),
            };
            is_this.then(|| fields.next())?.map(|path| below(&self.point, Path::new(path)))
        })
    }
}

impl Place {
    /// `path` is `cgroupsPath` as the specification has it: `slice:prefix:name` for systemd, else below the mounts.
    pub(super) fn new(path: &Path, systemd: bool, id: &str) -> Result<Self> {
        let hierarchies = hierarchies()?;
        // libcgroups takes an absolute path for a path even if systemd was asked for.
        let systemd = systemd && path.is_relative();
        if systemd {
            if matches!(hierarchies, Hierarchies::V1(_)) {
                return Err(Failure::new("cgroups by systemd need cgroup v2 in this runtime; use runc on this node"));
            }
            systemd_path(path)?;
        } else {
            validate(path)?;
        }
        Ok(Self { path: path.to_owned(), systemd, id: id.to_owned(), hierarchies })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn config(&self) -> CgroupConfig {
        CgroupConfig { cgroup_path: self.path.clone(), systemd_cgroup: self.systemd, container_name: self.id.clone() }
    }

    pub(super) fn manager(&self) -> Result<AnyCgroupManager> {
        create_cgroup_manager(self.config()).context(|| format!("use the cgroup {}", self.path.display()))
    }

    /// Where a further process of the container belongs: with the first one, if that has made cgroups of its own below
    /// and passes controllers on to them. Then v2 allows no process in the container's cgroup itself.
    pub(super) fn for_exec(self, init: i32) -> Result<Self> {
        let passes_on = |directory: &PathBuf| {
            fs::read_to_string(directory.join("cgroup.subtree_control"))
                .is_ok_and(|controllers| !controllers.trim().is_empty())
        };
        let Some(own) = self.directories()?.into_iter().find(passes_on).filter(|_| self.is_v2()) else {
            return Ok(self);
        };
        let file = format!("/proc/{init}/cgroup");
        let cgroup = fs::read_to_string(&file).context(|| format!("read {file}"))?;
        let unified = Mount { point: MOUNT.into(), names: Vec::new() };
        match unified.directory(&cgroup).filter(|directory| directory.starts_with(&own)) {
            Some(directory) => {
                let path = Path::new("/").join(directory.strip_prefix(MOUNT).unwrap_or(&directory));
                // By its path and not as a unit: systemd knows nothing of what the container makes.
                Ok(Self { path, systemd: false, ..self })
            }
            None => Ok(self),
        }
    }

    pub(super) fn is_v2(&self) -> bool {
        matches!(self.hierarchies, Hierarchies::V2)
    }

    pub(super) fn is_systemd(&self) -> bool {
        self.systemd
    }

    /// Its directory in every hierarchy in which it has one.
    pub(super) fn directories(&self) -> Result<Vec<PathBuf>> {
        let candidates = match &self.hierarchies {
            Hierarchies::V1(mounts) => mounts.iter().map(|mount| below(&mount.point, &self.path)).collect(),
            Hierarchies::V2 if self.systemd => vec![below(Path::new(MOUNT), &systemd_path(&self.path)?)],
            Hierarchies::V2 => vec![below(Path::new(MOUNT), &self.path)],
        };
        Ok(candidates.into_iter().filter(|directory| directory.is_dir()).collect())
    }

    /// Its directory in every v1 hierarchy, with the hierarchy's name, whether or not it is there yet; none on v2.
    pub(super) fn v1_directories(&self) -> Vec<(String, PathBuf)> {
        let Hierarchies::V1(mounts) = &self.hierarchies else { return Vec::new() };
        let mounts = mounts.iter().filter(|mount| !mount.names.is_empty());
        mounts
            .filter_map(|mount| Some((mount.point.file_name()?.to_str()?.to_owned(), below(&mount.point, &self.path))))
            .collect()
    }

    /// Whether any process is in it, or in one below it.
    pub(super) fn is_populated(&self) -> Result<bool> {
        for directory in self.directories()? {
            if !members(&directory)?.is_empty() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether it is frozen, or about to be: a process that joined it would stand still.
    pub(super) fn is_frozen(&self) -> Result<bool> {
        for directory in self.directories()? {
            for file in ["cgroup.freeze", "freezer.state"] {
                let path = directory.join(file);
                match fs::read_to_string(&path) {
                    Ok(state) if matches!(state.trim(), "0" | "THAWED") => {}
                    Ok(_) => return Ok(true),
                    Err(error) if is_gone(&error) => {}
                    Err(error) => return Err(Failure::because(format!("read {}", path.display()), &error)),
                }
            }
        }
        Ok(false)
    }

    /// Kills every process in it and removes it, with all below it.
    pub(super) fn remove(&self) -> Result<()> {
        let directories = self.directories()?;
        self.kill(&directories)?;
        if self.systemd {
            self.manager()?.remove().context(|| format!("have systemd remove {}", self.path.display()))?;
        }
        directories.iter().try_for_each(|directory| remove_tree(directory))
    }

    /// Makes this process a member in the hierarchies that libcgroups leaves alone: systemd's, the unified one beside
    /// v1, and controllers it does not know. What it clones before the guard is dropped is a member too.
    ///
    /// This process and not its child, because a cgroup namespace, if the container gets one, begins where its first
    /// process is when it is made.
    pub(super) fn join_the_rest(&self) -> Result<Membership> {
        let mut membership = Membership { left: Vec::new() };
        self.move_into_the_rest(std::process::id().cast_signed(), &mut membership.left)?;
        Ok(membership)
    }

    /// Makes another process a member there, for good.
    pub(super) fn adopt_into_the_rest(&self, pid: i32) -> Result<()> {
        self.move_into_the_rest(pid, &mut Vec::new())
    }

    /// `left` is told where the process was before.
    fn move_into_the_rest(&self, pid: i32, left: &mut Vec<PathBuf>) -> Result<()> {
        let Hierarchies::V1(mounts) = &self.hierarchies else { return Ok(()) };
        let path = format!("/proc/{pid}/cgroup");
        let cgroup = fs::read_to_string(&path).context(|| format!("read {path}"))?;
        for mount in mounts.iter().filter(|mount| !mount.is_known()) {
            // Not in it: then this process is not to be found in it either.
            let Some(before) = mount.directory(&cgroup) else { continue };
            let directory = below(&mount.point, &self.path);
            fs::create_dir_all(&directory).context(|| format!("make {}", directory.display()))?;
            left.push(before);
            move_to(&directory, pid).context(|| format!("put process {pid} into {}", directory.display()))?;
        }
        Ok(())
    }

    fn kill(&self, directories: &[PathBuf]) -> Result<()> {
        let deadline = Instant::now() + DEADLINE;
        let mut wait = SHORTEST_WAIT;
        let mut signalled = HashSet::new();
        loop {
            let mut alive = 0;
            for directory in directories {
                let pids = members(directory)?;
                alive += pids.len();
                if pids.is_empty() || kill_at_once(directory)? {
                    continue;
                }
                for pid in pids {
                    if signalled.insert(pid) {
                        kill_member(directory, pid)?;
                    }
                }
                thaw(directory)?;
            }
            if alive == 0 {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(Failure::new(format!(
                    "{alive} processes in the cgroup {} do not die",
                    self.path.display()
                )));
            }
            // A pid that is still there was signalled, and is dying; but it may also be a new process.
            if wait == LONGEST_WAIT {
                signalled.clear();
            }
            thread::sleep(wait);
            wait = (wait * 2).min(LONGEST_WAIT);
        }
    }
}

/// Membership of this process in a container's cgroup, until it is dropped.
#[derive(Debug)]
pub(super) struct Membership {
    /// Where it was before.
    left: Vec<PathBuf>,
}

impl Drop for Membership {
    fn drop(&mut self) {
        for directory in &self.left {
            if let Err(error) = move_to(directory, std::process::id().cast_signed()) {
                tracing::error!("cannot go back to {}: {error}", directory.display());
            }
        }
    }
}

fn move_to(directory: &Path, pid: i32) -> io::Result<()> {
    fs::write(directory.join("cgroup.procs"), pid.to_string())
}

fn hierarchies() -> Result<Hierarchies> {
    let statfs = rustix::fs::statfs(MOUNT).context(|| format!("look at {MOUNT}"))?;
    if statfs.f_type == libc::CGROUP2_SUPER_MAGIC {
        return Ok(Hierarchies::V2);
    }
    let path = "/proc/self/mountinfo";
    let mountinfo = fs::read_to_string(path).context(|| format!("read {path}"))?;
    Ok(Hierarchies::V1(cgroup_mounts(&mountinfo)))
}

/// Mounts of file systems of the types cgroup and cgroup2.
fn cgroup_mounts(mountinfo: &str) -> Vec<Mount> {
    let mut mounts = Vec::new();
    for line in mountinfo.lines() {
        let Some((mount, filesystem)) = line.split_once(" - ") else { continue };
        let mut mount = mount.split(' ').skip(3);
        let mut filesystem = filesystem.split(' ');
        // Only whole hierarchies: a mount of a part of one, like those in containers, has another root.
        let (Some("/"), Some(point), Some("cgroup" | "cgroup2"), _, Some(options)) =
            (mount.next(), mount.next(), filesystem.next(), filesystem.next(), filesystem.next())
        else {
            continue;
        };
        let is_name = |option: &&str| CONTROLLERS.contains(option) || option.starts_with("name=") || is_other(option);
        let names = options.split(',').filter(is_name).map(str::to_owned).collect();
        // What a criu that restores something has mounted for itself, and for that long.
        if point.contains("/.criu.cgyard.") {
            continue;
        }
        if !mounts.iter().any(|mount: &Mount| mount.point == Path::new(point)) {
            mounts.push(Mount { point: point.into(), names });
        }
    }
    mounts
}

/// Controllers that libcgroups does not know. Anything else among the options of a mount is no controller.
fn is_other(option: &str) -> bool {
    matches!(option, "rdma" | "misc" | "debug")
}

/// A path below the mounts that names a cgroup other than their root, and leads nowhere else.
fn validate(path: &Path) -> Result<()> {
    if path.components().any(|component| component == Component::ParentDir) {
        return Err(Failure::new(format!("the cgroup path {} leads upwards", path.display())));
    }
    if !path.components().any(|component| matches!(component, Component::Normal(_))) {
        return Err(Failure::new(format!("the cgroup path {} names no cgroup", path.display())));
    }
    Ok(())
}

fn below(mount: &Path, path: &Path) -> PathBuf {
    mount.join(path.strip_prefix("/").unwrap_or(path))
}

/// Where systemd puts the unit for `slice:prefix:name`: `a-b.slice` is the directory `a.slice/a-b.slice`.
fn systemd_path(path: &Path) -> Result<PathBuf> {
    let invalid = || Failure::new(format!("the cgroup path {} is not slice:prefix:name", path.display()));
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

/// The directory and all below it, deepest last. One that goes away meanwhile has nothing below it.
fn tree(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut all = vec![directory.to_owned()];
    let mut next = 0;
    while let Some(parent) = all.get(next).cloned() {
        next += 1;
        match fs::read_dir(&parent) {
            Ok(entries) => all.extend(
                entries
                    .flatten()
                    .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
                    .map(|entry| entry.path()),
            ),
            Err(error) if is_gone(&error) => {}
            Err(error) => return Err(Failure::because(format!("read {}", parent.display()), &error)),
        }
    }
    Ok(all)
}

fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

/// Processes in the directory and all below it.
fn members(directory: &Path) -> Result<Vec<i32>> {
    let mut pids = Vec::new();
    for directory in tree(directory)? {
        pids.extend(processes(&directory)?);
    }
    Ok(pids)
}

fn processes(directory: &Path) -> Result<Vec<i32>> {
    let procs = directory.join("cgroup.procs");
    match fs::read_to_string(&procs) {
        Ok(text) => Ok(text.lines().filter_map(|line| line.parse().ok()).collect()),
        Err(error) if is_gone(&error) => Ok(Vec::new()),
        // A threaded cgroup of v2 lists its processes only at its root, which is listed too.
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(Vec::new()),
        Err(error) => Err(Failure::because(format!("read {}", procs.display()), &error)),
    }
}

/// Has the kernel kill all in it, since Linux 5.14 on v2; false where it cannot.
fn kill_at_once(directory: &Path) -> Result<bool> {
    let path = directory.join("cgroup.kill");
    match fs::write(&path, "1") {
        Ok(()) => Ok(true),
        Err(error) if is_gone(&error) => Ok(false),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied && !path.exists() => Ok(false),
        Err(error) => Err(Failure::because(format!("write {}", path.display()), &error)),
    }
}

/// Kills a process unless it has left the cgroup: then the pid may be another's by now.
fn kill_member(directory: &Path, pid: i32) -> Result<()> {
    let Some(process) = Pid::from_raw(pid) else { return Ok(()) };
    let Ok(pidfd) = rustix::process::pidfd_open(process, PidfdFlags::empty()) else { return Ok(()) };
    if members(directory)?.contains(&pid) {
        // An error means that it is dead.
        let _ = rustix::process::pidfd_send_signal(pidfd, Signal::KILL);
    }
    Ok(())
}

/// A frozen process does not die.
fn thaw(directory: &Path) -> Result<()> {
    for directory in tree(directory)? {
        for (file, thawed) in [("cgroup.freeze", "0"), ("freezer.state", "THAWED")] {
            let path = directory.join(file);
            if path.exists() {
                fs::write(&path, thawed).context(|| format!("write {}", path.display()))?;
            }
        }
    }
    Ok(())
}

fn remove_tree(directory: &Path) -> Result<()> {
    let deadline = Instant::now() + DEADLINE;
    for directory in tree(directory)?.iter().rev() {
        let mut wait = SHORTEST_WAIT;
        loop {
            match fs::remove_dir(directory) {
                Ok(()) => break,
                Err(error) if is_gone(&error) => break,
                // The last process has left, but not all of the kernel has noticed.
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < deadline => {
                    thread::sleep(wait);
                    wait = (wait * 2).min(LONGEST_WAIT);
                }
                Err(error) => return Err(Failure::because(format!("remove {}", directory.display()), &error)),
            }
        }
    }
    Ok(())
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
    fn only_whole_hierarchies_count() {
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

    #[test]
    fn a_tree_lists_parents_before_children() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("a/b")).unwrap();
        fs::write(root.path().join("file"), "").unwrap();
        let tree = tree(root.path()).unwrap();
        assert_eq!(tree, [root.path().to_owned(), root.path().join("a"), root.path().join("a/b")]);
        remove_tree(&root.path().join("a")).unwrap();
        remove_tree(&root.path().join("a")).unwrap();
        assert!(!root.path().join("a").exists());
    }
}
