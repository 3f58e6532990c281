//! Taking a process out of a container's cgroup, where it only was so that what it made would be there.

use std::path::{Path, PathBuf};

use crate::{Cgroup, CgroupError, Hierarchy, file};

/// Moves a process to where this one is, in the hierarchy that decides who is in the container.
pub(crate) fn expel(cgroup: &Cgroup, pid: i32) -> Result<(), CgroupError> {
    let own = Cgroup::of_process(i32::try_from(std::process::id()).unwrap_or(0));
    let to = match (own, &cgroup.hierarchy) {
        (Ok(own), Hierarchy::V1(_)) if is_below_one_root(own.directory(), cgroup.directory()) => {
            own.directory().to_owned()
        }
        (Ok(own), Hierarchy::V2(_)) => own.directory().to_owned(),
        // This process is in the hierarchy's root.
        _ => root_of(cgroup.directory()),
    };
    file::write(&to.join("cgroup.procs"), &pid.to_string())
}

fn is_below_one_root(one: &Path, other: &Path) -> bool {
    root_of(one) == root_of(other)
}

/// The highest directory above that is a cgroup.
fn root_of(directory: &Path) -> PathBuf {
    let cgroups = directory.ancestors().take_while(|above| above.join("cgroup.procs").exists());
    cgroups.last().unwrap_or(directory).to_owned()
}
