//! Common to all sentences: this process's reaper, and the files for every container's root.

use std::fmt;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use reaper::Reaper;
use runtime::OciRuntime;
use runtime::command::Command;
use runtime::libcontainer::Libcontainer;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::process::Pid;
use tempfile::TempDir;
use tokio::runtime::Handle;

/// The runtimes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Which {
    Libcontainer,
    Runc,
    Crun,
}

impl Which {
    pub(crate) const ALL: [Self; 3] = [Self::Libcontainer, Self::Runc, Self::Crun];
}

impl fmt::Display for Which {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Libcontainer => "libcontainer",
            Self::Runc => "runc",
            Self::Crun => "crun",
        })
    }
}

pub(crate) struct World {
    pub(crate) handle: Handle,
    pub(crate) reaper: Reaper,
    /// Parent folder of all files of this run.
    folder: TempDir,
    /// Parent cgroup of all cgroups of this run, in every hierarchy.
    pub(crate) cgroup: String,
    crun: PathBuf,
    ids: AtomicU32,
}

impl World {
    /// Makes the world. `Err` is the reason for skipping every sentence here.
    pub(crate) fn start() -> Result<Self, String> {
        if !rustix::process::geteuid().is_root() {
            return Err("needs root".into());
        }
        let busybox = static_busybox()?;
        rustix::process::set_child_subreaper(Pid::from_raw(1)).map_err(|error| error.to_string())?;
        // Under /run, a tmpfs, like containerd's bundles: an overlay can lie on it.
        let folder = tempfile::Builder::new()
            .prefix("gpusnap-contract-")
            .tempdir_in("/run")
            .map_err(|error| format!("cannot make a folder in /run: {error}"))?;
        // All mounts are shared, as on a machine with systemd: a runtime's mounts must not show up
        // here. And users of a container must get through to its root.
        rustix::mount::mount("tmpfs", folder.path(), "tmpfs", MountFlags::empty(), Some(c"mode=755"))
            .and_then(|()| rustix::mount::mount_change(folder.path(), MountPropagationFlags::SHARED))
            .map_err(|error| format!("cannot mount a tmpfs: {error}"))?;
        make_files(&busybox, &folder.path().join("files"))
            .map_err(|error| format!("cannot copy {busybox:?}: {error}"))?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let handle = runtime.handle().clone();
        std::thread::spawn(move || runtime.block_on(std::future::pending::<()>()));
        let reaper = handle.block_on(async { Reaper::start() }).map_err(|error| error.to_string())?;
        let cgroup = format!("gpusnap-contract-{}", std::process::id());
        let crun = crun(folder.path());
        Ok(Self { handle, reaper, folder, cgroup, crun, ids: AtomicU32::new(0) })
    }

    /// Returns the reason for skipping a runtime here.
    pub(crate) fn missing(&self, which: Which) -> Option<String> {
        match which {
            Which::Libcontainer => None,
            Which::Runc | Which::Crun => find(&which.to_string()).is_none().then(|| format!("no {which} in PATH")),
        }
    }

    pub(crate) fn runtime(&self, which: Which, root: PathBuf) -> Arc<dyn OciRuntime> {
        let reaper = self.reaper.clone();
        match which {
            Which::Libcontainer => Arc::new(Libcontainer::new(reaper, root, false)),
            Which::Runc => Arc::new(Command::new(reaper, "runc".into(), root, false)),
            Which::Crun => Arc::new(Command::new(reaper, self.crun.clone(), root, false)),
        }
    }

    /// Returns a number unique in this run.
    pub(crate) fn number(&self) -> u32 {
        self.ids.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Returns the lower layer of every container's root.
    pub(crate) fn files(&self) -> PathBuf {
        self.folder.path().join("files")
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.folder(), UnmountFlags::DETACH);
        // Runtimes remove a container's cgroup, but not its parents.
        for hierarchy in cgroup_hierarchies() {
            let _ = fs::remove_dir(hierarchy.join(&self.cgroup));
        }
    }
}

/// Returns the folders of /sys/fs/cgroup for making cgroups.
pub(crate) fn cgroup_hierarchies() -> Vec<PathBuf> {
    let top = Path::new("/sys/fs/cgroup");
    if top.join("cgroup.procs").exists() {
        return vec![top.to_owned()];
    }
    let entries = fs::read_dir(top).unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| path.join("cgroup.procs").exists()).collect()
}

/// Returns a crun for machines with v1 controllers. crun refuses to run if the unified hierarchy
/// has controllers too, even just those missing from v1. A mount namespace hides the unified
/// hierarchy from crun then.
fn crun(folder: &Path) -> PathBuf {
    let controllers = fs::read_to_string("/sys/fs/cgroup/unified/cgroup.controllers").unwrap_or_default();
    if controllers.trim().is_empty() {
        return "crun".into();
    }
    let script = "#!/bin/sh\nexec unshare --mount --propagation unchanged sh -c 'umount -l /sys/fs/cgroup/unified; exec crun \"$@\"' crun \"$@\"\n";
    let path = folder.join("crun");
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(program)).find(|path| path.is_file())
}

fn static_busybox() -> Result<PathBuf, String> {
    let path = find("busybox").ok_or("no busybox in PATH")?;
    let content = fs::read(&path).map_err(|error| format!("cannot read {}: {error}", path.display()))?;
    if !is_static(&content) {
        return Err(format!("{} is not a static program", path.display()));
    }
    Ok(path)
}

/// Returns whether an ELF file of 64 bits and this machine's byte order names no dynamic linker
/// (PT_INTERP, 3 in elf.h).
fn is_static(elf: &[u8]) -> bool {
    let number = |at: usize, length: usize| -> Option<usize> {
        let mut bytes = [0; size_of::<usize>()];
        bytes[..length].copy_from_slice(elf.get(at..at + length)?);
        Some(usize::from_le_bytes(bytes))
    };
    let kinds = || {
        let (headers, size, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
        (0..count).map(|index| number(headers + index * size, 4)).collect::<Option<Vec<_>>>()
    };
    elf.starts_with(b"\x7fELF") && kinds().is_some_and(|kinds| !kinds.contains(&3))
}

/// Applets for the sentences.
const APPLETS: [&str; 37] = [
    "cat", "chmod", "cp", "cut", "dd", "echo", "env", "false", "find", "grep", "head", "hostname", "id", "kill", "ln",
    "ls", "mkdir", "mknod", "mount", "mv", "nc", "ps", "pwd", "readlink", "rm", "setsid", "sh", "sleep", "sort",
    "stat", "stty", "tail", "test", "touch", "tr", "true", "tty",
];

fn make_files(busybox: &Path, files: &Path) -> std::io::Result<()> {
    for folder in ["bin", "dev", "etc", "home/user", "mnt", "proc", "run", "sys", "tmp", "var"] {
        fs::create_dir_all(files.join(folder))?;
    }
    fs::set_permissions(files.join("tmp"), fs::Permissions::from_mode(0o1777))?;
    fs::copy(busybox, files.join("bin/busybox"))?;
    for applet in APPLETS {
        symlink("busybox", files.join("bin").join(applet))?;
    }
    fs::write(files.join("etc/passwd"), "root:x:0:0:root:/:/bin/sh\nuser:x:1000:1000:user:/home/user:/bin/sh\n")?;
    fs::write(files.join("etc/group"), "root:x:0:\nuser:x:1000:\n")?;
    fs::write(files.join("etc/hostname"), "lower\n")?;
    Ok(())
}
