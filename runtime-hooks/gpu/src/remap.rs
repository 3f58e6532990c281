//! Files in the place of a process's memory, with the same contents.
//!
//! A snapshot has the driver's staging memory in files before the processes are dumped. Private mappings of those files
//! take the memory's place, so that CRIU has nothing to dump there: it leaves out what a process has not written to since
//! it mapped a file. To the process nothing changes, at any moment: what it reads is the same, and what it writes is
//! its own.
//!
//! Nothing of the files is visible where the process is: it is given a descriptor of each, for as long as it takes to map
//! it. If this process dies in that moment, the descriptors stay with it, closed when it executes a program.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use memory::{ProcessLayout, Segment};
use proc::{HostPid, Mapping, Range};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use rustix::process::{PidfdFlags, PidfdGetfdFlags};

mod error;
mod plan;
#[cfg(test)]
mod tests;

pub(crate) use error::RemapError;
use plan::{PAGE, Plan};
use tracee::hold::Hold;
use tracee::inject::{Injector, answer, argument};

/// Tries of a mapping. The kernel may have freed the old memory of a segment and not have it back yet: a mapping fails for
/// want of memory then, for a moment.
const TRIES: u32 = 50;
const BETWEEN_TRIES: Duration = Duration::from_millis(20);

/// Maps files in the place of the memory of a process. All its threads are held. Returns the ranges that stay memory.
///
/// # Errors
/// Foreign mappings, a short pack or other contents: the process is unchanged then. After a failed call in the process
/// some segments are in memory and others in files.
pub(crate) fn remap_in(
    hold: &mut Hold,
    packs: &[PathBuf],
    of: &ProcessLayout,
    deadline: Instant,
) -> Result<Vec<Range>, RemapError> {
    let plan = Plan::of(packs.len(), of)?;
    for segments in by_pack(&plan.segments) {
        compare(of.process.host, packs, segments)?;
    }
    map_in(hold, packs, of.process.host, plan, deadline)
}

/// Maps files as [`remap_in`] does, in the place of empty memory. Contents are not compared: the memory takes over those
/// of the files, except in the returned ranges.
///
/// # Errors
/// As for [`remap_in`].
pub(crate) fn map_in_empty(
    hold: &mut Hold,
    packs: &[PathBuf],
    of: &ProcessLayout,
    deadline: Instant,
) -> Result<Vec<Range>, RemapError> {
    map_in(hold, packs, of.process.host, Plan::of(packs.len(), of)?, deadline)
}

fn map_in(
    hold: &mut Hold,
    packs: &[PathBuf],
    pid: HostPid,
    Plan { segments, left }: Plan,
    deadline: Instant,
) -> Result<Vec<Range>, RemapError> {
    if segments.is_empty() {
        return Ok(left);
    }
    let mut injector = Injector::attach(hold, pid, deadline).map_err(RemapError::inject(pid))?;
    // Zeros first: it gives memory back that the others may need a little of.
    for segments in by_pack(&segments) {
        let remapped = match segments.first().and_then(Segment::stored) {
            Some((pack, _)) => remap_file(&mut injector, pid, &packs[pack], segments),
            None => map_segments(&mut injector, pid, None, segments),
        };
        remapped?;
    }
    injector.finish().map_err(RemapError::inject(pid))?;
    check(pid, &segments)?;
    Ok(left)
}

/// Segments of a plan that one pack has, or none.
fn by_pack(segments: &[Segment]) -> impl Iterator<Item = &[Segment]> {
    segments.chunk_by(|a, b| pack_of(a) == pack_of(b))
}

fn pack_of(segment: &Segment) -> Option<usize> {
    segment.stored().map(|(pack, _)| pack)
}

/// Compares the first and the last page of each segment with its source. That does not find every difference, but segments that
/// are somewhere else than they ought to be, or of another process.
fn compare(pid: HostPid, packs: &[PathBuf], segments: &[Segment]) -> Result<(), RemapError> {
    let memory = File::open(pid.path("mem")).map_err(RemapError::memory(pid))?;
    let mut file = None;
    for segment in segments {
        if let (Some((pack, _)), None) = (segment.stored(), &file) {
            let path = &packs[pack];
            let opened = File::open(path).and_then(|file| Ok((file.metadata()?.len(), file)));
            let (length, opened) = opened.map_err(RemapError::file(path))?;
            let is_short =
                |segment: &&Segment| segment.stored().is_some_and(|(_, at)| length.saturating_sub(at) < segment.length);
            if let Some(segment) = segments.iter().find(is_short) {
                return Err(RemapError::Segment { pid, range: segment.range(), why: "its file is too short" });
            }
            file = Some(opened);
        }
        for at in [0, segment.length - PAGE] {
            let mut there = [0; 4096];
            let mut ours = [0; 4096];
            memory.read_exact_at(&mut there, segment.address + at).map_err(RemapError::memory(pid))?;
            if let (Some((pack, offset)), Some(file)) = (segment.stored(), &file) {
                let read = file.read_exact_at(&mut ours, offset + at);
                read.map_err(RemapError::file(&packs[pack]))?;
            }
            if there != ours {
                return Err(RemapError::Differs { pid, address: segment.address + at });
            }
        }
    }
    Ok(())
}

/// Maps a file over segments. The process has a descriptor of it meanwhile.
fn remap_file(
    injector: &mut Injector<'_>,
    pid: HostPid,
    path: &PathBuf,
    segments: &[Segment],
) -> Result<(), RemapError> {
    let file = File::open(path).map_err(RemapError::file(path))?;
    let fd = hand_over(injector, pid, &file)?;
    let mapped = map_segments(injector, pid, Some(fd), segments);
    let closed = close(injector, pid, fd);
    mapped.and(closed)
}

fn map_segments(
    injector: &mut Injector<'_>,
    pid: HostPid,
    fd: Option<i32>,
    segments: &[Segment],
) -> Result<(), RemapError> {
    let access = argument(libc::PROT_READ | libc::PROT_WRITE);
    let anonymous = if fd.is_none() { libc::MAP_ANONYMOUS } else { 0 };
    let flags = argument(libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_NORESERVE | anonymous);
    for segment in segments {
        let offset = segment.stored().map_or(0, |(_, offset)| offset);
        let arguments = [segment.address, segment.length, access, flags, argument(fd.unwrap_or(-1)), offset];
        let mut tries = 0;
        loop {
            match call(injector, pid, libc::SYS_mmap, arguments)? {
                Ok(_) => break,
                Err(error) if tries < TRIES && error.raw_os_error() == Some(libc::ENOMEM) => {
                    tries += 1;
                    std::thread::sleep(BETWEEN_TRIES);
                }
                Err(source) => return Err(RemapError::Map { pid, range: segment.range(), source }),
            }
        }
    }
    Ok(())
}

/// Gives a process a descriptor of a file, by way of a pair of sockets that it makes: its end of it is taken from it, the
/// file goes in there and comes out at the other end.
fn hand_over(injector: &mut Injector<'_>, pid: HostPid, file: &File) -> Result<i32, RemapError> {
    let failed = |action| move |source| RemapError::Call { action, pid, source };
    let pair = injector.scratch(&[0; 8]).map_err(RemapError::inject(pid))?;
    let kind = argument(libc::SOCK_DGRAM | libc::SOCK_CLOEXEC);
    call(injector, pid, libc::SYS_socketpair, [argument(libc::AF_UNIX), kind, 0, pair, 0, 0])?
        .map_err(failed("make a pair of sockets in"))?;
    let mut ends = [0; 8];
    injector.read_scratch(0, &mut ends).map_err(RemapError::inject(pid))?;
    let [ours, theirs] = [number(&ends[..4]), number(&ends[4..])];
    let sent = take(pid, injector.tid(), ours).and_then(|socket| send(&socket, file));
    let received = match sent {
        Ok(()) => receive(injector, pid, theirs),
        Err(source) => Err(RemapError::Call { action: "hand a file over to", pid, source }),
    };
    let closed = close(injector, pid, ours).and(close(injector, pid, theirs));
    match (received, closed) {
        (Ok(fd), Err(error)) => {
            close(injector, pid, fd)?;
            Err(error)
        }
        (received, _) => received,
    }
}

/// A descriptor of a process, as one of this process.
fn take(pid: HostPid, tid: i32, fd: i32) -> io::Result<OwnedFd> {
    let process = rustix::process::pidfd_open(pid.as_pid(), PidfdFlags::empty())?;
    let taken = rustix::process::pidfd_getfd(process, fd, PidfdGetfdFlags::empty())?;
    // A thread may have descriptors of its own (CLONE_FILES), and then this is not the socket.
    let meant = fs::metadata(format!("/proc/{pid}/task/{tid}/fd/{fd}"))?;
    let is = rustix::fs::fstat(&taken)?;
    if (meant.dev(), meant.ino()) == (is.st_dev, is.st_ino) { Ok(taken) } else { Err(io::ErrorKind::NotFound.into()) }
}

fn send(socket: &OwnedFd, file: &File) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [file.as_fd()];
    control.push(SendAncillaryMessage::ScmRights(&fds));
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    rustix::net::sendmsg(socket, &[IoSlice::new(&[0])], &mut control, flags)?;
    Ok(())
}

/// Lets a process take a descriptor from a socket.
fn receive(injector: &mut Injector<'_>, pid: HostPid, socket: i32) -> Result<i32, RemapError> {
    /// Places of vector, byte and control message in the scratch memory, behind a `struct msghdr`.
    const VECTOR: u64 = 56;
    const BYTE: u64 = 72;
    const CONTROL: u64 = 80;
    /// `CMSG_SPACE(sizeof(int))`
    const SPACE: u64 = 24;
    let at = injector.scratch(&[]).map_err(RemapError::inject(pid))?;
    let header = [0, 0, at + VECTOR, 1, at + CONTROL, SPACE, 0];
    let vector = [at + BYTE, 1];
    let words = header.into_iter().chain(vector).chain([0; 4]);
    let bytes: Vec<u8> = words.flat_map(u64::to_ne_bytes).collect();
    injector.scratch(&bytes).map_err(RemapError::inject(pid))?;
    let flags = argument(libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT);
    let failed = |source| RemapError::Call { action: "receive a file in", pid, source };
    call(injector, pid, libc::SYS_recvmsg, [argument(socket), at, flags, 0, 0, 0])?.map_err(failed)?;
    let mut message = [0; 24];
    injector.read_scratch(CONTROL, &mut message).map_err(RemapError::inject(pid))?;
    // A `struct cmsghdr`: its length, the level and the type; then the descriptor.
    let is_file = number(&message[..4]) == 20
        && number(&message[8..12]) == libc::SOL_SOCKET
        && number(&message[12..16]) == libc::SCM_RIGHTS;
    // Without a descriptor free, the message comes without it.
    if is_file { Ok(number(&message[16..20])) } else { Err(failed(io::Error::from_raw_os_error(libc::EMFILE))) }
}

fn number(bytes: &[u8]) -> i32 {
    bytes.try_into().map_or(-1, i32::from_ne_bytes)
}

fn close(injector: &mut Injector<'_>, pid: HostPid, fd: i32) -> Result<(), RemapError> {
    let closed = call(injector, pid, libc::SYS_close, [argument(fd), 0, 0, 0, 0, 0])?;
    closed.map_err(|source| RemapError::Call { action: "close a descriptor of", pid, source })?;
    Ok(())
}

fn call(
    injector: &mut Injector<'_>,
    pid: HostPid,
    number: i64,
    arguments: [u64; 6],
) -> Result<io::Result<i64>, RemapError> {
    injector.call(number, arguments).map(answer).map_err(RemapError::inject(pid))
}

/// Checks that each segment is mapped: from a file if it is stored, as memory if it is zero.
fn check(pid: HostPid, segments: &[Segment]) -> Result<(), RemapError> {
    let mappings = proc::mappings(pid).map_err(RemapError::memory(pid))?;
    let by_end: BTreeMap<u64, &Mapping> = mappings.iter().map(|mapping| (mapping.range.end, mapping)).collect();
    for segment in segments {
        let holder = by_end.range(segment.address + 1..).next().map(|(_, mapping)| *mapping);
        let is_there = holder.is_some_and(|mapping| {
            mapping.range.start <= segment.address
                && (segment.stored().is_none() || mapping.range.end >= segment.range().end)
                && mapping.access == *b"rw-p"
                && (mapping.inode != 0) == segment.stored().is_some()
        });
        if !is_there {
            return Err(RemapError::Segment { pid, range: segment.range(), why: "it is not mapped as it should be" });
        }
    }
    Ok(())
}
