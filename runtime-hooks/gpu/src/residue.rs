//! Removing what a process has inherited of its parent's use of CUDA.
//!
//! A process that was forked from one that uses CUDA has the driver's devices mapped and open, but no use for them: the
//! parent's contexts are not usable in it. CRIU cannot dump it like that. So its mappings of devices become inaccessible
//! memory, and its descriptors of devices become /dev/null.
//!
//! Neither is simply removed. libcuda still believes in them, and cleans up when the process ends: by then another file
//! or another mapping would be in their place.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

use cgroup::Cgroup;
use proc::{HostPid, Range, Status};
use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

#[cfg(test)]
mod tests;

use tracee::hold::{Hold, HoldError, ReleaseError, Scope};
use tracee::inject::{InjectError, Injector, answer, argument};
use tracee::process::{self, DeviceFd, DeviceMapping};

/// The null device, as a C string.
const NULL: &[u8] = b"/dev/null\0";

/// Numbers of what was cleaned in a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cleaned {
    /// Number of mappings that were replaced.
    pub(crate) mappings: usize,
    /// Number of descriptors that were replaced, or closed if there is no /dev/null.
    pub(crate) fds: usize,
}

/// Why a process was not, or not wholly, cleaned. It runs on in any case.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ResidueError {
    /// It is in a frozen cgroup, in which nothing can be cleaned.
    #[error("cannot clean process {pid}: it is in a frozen cgroup")]
    Frozen {
        /// The process.
        pid: HostPid,
    },
    /// Its threads cannot be held.
    #[error("cannot hold process {pid} to clean it")]
    Hold {
        /// The process.
        pid: HostPid,
        /// Why not.
        #[source]
        source: HoldError,
    },
    /// Its mappings or descriptors cannot be listed.
    #[error("cannot list what process {pid} has of the driver")]
    List {
        /// The process.
        pid: HostPid,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A call could not be made in it.
    #[error("cannot clean process {pid}")]
    Inject {
        /// The process.
        pid: HostPid,
        /// Why not.
        #[source]
        source: InjectError,
    },
    /// A mapping is still there.
    #[error("cannot replace the mapping {range} of {path} in process {pid}")]
    Mapping {
        /// The process.
        pid: HostPid,
        /// The mapping.
        range: Range,
        /// The file.
        path: PathBuf,
        /// Why, if the kernel has said so.
        #[source]
        source: Option<io::Error>,
    },
    /// A descriptor is still there.
    #[error("cannot replace descriptor {fd} of {path} in process {pid}")]
    Fd {
        /// The process.
        pid: HostPid,
        /// The descriptor.
        fd: i32,
        /// The file.
        path: PathBuf,
        /// Why, if the kernel has said so.
        #[source]
        source: Option<io::Error>,
    },
    /// It is clean, but is still held.
    #[error("cannot let go of process {pid} after cleaning it")]
    Release {
        /// The process.
        pid: HostPid,
        /// Why not.
        #[source]
        source: ReleaseError,
    },
}

/// Replaces the mappings and descriptors of the driver's devices in a process that uses none of them. All its threads
/// are held meanwhile, for some milliseconds, and let go, unless the process was held before. If it could not be let go, it is still in `hold`, and can be let
/// go of later. The process does this itself, so it must not be frozen.
///
/// # Errors
/// When it is frozen, cannot be held or does not do it by the deadline, or something cannot be replaced. What comes after
/// that is left as it is.
pub(crate) fn clean(hold: &mut Hold, pid: HostPid, deadline: Instant) -> Result<Cleaned, ResidueError> {
    clean_matching_with(hold, pid, deadline, cuda::process::is_device)
}

#[cfg(test)]
fn clean_matching(pid: HostPid, deadline: Instant, matches: impl Fn(&Path) -> bool) -> Result<Cleaned, ResidueError> {
    clean_matching_with(&mut Hold::new(cuda::process::drivers), pid, deadline, matches)
}

fn clean_matching_with(
    hold: &mut Hold,
    pid: HostPid,
    deadline: Instant,
    matches: impl Fn(&Path) -> bool,
) -> Result<Cleaned, ResidueError> {
    // What is frozen cannot be let go either: better not to begin.
    if Cgroup::of_process(pid).and_then(|cgroup| cgroup.stands_still()).unwrap_or(false) {
        return Err(ResidueError::Frozen { pid });
    }
    let was_held = hold.pids().any(|held| held == pid);
    let cleaned = clean_held(hold, pid, deadline, matches);
    if was_held {
        return cleaned;
    }
    let let_go = hold.let_go_of(pid).map_err(|source| ResidueError::Release { pid, source });
    let cleaned = cleaned?;
    let_go?;
    Ok(cleaned)
}

fn clean_held(
    hold: &mut Hold,
    pid: HostPid,
    deadline: Instant,
    matches: impl Fn(&Path) -> bool,
) -> Result<Cleaned, ResidueError> {
    let inject = |source| ResidueError::Inject { pid, source };
    let held = hold.take_scope(pid, Scope::All).and_then(|()| hold.settle_only(pid, deadline));
    held.map_err(|source| ResidueError::Hold { pid, source })?;
    let list = || {
        let mappings = process::mappings_matching(pid, &matches)?;
        Ok((mappings, process::fds_matching(pid, &matches)?))
    };
    let list = || list().map_err(|source| ResidueError::List { pid, source });
    let (mappings, fds) = list()?;
    if mappings.is_empty() && fds.is_empty() {
        return Ok(Cleaned { mappings: 0, fds: 0 });
    }
    let mut injector = Injector::attach(hold, pid, deadline).map_err(inject)?;
    for mapping in &mappings {
        replace_mapping(&mut injector, pid, mapping)?;
    }
    replace_fds(&mut injector, pid, &fds)?;
    injector.finish().map_err(inject)?;
    let (left, open) = list()?;
    if let Some(DeviceMapping { start, end, path }) = left.into_iter().next() {
        return Err(ResidueError::Mapping { pid, range: Range { start, end }, path, source: None });
    }
    if let Some(DeviceFd { fd, path }) = open.into_iter().next() {
        return Err(ResidueError::Fd { pid, fd, path, source: None });
    }
    Ok(Cleaned { mappings: mappings.len(), fds: fds.len() })
}

fn replace_mapping(injector: &mut Injector<'_>, pid: HostPid, mapping: &DeviceMapping) -> Result<(), ResidueError> {
    let range = Range { start: mapping.start, end: mapping.end };
    let flags = libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let arguments = [range.start, range.len(), argument(libc::PROT_NONE), argument(flags), argument(-1), 0];
    let failed = |source| ResidueError::Mapping { pid, range, path: mapping.path.clone(), source: Some(source) };
    call(injector, pid, libc::SYS_mmap, arguments)?.map_err(failed)?;
    Ok(())
}

fn replace_fds(injector: &mut Injector<'_>, pid: HostPid, fds: &[DeviceFd]) -> Result<(), ResidueError> {
    let Some(first) = fds.first() else { return Ok(()) };
    let closing: Vec<_> = fds.iter().map(|at| closes_on_exec(pid, at.fd)).collect();
    let failed =
        |at: &DeviceFd, source| ResidueError::Fd { pid, fd: at.fd, path: at.path.clone(), source: Some(source) };
    let mut null = open_null(injector, pid)?;
    if null.as_ref().is_err_and(|error| error.raw_os_error() == Some(libc::EMFILE)) {
        // Its limit leaves no descriptor free. This makes one, which is taken at once.
        call(injector, pid, libc::SYS_close, [argument(first.fd), 0, 0, 0, 0, 0])?
            .map_err(|error| failed(first, error))?;
        null = open_null(injector, pid)?;
    }
    let Ok(null) = null else {
        for at in fds {
            let closed = call(injector, pid, libc::SYS_close, [argument(at.fd), 0, 0, 0, 0, 0])?;
            match closed {
                Err(error) if error.raw_os_error() != Some(libc::EBADF) => return Err(failed(at, error)),
                _ => {}
            }
        }
        return Ok(());
    };
    for (at, closing) in fds.iter().zip(closing) {
        let done = if at.fd != null {
            let flags = if closing { libc::O_CLOEXEC } else { 0 };
            call(injector, pid, libc::SYS_dup3, [argument(null), argument(at.fd), argument(flags), 0, 0, 0])?
        } else {
            let flags = if closing { libc::FD_CLOEXEC } else { 0 };
            call(injector, pid, libc::SYS_fcntl, [argument(null), argument(libc::F_SETFD), argument(flags), 0, 0, 0])?
        };
        done.map_err(|error| failed(at, error))?;
    }
    if fds.iter().all(|at| at.fd != null) {
        let arguments = [argument(null), 0, 0, 0, 0, 0];
        call(injector, pid, libc::SYS_close, arguments)?.map_err(|error| failed(first, error))?;
    }
    Ok(())
}

/// Opens the null device in a process. It is what it ought to be, or an error.
fn open_null(injector: &mut Injector<'_>, pid: HostPid) -> Result<io::Result<i32>, ResidueError> {
    if !is_null_at_hand(pid) {
        return Ok(Err(io::ErrorKind::NotFound.into()));
    }
    let path = injector.scratch(NULL).map_err(|source| ResidueError::Inject { pid, source })?;
    let arguments = [argument(libc::AT_FDCWD), path, argument(libc::O_RDWR | libc::O_CLOEXEC), 0, 0, 0];
    let fd = match call(injector, pid, libc::SYS_openat, arguments)? {
        Ok(fd) => i32::try_from(fd).unwrap_or(-1),
        Err(error) => return Ok(Err(error)),
    };
    let is_null = fs::metadata(format!("/proc/{pid}/fd/{fd}"))
        .is_ok_and(|file| file.file_type().is_char_device() && file.rdev() == rustix::fs::makedev(1, 3));
    if is_null {
        return Ok(Ok(fd));
    }
    let closed = call(injector, pid, libc::SYS_close, [argument(fd), 0, 0, 0, 0, 0])?;
    Ok(closed.and_then(|_| Err(io::ErrorKind::NotFound.into())))
}

/// Tells whether the null device is where a process sees it, and is found without asking anybody: a link to a file system in
/// user space, which the container may have put there, would keep the process waiting.
fn is_null_at_hand(pid: HostPid) -> bool {
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let path = OFlags::PATH | OFlags::CLOEXEC;
    let Ok(root) = rustix::fs::open(format!("/proc/{pid}/root"), path | OFlags::DIRECTORY, Mode::empty()) else {
        return false;
    };
    let open = |resolve| rustix::fs::openat2(&root, "dev/null", path | OFlags::NOFOLLOW, Mode::empty(), resolve);
    let mut null = open(resolve | ResolveFlags::CACHED);
    if matches!(null, Err(Errno::INVAL)) {
        // A kernel before 5.12.
        null = open(resolve);
    }
    null.and_then(rustix::fs::fstat).is_ok_and(|file| {
        FileType::from_raw_mode(file.st_mode) == FileType::CharacterDevice && file.st_rdev == rustix::fs::makedev(1, 3)
    })
}

/// Whether a descriptor of a process is closed when it executes a program.
fn closes_on_exec(pid: HostPid, fd: i32) -> bool {
    let info = Status::parse(fs::read(pid.path(&format!("fdinfo/{fd}"))).unwrap_or_default());
    let flags = info.field("flags").and_then(|flags| i32::from_str_radix(flags, 8).ok());
    flags.is_some_and(|flags| flags & libc::O_CLOEXEC != 0)
}

fn call(
    injector: &mut Injector<'_>,
    pid: HostPid,
    number: i64,
    arguments: [u64; 6],
) -> Result<io::Result<i64>, ResidueError> {
    injector.call(number, arguments).map(answer).map_err(|source| ResidueError::Inject { pid, source })
}
