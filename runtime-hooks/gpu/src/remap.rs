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

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags};
use serde::{Deserialize, Serialize};

mod error;
mod plan;
#[cfg(test)]
mod tests;

pub(crate) use error::RemapError;
use plan::{PAGE, Plan};
use tracee::hold::Hold;
use tracee::inject::{Injector, answer, argument};
use tracee::process::{self, Range};

/// Files to take the place of memory in the processes of a container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// The files, as the guardian finds them. They must never change or become shorter while a process lives that has one
    /// mapped.
    pub files: Vec<PathBuf>,
    /// The processes.
    pub processes: Vec<ProcessLayout>,
}

/// Files to take the place of one process's memory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessLayout {
    /// In the pid namespace of the guardian, as [`crate::Staging`] has it.
    pub pid: i32,
    /// In any order. They need not be all of its memory, nor be adjacent.
    pub pieces: Vec<Piece>,
}

/// A piece of private anonymous memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Piece {
    /// First address. Address and length are in bytes, of whole pages.
    pub address: u64,
    /// Length.
    pub length: u64,
    /// Contents: those of a part of a file, or nothing but zeros.
    pub source: Option<Source>,
}

/// A place in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// Its index in [`Layout::files`].
    pub file: usize,
    /// In bytes, whole pages.
    pub offset: u64,
}

/// Result of a remapping.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Remapped {
    /// By process, in the order of the order.
    pub processes: Vec<RemappedProcess>,
}

/// Result of a remapping in one process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemappedProcess {
    /// As in [`ProcessLayout::pid`].
    pub pid: i32,
    /// Pieces in memory as before, because the process cannot have so many mappings: the smallest, in order of
    /// addresses.
    pub left: Vec<Range>,
}

impl Piece {
    pub(crate) fn range(&self) -> Range {
        Range { start: self.address, end: self.address.saturating_add(self.length) }
    }
}

/// Mapping over a piece may fail for want of memory when the memory that it had is gone already. What that has freed is
/// there soon.
const TRIES: u32 = 50;
const BETWEEN_TRIES: Duration = Duration::from_millis(20);

/// Puts files in the place of memory of one process, all whose threads are held, and says what was left.
///
/// # Errors
/// When something is not as it has to be; nothing has changed then. Or when a call in the process fails: then some pieces
/// are in memory and others in files.
pub(crate) fn remap_in(
    hold: &mut Hold,
    files: &[PathBuf],
    process: &ProcessLayout,
    deadline: Instant,
) -> Result<Vec<Range>, RemapError> {
    let plan = Plan::of(files.len(), process)?;
    for pieces in by_file(&plan.pieces) {
        compare(process.pid, files, pieces)?;
    }
    map_in(hold, files, process.pid, plan, deadline)
}

/// As [`remap_in`] for memory that is empty: it has in the end what the files have, but for what is left.
///
/// # Errors
/// As for [`remap_in`].
pub(crate) fn map_in_empty(
    hold: &mut Hold,
    files: &[PathBuf],
    process: &ProcessLayout,
    deadline: Instant,
) -> Result<Vec<Range>, RemapError> {
    map_in(hold, files, process.pid, Plan::of(files.len(), process)?, deadline)
}

fn map_in(
    hold: &mut Hold,
    files: &[PathBuf],
    pid: i32,
    Plan { pieces, left }: Plan,
    deadline: Instant,
) -> Result<Vec<Range>, RemapError> {
    if pieces.is_empty() {
        return Ok(left);
    }
    let mut injector = Injector::attach(hold, pid, deadline).map_err(RemapError::inject(pid))?;
    // Zeros first: it gives memory back that the others may need a little of.
    for pieces in by_file(&pieces) {
        let remapped = match pieces.first().and_then(|piece| piece.source) {
            Some(Source { file, .. }) => remap_file(&mut injector, pid, &files[file], pieces),
            None => map_pieces(&mut injector, pid, None, pieces),
        };
        remapped?;
    }
    injector.finish().map_err(RemapError::inject(pid))?;
    check(pid, &pieces)?;
    Ok(left)
}

/// Pieces of a plan that one file has, or none.
fn by_file(pieces: &[Piece]) -> impl Iterator<Item = &[Piece]> {
    pieces.chunk_by(|a, b| a.source.map(|source| source.file) == b.source.map(|source| source.file))
}

/// Compares the first and the last page of each piece with its source. That does not find every difference, but pieces that
/// are somewhere else than they ought to be, or of another process.
fn compare(pid: i32, files: &[PathBuf], pieces: &[Piece]) -> Result<(), RemapError> {
    let memory = File::open(format!("/proc/{pid}/mem")).map_err(RemapError::memory(pid))?;
    let mut file = None;
    for piece in pieces {
        if let (Some(source), None) = (piece.source, &file) {
            let path = &files[source.file];
            let opened = File::open(path).and_then(|file| Ok((file.metadata()?.len(), file)));
            let (length, opened) = opened.map_err(RemapError::file(path))?;
            let is_short =
                |piece: &&Piece| piece.source.is_some_and(|at| length.saturating_sub(at.offset) < piece.length);
            if let Some(piece) = pieces.iter().find(is_short) {
                return Err(RemapError::Piece { pid, range: piece.range(), why: "its file is too short" });
            }
            file = Some(opened);
        }
        for at in [0, piece.length - PAGE] {
            let mut there = [0; 4096];
            let mut ours = [0; 4096];
            memory.read_exact_at(&mut there, piece.address + at).map_err(RemapError::memory(pid))?;
            if let (Some(source), Some(file)) = (piece.source, &file) {
                let read = file.read_exact_at(&mut ours, source.offset + at);
                read.map_err(RemapError::file(&files[source.file]))?;
            }
            if there != ours {
                return Err(RemapError::Differs { pid, address: piece.address + at });
            }
        }
    }
    Ok(())
}

/// Maps a file over pieces. The process has a descriptor of it meanwhile.
fn remap_file(injector: &mut Injector<'_>, pid: i32, path: &PathBuf, pieces: &[Piece]) -> Result<(), RemapError> {
    let file = File::open(path).map_err(RemapError::file(path))?;
    let fd = hand_over(injector, pid, &file)?;
    let mapped = map_pieces(injector, pid, Some(fd), pieces);
    let closed = close(injector, pid, fd);
    mapped.and(closed)
}

fn map_pieces(injector: &mut Injector<'_>, pid: i32, fd: Option<i32>, pieces: &[Piece]) -> Result<(), RemapError> {
    let access = argument(libc::PROT_READ | libc::PROT_WRITE);
    let anonymous = if fd.is_none() { libc::MAP_ANONYMOUS } else { 0 };
    let flags = argument(libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_NORESERVE | anonymous);
    for piece in pieces {
        let offset = piece.source.map_or(0, |source| source.offset);
        let arguments = [piece.address, piece.length, access, flags, argument(fd.unwrap_or(-1)), offset];
        let mut tries = 0;
        loop {
            match call(injector, pid, libc::SYS_mmap, arguments)? {
                Ok(_) => break,
                Err(error) if tries < TRIES && error.raw_os_error() == Some(libc::ENOMEM) => {
                    tries += 1;
                    std::thread::sleep(BETWEEN_TRIES);
                }
                Err(source) => return Err(RemapError::Map { pid, range: piece.range(), source }),
            }
        }
    }
    Ok(())
}

/// Gives a process a descriptor of a file, by way of a pair of sockets that it makes: its end of it is taken from it, the
/// file goes in there and comes out at the other end.
fn hand_over(injector: &mut Injector<'_>, pid: i32, file: &File) -> Result<i32, RemapError> {
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
fn take(pid: i32, tid: i32, fd: i32) -> io::Result<OwnedFd> {
    let process = rustix::process::pidfd_open(Pid::from_raw(pid).ok_or(io::ErrorKind::NotFound)?, PidfdFlags::empty())?;
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
fn receive(injector: &mut Injector<'_>, pid: i32, socket: i32) -> Result<i32, RemapError> {
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

fn close(injector: &mut Injector<'_>, pid: i32, fd: i32) -> Result<(), RemapError> {
    let closed = call(injector, pid, libc::SYS_close, [argument(fd), 0, 0, 0, 0, 0])?;
    closed.map_err(|source| RemapError::Call { action: "close a descriptor of", pid, source })?;
    Ok(())
}

fn call(
    injector: &mut Injector<'_>,
    pid: i32,
    number: i64,
    arguments: [u64; 6],
) -> Result<io::Result<i64>, RemapError> {
    injector.call(number, arguments).map(answer).map_err(RemapError::inject(pid))
}

/// Whether all pieces are mapped as they should be.
fn check(pid: i32, pieces: &[Piece]) -> Result<(), RemapError> {
    let mappings = process::mappings(pid).map_err(RemapError::memory(pid))?;
    let by_end: BTreeMap<u64, &process::Mapping> =
        mappings.iter().map(|mapping| (mapping.range.end, mapping)).collect();
    for piece in pieces {
        let holder = by_end.range(piece.address + 1..).next().map(|(_, mapping)| *mapping);
        let is_there = holder.is_some_and(|mapping| {
            mapping.range.start <= piece.address
                && (piece.source.is_none() || mapping.range.end >= piece.range().end)
                && mapping.access == *b"rw-p"
                && (mapping.inode != 0) == piece.source.is_some()
        });
        if !is_there {
            return Err(RemapError::Piece { pid, range: piece.range(), why: "it is not mapped as it should be" });
        }
    }
    Ok(())
}
