//! State directory of a container: libcontainer's files in libcontainer's formats, written
//! atomically for readers.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use libcontainer::config::YoukiConfig;
use libcontainer::container::{ContainerStatus, State};
use proc::Identity;
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use rustix::mount::UnmountFlags;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::FILE_LIMIT;
use super::error::{Context, Failure, Result};

const STATE: &str = "state.json";
const CONFIG: &str = "youki_config.json";
/// Our file: identity of the process behind `pid` in libcontainer's state.
const INIT: &str = "init.json";

/// Our folder: the container's root during a restore.
const ROOT: &str = "criu-root";
/// Our file: locked until init has become the user's program.
const STARTING: &str = "starting.lock";
/// Message for an existing id. Clients look for the last word.
const EXISTS: &str = "a container with this id exists";
/// Longest wait for a start; startContainer hooks may take their time.
const START_DEADLINE: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub(super) struct StateDirectory {
    path: PathBuf,
}

impl StateDirectory {
    pub(super) fn new(root: &Path, id: &str) -> Self {
        Self { path: root.join(id) }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the directory; fails if it exists.
    pub(super) fn create(&self) -> Result<()> {
        if let Some(root) = self.path.parent() {
            let mut builder = DirBuilder::new();
            builder.recursive(true).mode(0o711).create(root).context(|| format!("make {}", root.display()))?;
        }
        match DirBuilder::new().mode(0o711).create(&self.path) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(Failure::new(EXISTS)),
            Err(error) => Err(Failure::because(format!("make {}", self.path.display()), &error)),
        }
    }

    /// Fails if the directory exists.
    pub(super) fn expect_none(&self) -> Result<()> {
        if self.exists()? { Err(Failure::new(EXISTS)) } else { Ok(()) }
    }

    pub(super) fn exists(&self) -> Result<bool> {
        self.path.try_exists().context(|| format!("read {}", self.path.display()))
    }

    /// Mounts the container's root, with all mounts inside, for CRIU, which needs a mount point
    /// under no other mount.
    pub(super) fn mount_root(&self, rootfs: &Path) -> Result<PathBuf> {
        let path = self.path.join(ROOT);
        DirBuilder::new().mode(0o700).create(&path).context(|| format!("make {}", path.display()))?;
        rustix::mount::mount_bind_recursive(rootfs, &path)
            .context(|| format!("mount the root at {}", path.display()))?;
        Ok(path)
    }

    /// Undoes [`mount_root`](Self::mount_root).
    pub(super) fn unmount_root(&self) -> Result<()> {
        let path = self.path.join(ROOT);
        match rustix::mount::unmount(&path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            // Not mounted, or missing.
            Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
            Err(error) => return Err(error).context(|| format!("unmount {}", path.display())),
        }
        match fs::remove_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(error).context(|| format!("remove {}", path.display()))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn remove(&self) -> Result<()> {
        // First: the removal below must not find the container's root.
        self.unmount_root()?;
        match fs::remove_dir_all(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Failure::because(format!("remove {}", self.path.display()), &error))
            }
            _ => Ok(()),
        }
    }

    /// Releases the process waiting at a socket in the directory. libcontainer would change into
    /// the directory, but the caller may be the shim.
    pub(super) fn notify(&self, socket: &str) -> Result<()> {
        let notify = || -> io::Result<()> {
            let directory = File::open(&self.path)?;
            // Short enough for an address, however long the directory's path is.
            let path = format!("/proc/self/fd/{}/{socket}", directory.as_raw_fd());
            UnixStream::connect(path)?.write_all(b"start container")
        };
        notify().context(|| "tell the process to go on")
    }

    /// Returns a lock for the container's init to inherit: free once init has become the user's
    /// program, or is dead. Keep the lock until init has been cloned.
    pub(super) fn starting(&self) -> Result<File> {
        let path = self.path.join(STARTING);
        let lock = || -> io::Result<File> {
            let file = File::create(&path)?;
            rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)?;
            Ok(file)
        };
        lock().context(|| format!("lock {}", path.display()))
    }

    /// Waits until init has become the user's program; returns false at the deadline.
    pub(super) fn wait_started(&self) -> Result<bool> {
        let path = self.path.join(STARTING);
        let file = File::open(&path).context(|| format!("open {}", path.display()))?;
        let deadline = Instant::now() + START_DEADLINE;
        loop {
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared) {
                Ok(()) => return Ok(true),
                Err(Errno::WOULDBLOCK) if Instant::now() > deadline => return Ok(false),
                Err(Errno::WOULDBLOCK | Errno::INTR) => thread::sleep(Duration::from_millis(1)),
                Err(error) => return Err(error).context(|| format!("lock {}", path.display())),
            }
        }
    }

    pub(super) fn state(&self) -> Result<State> {
        self.read(STATE)
    }

    pub(super) fn save_state(&self, state: &State) -> Result<()> {
        self.write(STATE, state)
    }

    pub(super) fn config(&self) -> Result<YoukiConfig> {
        self.read(CONFIG)
    }

    pub(super) fn save_config(&self, config: &YoukiConfig) -> Result<()> {
        self.write(CONFIG, config)
    }

    pub(super) fn save_init(&self, init: Identity) -> Result<()> {
        self.write(INIT, &init)
    }

    /// Returns the container's init, if alive.
    fn live_init(&self, state: &State) -> Result<Option<Identity>> {
        let Some(pid) = state.pid else { return Ok(None) };
        let init: Identity = self.read(INIT)?;
        let is_alive = init.is_alive().context(|| "look for the container's init")?;
        Ok((init.pid.raw() == pid && is_alive).then_some(init))
    }

    /// Returns the state and its init; fails unless the container is alive and has one of these
    /// statuses. `action` names the refused action: "exec in".
    pub(super) fn expect(&self, action: &str, allowed: &[ContainerStatus]) -> Result<(State, Identity)> {
        if !self.exists()? {
            return Err(Failure::new("container does not exist"));
        }
        let state = self.state()?;
        let live = self.live_init(&state)?.filter(|_| state.status != ContainerStatus::Stopped);
        match live {
            Some(init) if allowed.contains(&state.status) => Ok((state, init)),
            // runc's message: clients look for it.
            Some(_) => Err(Failure::new(format!("cannot {action} a {} container", words(state.status)))),
            None => Err(Failure::new(format!("cannot {action} a stopped container"))),
        }
    }

    fn read<T: DeserializeOwned>(&self, name: &str) -> Result<T> {
        read_json(&self.path.join(name))
    }

    fn write<T: Serialize>(&self, name: &str, value: &T) -> Result<()> {
        let path = self.path.join(name);
        let write = || -> io::Result<()> {
            let mut file = tempfile::NamedTempFile::new_in(&self.path)?;
            serde_json::to_writer(io::BufWriter::new(&mut file), value)?;
            file.persist(&path)?;
            Ok(())
        };
        write().context(|| format!("write {}", path.display()))
    }
}

fn words(status: ContainerStatus) -> &'static str {
    match status {
        ContainerStatus::Creating => "half-created",
        ContainerStatus::Created => "created",
        ContainerStatus::Running => "running",
        ContainerStatus::Stopped => "stopped",
        ContainerStatus::Paused => "paused",
    }
}

/// Reads a file possibly written by others.
pub(super) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let read = || -> io::Result<T> {
        let mut bytes = Vec::new();
        File::open(path)?.take(FILE_LIMIT).read_to_end(&mut bytes)?;
        Ok(serde_json::from_slice(&bytes)?)
    };
    read().context(|| format!("read {}", path.display()))
}

#[cfg(test)]
mod tests {
    use proc::HostPid;

    use super::*;

    #[test]
    fn state_is_read_back_as_written() {
        let root = tempfile::tempdir().unwrap();
        let directory = StateDirectory::new(&root.path().join("new"), "one");
        assert!(!directory.exists().unwrap());
        directory.create().unwrap();
        let state = State::new("one", ContainerStatus::Paused, Some(3), "/bundle".into());
        directory.save_state(&state).unwrap();
        let read = directory.state().unwrap();
        assert_eq!((read.status, read.pid, read.bundle), (ContainerStatus::Paused, Some(3), "/bundle".into()));
        // libcontainer can read the file too.
        assert_eq!(State::load(directory.path()).unwrap().id, "one");
        directory.remove().unwrap();
        directory.remove().unwrap();
        assert!(!directory.exists().unwrap());
    }

    #[test]
    fn two_containers_cannot_have_one_id() {
        let root = tempfile::tempdir().unwrap();
        let directory = StateDirectory::new(root.path(), "one");
        directory.create().unwrap();
        let message = directory.create().unwrap_err().to_string();
        assert!(message.contains("exists"), "{message}");
    }

    #[test]
    fn the_start_is_over_when_nobody_holds_the_lock() {
        let root = tempfile::tempdir().unwrap();
        let directory = StateDirectory::new(root.path(), "one");
        directory.create().unwrap();
        let lock = directory.starting().unwrap();
        let inherited = lock.try_clone().unwrap();
        drop(lock);
        let start = Instant::now();
        let init = thread::spawn(move || {
            thread::sleep(Duration::from_millis(50));
            drop(inherited);
        });
        assert!(directory.wait_started().unwrap());
        assert!(start.elapsed() >= Duration::from_millis(50));
        init.join().unwrap();
    }

    #[test]
    fn a_pid_without_its_process_is_no_init() {
        let root = tempfile::tempdir().unwrap();
        let directory = StateDirectory::new(root.path(), "one");
        directory.create().unwrap();
        let own = Identity::of(HostPid::own()).unwrap();
        let state = State::new("one", ContainerStatus::Running, Some(own.pid.raw()), "/bundle".into());
        directory.save_state(&state).unwrap();
        directory.save_init(Identity { start_time: own.start_time + 1, ..own }).unwrap();
        let expect = |status| directory.expect("exec in", &[status]).map_err(|failure| failure.to_string());
        assert_eq!(expect(ContainerStatus::Running).unwrap_err(), "cannot exec in a stopped container");
        directory.save_init(own).unwrap();
        assert_eq!(expect(ContainerStatus::Running).unwrap().1, own);
        assert_eq!(expect(ContainerStatus::Paused).unwrap_err(), "cannot exec in a running container");
    }
}
