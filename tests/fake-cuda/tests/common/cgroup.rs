//! Freezes processes like containerd.

use std::fs;
use std::path::PathBuf;

/// A cgroup of the freezer, version 1 or 2.
pub(crate) struct Cgroup {
    folder: PathBuf,
    version_2: bool,
}

impl Cgroup {
    pub(crate) fn new(pid: u32) -> Result<Self, String> {
        let version_2 = PathBuf::from("/sys/fs/cgroup/cgroup.controllers").exists();
        let hierarchy = if version_2 { "/sys/fs/cgroup" } else { "/sys/fs/cgroup/freezer" };
        let folder = PathBuf::from(hierarchy).join(format!("fake-cuda-{pid}"));
        fs::create_dir(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
        let cgroup = Self { folder, version_2 };
        fs::write(cgroup.folder.join("cgroup.procs"), pid.to_string()).map_err(|error| error.to_string())?;
        Ok(cgroup)
    }

    pub(crate) fn freeze(&self, frozen: bool) {
        let (file, text, state, done) = match (self.version_2, frozen) {
            (true, true) => ("cgroup.freeze", "1", "cgroup.events", "frozen 1"),
            (true, false) => ("cgroup.freeze", "0", "cgroup.events", "frozen 0"),
            (false, true) => ("freezer.state", "FROZEN", "freezer.state", "FROZEN"),
            (false, false) => ("freezer.state", "THAWED", "freezer.state", "THAWED"),
        };
        fs::write(self.folder.join(file), text).unwrap();
        super::eventually(done, || fs::read_to_string(self.folder.join(state)).unwrap().contains(done));
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        self.freeze(false);
        // The process is killed at the end of the test; an empty cgroup can be removed.
        let procs = if self.version_2 { "/sys/fs/cgroup/cgroup.procs" } else { "/sys/fs/cgroup/freezer/cgroup.procs" };
        for pid in fs::read_to_string(self.folder.join("cgroup.procs")).unwrap_or_default().lines() {
            let _gone = fs::write(procs, pid);
        }
        let _removed = fs::remove_dir(&self.folder);
    }
}
