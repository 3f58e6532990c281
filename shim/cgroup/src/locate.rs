//! Where a process's cgroups are in the file system, from `/proc/PID/cgroup` and `/proc/self/mountinfo`.
//!
//! The two files speak of the same tree in different ways: the first gives a path from the root of the hierarchy, the
//! second says which part of the hierarchy is mounted where. On a host the mounted part is all of it; in a container
//! without a cgroup namespace it is a bind mount of the container's own cgroup, and the path has to be cut at the front.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};

/// Where the unified hierarchy is mounted on a machine that has no other. All runtimes, and containerd, decide by this
/// place between v1 and v2, and must agree on it, or one limits what another does not see.
const UNIFIED_MOUNT: &str = "/sys/fs/cgroup";

/// One line of `/proc/PID/cgroup`.
#[derive(Debug, PartialEq, Eq)]
struct Membership {
    /// Controllers, or one `name=...`; empty for the unified hierarchy.
    controllers: Vec<String>,
    path: PathBuf,
}

/// One cgroup file system of `/proc/self/mountinfo`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Mount {
    pub(crate) unified: bool,
    /// Super block options; on v1 the controllers are among them.
    pub(crate) options: Vec<String>,
    /// The part of the hierarchy that is mounted.
    pub(crate) root: PathBuf,
    pub(crate) point: PathBuf,
}

/// What a process is in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Places {
    /// Controller or `name=...`, and its directory; controllers mounted together share one.
    V1(Vec<(String, PathBuf)>),
    V2(PathBuf),
}

/// Puts the two files together. `None` when the process is in no cgroup of its own that any mount leads to.
///
/// The root of a hierarchy is nobody's own: the whole machine is in it. A process is there when its runtime does not
/// know the controller, and, on v1, when it has just died.
pub(crate) fn places(cgroup: &str, mountinfo: &str, is_directory: impl Fn(&Path) -> bool) -> Option<Places> {
    let memberships: Vec<Membership> = cgroup.lines().filter_map(membership).collect();
    let mounts: Vec<Mount> = mountinfo.lines().filter_map(mount).collect();
    let unified = || {
        let membership = memberships.iter().find(|membership| membership.controllers.is_empty())?;
        place(&membership.path, mounts.iter().filter(|mount| mount.unified), &is_directory).map(Places::V2)
    };
    if mounts.iter().any(|mount| mount.unified && mount.point == Path::new(UNIFIED_MOUNT)) {
        return unified();
    }
    let mut controllers = vec![];
    for membership in &memberships {
        for controller in &membership.controllers {
            let carries = |mount: &&Mount| !mount.unified && mount.options.contains(controller);
            if let Some(place) = place(&membership.path, mounts.iter().filter(carries), &is_directory) {
                controllers.push((controller.clone(), place));
            }
        }
    }
    if controllers.is_empty() { unified() } else { Some(Places::V1(controllers)) }
}

fn place<'mounts>(
    path: &Path,
    mounts: impl DoubleEndedIterator<Item = &'mounts Mount>,
    is_directory: impl Fn(&Path) -> bool,
) -> Option<PathBuf> {
    if path == Path::new("/") {
        return None;
    }
    // A later mount may cover an earlier one.
    mounts.rev().find_map(|mount| {
        let below = path.strip_prefix(&mount.root).ok()?;
        // What is outside this process's cgroup namespace begins with "/..": not below any mount.
        if below.components().any(|component| component == Component::ParentDir) {
            return None;
        }
        let directory = if below.as_os_str().is_empty() { mount.point.clone() } else { mount.point.join(below) };
        is_directory(&directory).then_some(directory)
    })
}

/// `hierarchy-id:controller,controller:path`; a path may contain colons.
fn membership(line: &str) -> Option<Membership> {
    let mut fields = line.splitn(3, ':');
    let _hierarchy = fields.next()?;
    let controllers = fields.next()?;
    // Once the cgroup of a dying process is removed, the kernel says so behind the path.
    let path = fields.next()?;
    Some(Membership {
        controllers: controllers.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect(),
        path: path.strip_suffix(" (deleted)").unwrap_or(path).into(),
    })
}

/// `id parent major:minor root point options [optional fields] - type source super-options`, proc(5).
pub(crate) fn mount(line: &str) -> Option<Mount> {
    let (before, after) = line.split_once(" - ")?;
    let mut before = before.split(' ').skip(3);
    let (root, point) = (before.next()?, before.next()?);
    // What a criu that restores something has mounted for itself, and for that long.
    if point.contains("/.criu.cgyard.") {
        return None;
    }
    let mut after = after.split(' ');
    let unified = match after.next()? {
        "cgroup" => false,
        "cgroup2" => true,
        _ => return None,
    };
    let options = after.nth(1)?.split(',').map(str::to_owned).collect();
    Some(Mount { unified, options, root: unescape(root), point: unescape(point) })
}

/// The kernel writes blanks, tabs, newlines and backslashes as a backslash and three octal digits.
fn unescape(field: &str) -> PathBuf {
    let bytes = field.as_bytes();
    let mut plain = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        let octal = bytes.get(at + 1..at + 4).and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(escaped) if byte == b'\\' => {
                plain.push(escaped);
                at += 4;
            }
            _ => {
                plain.push(byte);
                at += 1;
            }
        }
    }
    OsString::from_vec(plain).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine as cloud kernels still boot: every v1 controller on its own, and the unified hierarchy without any.
    const HYBRID_MOUNTS: &str = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
37 31 0:34 / /sys/fs/cgroup/freezer rw,relatime - cgroup cgroup rw,freezer
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";

    fn v1(places: Option<Places>) -> Vec<(String, String)> {
        let Some(Places::V1(controllers)) = places else { panic!("not v1: {places:?}") };
        controllers.into_iter().map(|(name, place)| (name, place.to_str().unwrap().to_owned())).collect()
    }

    fn v2(places: Option<Places>) -> PathBuf {
        let Some(Places::V2(place)) = places else { panic!("not v2: {places:?}") };
        place
    }

    fn pairs(expected: &[(&str, &str)]) -> Vec<(String, String)> {
        expected.iter().map(|(name, path)| ((*name).to_owned(), (*path).to_owned())).collect()
    }

    #[test]
    fn a_hybrid_machine_is_v1_and_each_controller_has_its_own_path() {
        let cgroup = "9:name=systemd:/\n6:freezer:/k8s.io/web\n4:memory:/api/web\n1:cpu:/k8s.io/web\n0::/k8s.io/web\n";
        assert_eq!(
            v1(places(cgroup, HYBRID_MOUNTS, |_| true)),
            pairs(&[
                ("freezer", "/sys/fs/cgroup/freezer/k8s.io/web"),
                ("memory", "/sys/fs/cgroup/memory/api/web"),
                ("cpu", "/sys/fs/cgroup/cpu/k8s.io/web"),
            ])
        );
    }

    #[test]
    fn controllers_mounted_together_share_a_directory() {
        let mounts = "33 25 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:11 - cgroup cgroup rw,cpu,cpuacct\n";
        assert_eq!(
            v1(places("4:cpu,cpuacct:/docker/1f:2e\n", mounts, |_| true)),
            pairs(&[
                ("cpu", "/sys/fs/cgroup/cpu,cpuacct/docker/1f:2e"),
                ("cpuacct", "/sys/fs/cgroup/cpu,cpuacct/docker/1f:2e"),
            ])
        );
    }

    #[test]
    fn a_unified_machine_is_v2_even_beside_a_lone_v1_controller() {
        let mounts = "\
25 20 0:22 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate
90 20 0:60 / /run/net_cls rw,relatime - cgroup none rw,net_cls
";
        let place = v2(places("1:net_cls:/\n0::/system.slice/web.scope\n", mounts, |_| true));
        assert_eq!(place, Path::new("/sys/fs/cgroup/system.slice/web.scope"));
    }

    #[test]
    fn a_bind_mount_of_a_part_of_the_hierarchy_cuts_the_path() {
        let mounts = "37 31 0:34 /docker/ab /sys/fs/cgroup/freezer ro,relatime - cgroup cgroup rw,freezer\n";
        assert_eq!(
            v1(places("6:freezer:/docker/ab/inner\n", mounts, |_| true)),
            pairs(&[("freezer", "/sys/fs/cgroup/freezer/inner")])
        );
        assert_eq!(
            v1(places("6:freezer:/docker/ab\n", mounts, |_| true)),
            pairs(&[("freezer", "/sys/fs/cgroup/freezer")])
        );
        assert_eq!(places("6:freezer:/docker/other\n", mounts, |_| true), None);
    }

    #[test]
    fn what_is_outside_the_cgroup_namespace_is_not_found() {
        assert_eq!(places("6:freezer:/../other\n", HYBRID_MOUNTS, |_| true), None);
        let above = "37 31 0:34 /.. /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer\n";
        assert_eq!(
            v1(places("6:freezer:/../other\n", above, |_| true)),
            pairs(&[("freezer", "/sys/fs/cgroup/freezer/other")])
        );
    }

    #[test]
    fn of_two_mounts_the_later_one_that_has_the_directory_is_taken() {
        let mounts = "\
37 31 0:34 / /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer
38 31 0:34 / /mnt/a\\040b rw - cgroup cgroup rw,freezer
";
        assert_eq!(v1(places("6:freezer:/x\n", mounts, |_| true)), pairs(&[("freezer", "/mnt/a b/x")]));
        assert_eq!(
            v1(places("6:freezer:/x\n", mounts, |path| path.starts_with("/sys"))),
            pairs(&[("freezer", "/sys/fs/cgroup/freezer/x")])
        );
    }

    #[test]
    fn the_root_of_a_hierarchy_is_nobodys_cgroup() {
        let mounts = "25 20 0:22 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        assert_eq!(places("0::/\n", mounts, |_| true), None);
        assert_eq!(places("6:freezer:/\n4:memory:/\n0::/\n", HYBRID_MOUNTS, |_| true), None);
    }

    #[test]
    fn a_path_that_was_removed_is_read_without_the_kernels_remark() {
        let mounts = "25 20 0:22 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        let place = v2(places("0::/web (deleted)\n", mounts, |_| true));
        assert_eq!(place, Path::new("/sys/fs/cgroup/web"));
    }

    #[test]
    fn lines_that_make_no_sense_are_passed_over() {
        assert_eq!(places("", "", |_| true), None);
        assert_eq!(places("what\n6:freezer\n", "1 2 3\n- - -\n1 2 0:1 / /x rw - cgroup\n", |_| true), None);
    }
}
