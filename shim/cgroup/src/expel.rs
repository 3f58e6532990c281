//! Taking a process out of a container's cgroup, where it only was so that what it made would be there.

use std::path::{Path, PathBuf};

use proc::HostPid;

use crate::{Cgroup, CgroupError, file};

/// Moves a process to where another one is, in the hierarchy that decides who is in the container.
pub(crate) fn expel(cgroup: &Cgroup, pid: HostPid, beside: HostPid) -> Result<(), CgroupError> {
    let other = Cgroup::of_process(beside);
    let root = root_of(cgroup.directory());
    let to = match other {
        Ok(other) if root_of(other.directory()) == root => other.directory().to_owned(),
        // It is in the hierarchy's root.
        _ => root,
    };
    file::write(&to.join("cgroup.procs"), &pid.to_string())
}

/// The highest directory above that is a cgroup.
fn root_of(directory: &Path) -> PathBuf {
    let cgroups = directory.ancestors().take_while(|above| above.join("cgroup.procs").exists());
    cgroups.last().unwrap_or(directory).to_owned()
}
