//! Taking a process out of a container's cgroup, where it only was so that what it made would be there.

use std::path::{Path, PathBuf};

use crate::{Cgroup, CgroupError, file};

/// Moves a process to where this one is, in the hierarchy that decides who is in the container.
pub(crate) fn expel(cgroup: &Cgroup, pid: i32) -> Result<(), CgroupError> {
    let own = Cgroup::of_process(i32::try_from(std::process::id()).unwrap_or(0));
    let root = root_of(cgroup.directory());
    let to = match own {
        Ok(own) if root_of(own.directory()) == root => own.directory().to_owned(),
        // This process is in the hierarchy's root.
        _ => root,
    };
    file::write(&to.join("cgroup.procs"), &pid.to_string())
}

/// The highest directory above that is a cgroup.
fn root_of(directory: &Path) -> PathBuf {
    let cgroups = directory.ancestors().take_while(|above| above.join("cgroup.procs").exists());
    cgroups.last().unwrap_or(directory).to_owned()
}
