//! Being told of out-of-memory kills.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::inotify;
use rustix::io::Errno;
use tokio::io::unix::AsyncFd;
use tokio::time::Instant;

use crate::{Cgroup, CgroupError, file, sys, v1};

/// The v1 kernel tells of the want of memory before it chooses whom to kill for it. This is how long to wait for the
/// kill to be counted; there may be none, when memory was found after all.
const KILL_FOLLOWS: Duration = Duration::from_millis(250);

/// How often the count is looked at meanwhile.
const PAUSE: Duration = Duration::from_millis(5);

/// Tells of out-of-memory kills.
#[derive(Debug)]
pub struct OomWatch {
    events: AsyncFd<OwnedFd>,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    V1 {
        cgroup: Cgroup,
        /// A file that is there as long as the cgroup is.
        control: PathBuf,
        /// Kills that the caller was told of.
        kills: u64,
        /// Set from the kernel's notification until it is passed on. Kept here, and not in the future that waits, so
        /// that nothing is lost when that future is dropped.
        notified: Option<Instant>,
    },
    V2 {
        directory: PathBuf,
        /// The watch of memory.events.
        memory: i32,
        /// The cgroup was seen to be empty.
        ended: bool,
    },
}

pub(crate) fn watch_v1(cgroup: Cgroup, directories: &v1::Directories) -> Result<OomWatch, CgroupError> {
    let Some(memory) = directories.get("memory") else {
        return Err(CgroupError::NoMemoryController { path: directories.of_processes().to_owned() });
    };
    let error = |action, path: &Path| {
        let path = path.to_owned();
        move |source: io::Error| CgroupError::File { action, path, source }
    };
    let path = memory.join("memory.oom_control");
    let oom_control = std::fs::File::open(&path).map_err(error("open", &path))?;
    let control = memory.join("cgroup.event_control");
    let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
        .map_err(io::Error::from)
        .map_err(error("make an eventfd for", &control))?;
    // The kernel keeps what it needs of both: the second may be closed afterwards.
    file::write(&control, &format!("{} {}", event.as_raw_fd(), oom_control.as_raw_fd()))?;
    let events = sys::pollable(event).map_err(error("poll the eventfd of", &control))?;
    let kills = cgroup.oom_kills();
    Ok(OomWatch { events, kind: Kind::V1 { cgroup, control, kills, notified: None } })
}

pub(crate) fn watch_v2(directory: &Path) -> Result<OomWatch, CgroupError> {
    let memory = directory.join("memory.events");
    if !memory.exists() {
        return Err(CgroupError::NoMemoryController { path: directory.to_owned() });
    }
    let error = |path: &Path| {
        let path = path.to_owned();
        move |source: io::Error| CgroupError::File { action: "watch", path, source }
    };
    let inotify = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)
        .map_err(io::Error::from)
        .map_err(error(&memory))?;
    let watch = |path: &Path| {
        inotify::add_watch(&inotify, path, inotify::WatchFlags::MODIFY).map_err(io::Error::from).map_err(error(path))
    };
    let memory = watch(&memory)?;
    // The kernel does not tell that a cgroup is removed, only that it has become empty, which comes before.
    watch(&directory.join("cgroup.events"))?;
    let events = sys::pollable(inotify).map_err(error(directory))?;
    Ok(OomWatch { events, kind: Kind::V2 { directory: directory.to_owned(), memory, ended: false } })
}

impl OomWatch {
    /// Waits for the next notification; the caller asks [`Cgroup::oom_kills`] what happened, which may be that nobody
    /// was killed. `None` when the cgroup is gone, or, on v2, has become empty. It may be dropped at any time without
    /// losing a notification.
    pub async fn next(&mut self) -> Option<()> {
        let events = &self.events;
        match &mut self.kind {
            Kind::V1 { cgroup, control, kills, notified } => {
                let since = match *notified {
                    Some(since) => since,
                    None => {
                        drain(events, |fd| rustix::io::read(fd, &mut [0_u8; 8]).map(|_| ())).await?;
                        *notified.insert(Instant::now())
                    }
                };
                while cgroup.oom_kills() <= *kills && since.elapsed() < KILL_FOLLOWS && control.exists() {
                    tokio::time::sleep(PAUSE).await;
                }
                // Removing the cgroup is the last thing the kernel tells.
                if !control.exists() {
                    return None;
                }
                *notified = None;
                *kills = cgroup.oom_kills();
                Some(())
            }
            Kind::V2 { directory, memory, ended } => loop {
                if *ended {
                    return None;
                }
                let mut modified = false;
                drain(events, |fd| {
                    let mut buffer = [MaybeUninit::uninit(); 1024];
                    let mut reader = inotify::Reader::new(fd, &mut buffer);
                    loop {
                        modified |= reader.next()?.wd() == *memory;
                        if reader.is_buffer_empty() {
                            return Ok(());
                        }
                    }
                })
                .await?;
                // Also when the file is gone.
                *ended = file::pairs(&directory.join("cgroup.events")).is_ok_and(|events| events.get("populated") == 0);
                if modified {
                    return Some(());
                }
            },
        }
    }
}

/// Waits until `read` finds something. `None` when the descriptor cannot be waited for or read.
async fn drain(
    events: &AsyncFd<OwnedFd>,
    mut read: impl FnMut(std::os::fd::BorrowedFd<'_>) -> Result<(), Errno>,
) -> Option<()> {
    loop {
        let mut ready = events.readable().await.ok()?;
        match ready.try_io(|fd| read(fd.get_ref().as_fd()).map_err(io::Error::from)) {
            Ok(Ok(())) => return Some(()),
            Ok(Err(error)) => {
                tracing::warn!(%error, "cannot read out-of-memory events");
                return None;
            }
            Err(_would_block) => {}
        }
    }
}
