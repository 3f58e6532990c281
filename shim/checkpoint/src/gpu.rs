//! The GPUs of a checkpoint, and their substitutes on this node.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use cuda::{Gpu, Inventory, Pair};
use gpu::{Suspended, SuspendedProcess};
use proc::{ContainerPid, HostPid};
use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, Uid};
use serde::{Deserialize, Serialize};

/// GPU state of a checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SavedGpus {
    /// The driver's version.
    driver: String,
    /// GPUs that the container could use.
    gpus: Vec<Gpu>,
    /// The container's CUDA processes.
    processes: Vec<SuspendedProcess>,
    /// Number of processes with devices of the driver beside the moved state, replaced in the images.
    cleaned: usize,
}

impl SavedGpus {
    /// Describes a suspended container; `None` without CUDA. `given` are the configuration's
    /// devices. If a hook brings the GPUs, the configuration has none, and the nodes visible to the
    /// process `init` are the only source.
    #[must_use]
    pub fn of(suspended: Suspended, given: &[DeviceNode], init: HostPid) -> Option<Self> {
        let Suspended { inventory, processes, devices, staging: _ } = suspended;
        if processes.is_empty() && devices.is_empty() {
            return None;
        }
        let Inventory { driver, gpus } = inventory.unwrap_or_default();
        // The driver's library makes nodes of all the machine's GPUs if permitted, but cannot open
        // them.
        let mut minors = DeviceNode::gpu_minors(given);
        if minors.is_empty() {
            minors = nodes_of(init);
        }
        let mut gpus = of_nodes(gpus, &minors);
        for gpu in &mut gpus {
            gpu.processes.clear();
        }
        Some(Self { driver, gpus, processes, cleaned: devices.len() })
    }

    /// The driver's version.
    #[must_use]
    pub fn driver(&self) -> &str {
        &self.driver
    }

    /// GPUs that the container could use.
    #[must_use]
    pub fn gpus(&self) -> &[Gpu] {
        &self.gpus
    }

    /// Bytes that the driver moved to a process's memory; `None` without CUDA.
    #[must_use]
    pub fn staged(&self, pid: ContainerPid) -> Option<u64> {
        self.processes.iter().find(|process| process.pid == pid).map(|process| process.staged)
    }

    /// Returns whether a process has state on a GPU.
    #[must_use]
    pub fn has_state(&self) -> bool {
        !self.processes.is_empty()
    }

    /// Pairs each saved GPU with a substitute on this node; empty if all GPUs are the same.
    /// `minors` are the new container's GPUs, if known.
    ///
    /// # Errors
    /// The mismatch, in words.
    pub fn pairs(&self, node: &Inventory, minors: &[u32]) -> Result<Vec<Pair>, String> {
        let here = of_nodes(node.gpus.clone(), minors);
        // The library is part of the saved processes, and fits its own kernel module only.
        if !self.driver.is_empty() && self.driver != node.driver {
            return Err(format!("it was made with NVIDIA driver {}, and this is {}", self.driver, node.driver));
        }
        if self.gpus.iter().all(|old| here.iter().any(|new| new.uuid == old.uuid)) {
            return Ok(Vec::new());
        }
        if here.len() < self.gpus.len() {
            return Err(format!("it needs {} GPUs, and the container has {}", self.gpus.len(), here.len()));
        }
        let pair = |(old, new): (&Gpu, &Gpu)| {
            if old.name != new.name {
                return Err(format!("it was made on a GPU {}, and this is {}", old.name, new.name));
            }
            if new.memory < old.memory {
                return Err(format!("GPU {} has less memory than {} had", new.uuid, old.uuid));
            }
            Ok(Pair { old: old.uuid.clone(), new: new.uuid.clone() })
        };
        self.gpus.iter().zip(&here).map(pair).collect()
    }
}

/// GPUs with these minor numbers; all GPUs if no number is known.
fn of_nodes(mut gpus: Vec<Gpu>, minors: &[u32]) -> Vec<Gpu> {
    if !minors.is_empty() {
        gpus.retain(|gpu| minors.contains(&gpu.minor));
    }
    gpus.sort_by_key(|gpu| gpu.minor);
    gpus
}

/// N of every `/dev/nvidiaN` visible to a process.
fn nodes_of(pid: HostPid) -> Vec<u32> {
    let Ok(nodes) = std::fs::read_dir(pid.path("root/dev")) else { return Vec::new() };
    nodes.flatten().filter_map(|node| minor(Path::new(&node.file_name()))).collect()
}

/// N of `nvidiaN`.
fn minor(node: &Path) -> Option<u32> {
    node.file_name()?.to_str()?.strip_prefix("nvidia")?.parse().ok()
}

/// A device of the container's configuration.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DeviceNode {
    path: PathBuf,
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    major: u32,
    #[serde(default)]
    minor: u32,
    file_mode: Option<u32>,
    uid: Option<u32>,
    gid: Option<u32>,
}

impl DeviceNode {
    /// The path in the container.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// N of every `/dev/nvidiaN` among the nodes.
    #[must_use]
    pub fn gpu_minors(nodes: &[Self]) -> Vec<u32> {
        nodes.iter().filter_map(|node| minor(&node.path)).collect()
    }

    fn is_nvidias(&self) -> bool {
        self.path.starts_with("/dev") && self.path.to_string_lossy().starts_with("/dev/nvidia")
    }

    /// Makes NVIDIA's nodes that a process lacks: its `/dev` came out of the checkpoint, with the
    /// nodes of the former GPUs.
    ///
    /// # Errors
    /// A node that cannot be made.
    pub fn make_missing(nodes: &[Self], pid: HostPid) -> io::Result<()> {
        for node in nodes.iter().filter(|node| node.is_nvidias()) {
            node.make_for(pid)?;
        }
        Ok(())
    }

    fn make_for(&self, pid: HostPid) -> io::Result<()> {
        let inside = self.path.strip_prefix("/").unwrap_or(&self.path);
        // The folder may be a link made by the container, which must not lead outside.
        let root = std::fs::File::open(pid.path("root"))?;
        let (Some(folder), Some(name)) = (inside.parent(), inside.file_name()) else { return Ok(()) };
        let resolve = rustix::fs::ResolveFlags::IN_ROOT | rustix::fs::ResolveFlags::NO_MAGICLINKS;
        let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC;
        let folder = match rustix::fs::openat2(&root, folder, flags, Mode::empty(), resolve) {
            Ok(folder) => folder,
            // A folder such as nvidia-caps is not needed if the checkpoint did not have it.
            Err(rustix::io::Errno::NOENT) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let kind = if self.kind == "b" { FileType::BlockDevice } else { FileType::CharacterDevice };
        let mode = Mode::from_raw_mode(self.file_mode.unwrap_or(0o666));
        match rustix::fs::mknodat(&folder, name, kind, mode, rustix::fs::makedev(self.major, self.minor)) {
            Err(rustix::io::Errno::EXIST) => return Ok(()),
            made => made?,
        }
        own(&folder, name, (kind, rustix::fs::makedev(self.major, self.minor)), mode, (self.uid, self.gid))
    }
}

/// Sets the owner and the permissions of a new node, which a umask may have reduced. Anything put
/// in the node's place meanwhile, such as a link that leads outside, stays unchanged.
fn own(
    folder: &OwnedFd,
    name: &OsStr,
    (kind, device): (FileType, u64),
    mode: Mode,
    (uid, gid): (Option<u32>, Option<u32>),
) -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let node = rustix::fs::openat(folder, name, flags, Mode::empty())?;
    let stat = rustix::fs::fstat(&node)?;
    if FileType::from_raw_mode(stat.st_mode) != kind || stat.st_rdev != device {
        return Ok(());
    }
    let by_descriptor = format!("/proc/self/fd/{}", node.as_raw_fd());
    rustix::fs::chmodat(CWD, by_descriptor, mode, AtFlags::empty())?;
    Ok(rustix::fs::chownat(&node, "", uid.map(Uid::from_raw), gid.map(Gid::from_raw), AtFlags::EMPTY_PATH)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpu(minor: u32, uuid: &str, name: &str) -> Gpu {
        let (uuid, name) = (uuid.to_owned(), name.to_owned());
        Gpu { uuid, name, minor, memory: 80 << 30, free: None, mig: false, persistence: true, processes: vec![] }
    }

    fn node(gpus: Vec<Gpu>) -> Inventory {
        Inventory { driver: "580.159.04".into(), gpus }
    }

    fn saved(gpus: Vec<Gpu>) -> SavedGpus {
        SavedGpus { driver: "580.159.04".into(), gpus, processes: vec![], cleaned: 0 }
    }

    #[test]
    fn the_same_gpus_need_no_pairs() {
        let node = node(vec![gpu(0, "GPU-a", "H100"), gpu(1, "GPU-b", "H100")]);
        assert_eq!(saved(vec![gpu(1, "GPU-b", "H100")]).pairs(&node, &[]).unwrap(), []);
        assert_eq!(saved(vec![gpu(1, "GPU-b", "H100")]).pairs(&node, &[1]).unwrap(), []);
    }

    #[test]
    fn other_gpus_take_their_place_in_order() {
        let node = node(vec![gpu(3, "GPU-d", "H100"), gpu(2, "GPU-c", "H100"), gpu(0, "GPU-a", "H100")]);
        let pairs = saved(vec![gpu(1, "GPU-x", "H100"), gpu(0, "GPU-a", "H100")]).pairs(&node, &[2, 3]).unwrap();
        let pair = |old: &str, new: &str| Pair { old: old.into(), new: new.into() };
        assert_eq!(pairs, [pair("GPU-x", "GPU-c"), pair("GPU-a", "GPU-d")]);
    }

    #[test]
    fn what_does_not_fit_is_told() {
        let node = node(vec![gpu(0, "GPU-c", "A100")]);
        let why = |gpus| saved(gpus).pairs(&node, &[0]).unwrap_err();
        assert!(why(vec![gpu(0, "GPU-a", "H100")]).contains("A100"));
        assert!(why(vec![gpu(0, "GPU-a", "A100"), gpu(1, "GPU-b", "A100")]).contains("needs 2"));
        let old = SavedGpus { driver: "570.1".into(), ..saved(vec![gpu(0, "GPU-c", "A100")]) };
        assert!(old.pairs(&node, &[]).unwrap_err().contains("570.1"));
    }

    #[test]
    fn a_link_in_the_place_of_a_node_keeps_what_it_leads_to_as_it_is() {
        use std::os::unix::fs::PermissionsExt;
        let (dev, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let victim = outside.path().join("victim");
        std::fs::write(&victim, "").unwrap();
        std::fs::set_permissions(&victim, PermissionsExt::from_mode(0o600)).unwrap();
        std::os::unix::fs::symlink(&victim, dev.path().join("nvidia0")).unwrap();
        std::fs::write(dev.path().join("nvidia1"), "").unwrap();
        let folder: OwnedFd = std::fs::File::open(dev.path()).unwrap().into();
        for name in ["nvidia0", "nvidia1"] {
            let device = (FileType::CharacterDevice, rustix::fs::makedev(195, 0));
            own(&folder, name.as_ref(), device, Mode::from_raw_mode(0o666), (Some(1000), Some(1000))).unwrap();
        }
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&victim), 0o600);
        assert_ne!(mode(&dev.path().join("nvidia1")), 0o666);
    }

    #[test]
    fn only_numbered_nodes_are_gpus() {
        assert_eq!(minor(Path::new("/dev/nvidia12")), Some(12));
        assert_eq!(minor(Path::new("nvidiactl")), None);
        assert_eq!(minor(Path::new("nvidia-uvm")), None);
    }
}
