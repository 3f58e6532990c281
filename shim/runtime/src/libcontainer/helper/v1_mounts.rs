//! The cgroup v1 hierarchies inside a container.
//!
//! For a mount of type `cgroup`, libcontainer would look up the calling process's pid in the host's
//! /proc, with the number inside the container's pid namespace. A container in another one's pid
//! namespace finds another process or none. So such a mount is written out: a tmpfs, and a bind
//! mount of the container's own directory for each hierarchy. Later steps on the existing container
//! are in [`fixup`](super::fixup).

use std::path::{Path, PathBuf};

use cgroup::Place;
use oci_spec::runtime::{Mount, MountBuilder, Spec};

use super::error::Result;

/// A written-out mount of all hierarchies, with the rest to do in the existing container.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Written {
    pub(super) destination: PathBuf,
    pub(super) read_only: bool,
    /// Names of controllers in a shared hierarchy, each with the hierarchy's: `cpu` in
    /// `cpu,cpuacct`.
    pub(super) links: Vec<(String, String)>,
}

/// Writes out the cgroup mounts of `spec`; does nothing on cgroup v2.
pub(super) fn expand(spec: &mut Spec, place: &Place) -> Result<Vec<Written>> {
    let directories = place.v1_directories();
    let mut written = Vec::new();
    if directories.is_empty() {
        return Ok(written);
    }
    let mut mounts = Vec::new();
    for mount in spec.mounts().iter().flatten() {
        if mount.typ().as_deref() == Some("cgroup") {
            mounts.extend(write_out(mount, &directories)?);
            written.push(Written {
                destination: mount.destination().clone(),
                read_only: is_read_only(mount),
                links: directories.iter().flat_map(|(name, _)| links(name)).collect(),
            });
        } else {
            mounts.push(mount.clone());
        }
    }
    spec.set_mounts(Some(mounts));
    Ok(written)
}

fn is_read_only(mount: &Mount) -> bool {
    let mut options = mount.options().iter().flatten();
    options.rfind(|option| matches!(option.as_str(), "ro" | "rw")).is_some_and(|option| option == "ro")
}

fn links(hierarchy: &str) -> Vec<(String, String)> {
    let names = hierarchy.split(',');
    names.filter(|&name| name != hierarchy).map(|name| (name.to_owned(), hierarchy.to_owned())).collect()
}

/// Returns the mounts for `directories`: name of each hierarchy, and the container's directory
/// inside. All are writable at first: the folders for the bind mounts are made in the tmpfs.
fn write_out(mount: &Mount, directories: &[(String, PathBuf)]) -> Result<Vec<Mount>> {
    let build = |source: &Path, kind: &str, destination: PathBuf, options: &[&str]| {
        let options = options.iter().map(|&option| option.to_owned()).collect::<Vec<_>>();
        MountBuilder::default().source(source).typ(kind).destination(destination).options(options).build()
    };
    let folder = mount.destination();
    let mut mounts =
        vec![build(Path::new("cgroup"), "tmpfs", folder.clone(), &["nosuid", "nodev", "noexec", "mode=755"])?];
    for (name, directory) in directories {
        mounts.push(build(directory, "bind", folder.join(name), &["bind", "nosuid", "nodev", "noexec"])?);
    }
    Ok(mounts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cgroup(options: &[&str]) -> Mount {
        let options = options.iter().map(|&option| option.to_owned()).collect::<Vec<_>>();
        MountBuilder::default().typ("cgroup").destination("/sys/fs/cgroup").options(options).build().unwrap()
    }

    #[test]
    fn each_hierarchy_shows_only_the_containers_part() {
        let directories = [("cpu,cpuacct".to_owned(), PathBuf::from("/sys/fs/cgroup/cpu,cpuacct/a/b"))];
        let mounts = write_out(&cgroup(&["ro"]), &directories).unwrap();
        assert_eq!(mounts[0].typ().as_deref(), Some("tmpfs"));
        assert_eq!(mounts[1].destination(), Path::new("/sys/fs/cgroup/cpu,cpuacct"));
        assert_eq!(mounts[1].source().as_deref(), Some(Path::new("/sys/fs/cgroup/cpu,cpuacct/a/b")));
    }

    #[test]
    fn the_last_word_on_writing_counts() {
        assert!(is_read_only(&cgroup(&["nosuid", "ro"])));
        assert!(!is_read_only(&cgroup(&["ro", "rw"])));
        assert!(!is_read_only(&cgroup(&[])));
    }

    #[test]
    fn controllers_that_share_a_hierarchy_have_links() {
        assert_eq!(
            links("cpu,cpuacct"),
            [("cpu".into(), "cpu,cpuacct".into()), ("cpuacct".into(), "cpu,cpuacct".into())]
        );
        assert!(links("memory").is_empty());
    }
}
