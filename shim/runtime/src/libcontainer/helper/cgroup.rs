//! libcgroups' part of a container's cgroup: making it and setting its limits. The rest is the crate `cgroup`'s, and so is
//! the removal: that of libcgroups looks at one level, signals by pid and gives up after three short waits.

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

/// Kills every process in the container's cgroup and removes it, with all below it.
pub(super) fn remove(place: &Place, id: &str) -> Result<()> {
    if place.is_systemd() {
        // systemd lets go of a unit when nobody is in it; its directory goes with it.
        place.cgroup()?.signal_all(rustix::process::Signal::KILL)?;
        manager(place, id)?.remove().context(|| format!("have systemd remove {}", place.path().display()))?;
    }
    Ok(place.remove()?)
}
