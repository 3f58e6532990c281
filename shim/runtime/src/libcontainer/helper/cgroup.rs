//! libcgroups' part of a container's cgroup: creation and limits. The crate `cgroup` does the rest,
//! also the removal: the one in libcgroups looks at one level, signals by pid and gives up after
//! three short waits.

use cgroup::Place;
use libcgroups::common::{AnyCgroupManager, CgroupConfig, CgroupManager, create_cgroup_manager};

use super::error::{Context, Result};

pub(super) fn config(place: &Place, id: &str) -> CgroupConfig {
    CgroupConfig {
        cgroup_path: place.path().to_owned(),
        systemd_cgroup: place.is_systemd(),
        container_name: id.to_owned(),
    }
}

pub(super) fn manager(place: &Place, id: &str) -> Result<AnyCgroupManager> {
    create_cgroup_manager(config(place, id)).context(|| format!("use the cgroup {}", place.path().display()))
}

/// Kills every process in the container's cgroup and removes the cgroup, with all below.
pub(super) fn remove(place: &Place, id: &str) -> Result<()> {
    if place.is_systemd() {
        // systemd drops an empty unit, with its directory.
        place.cgroup()?.signal_all(rustix::process::Signal::KILL)?;
        manager(place, id)?.remove().context(|| format!("have systemd remove {}", place.path().display()))?;
    }
    Ok(place.remove()?)
}
