//! A process that runtimes take for criu, so that a tree that they restore is frozen before any of it runs.
//!
//! Their command lines cannot be told to do so, and a program that polls memory of the GPU driver dies of running for a
//! moment before that is back. Runtimes find criu in `PATH`:
//!
//! ```text
//!  runc restore ──► criu (this, by the PATH that it was given) ──► criu
//!        socket ◄──────── every message, both ways ────────► socket
//!                         held back until the tree is frozen: pre-resume
//! ```
//!
//! It adds nothing else, but that the folders in a request are its own descriptors. Where it fails or is killed, criu finds the socket closed, and undoes its work.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode};

use cgroup::Cgroup;
use command_fds::{CommandFdExt, FdMapping};
use criu::{Packet, Stage, receive_packet};
use proc::HostPid;
use rustix::event::{PollFd, PollFlags};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown, SocketFlags, SocketType,
};
use rustix::process::{Pid, PidfdFlags};

use super::sys;

/// What it is called, by which `main` knows that it is to be this.
const FRONT: &str = "criu";

/// Variables for it: the PATH that finds the real criu, and the folder in which criu will work.
const PATH: &str = "GPUSNAP_CRIU_PATH";
const WORK: &str = "GPUSNAP_CRIU_WORK";

/// A request holds every mount of the container.
const MAX_MESSAGE: usize = 4 << 20;
/// As many as criu sends, and more.
const MAX_DESCRIPTORS: usize = 16;

/// Lets a runtime find this binary in the place of criu. The folder is for the link.
pub(super) fn put_before(command: &mut Command, folder: &Path, work: &Path) -> io::Result<()> {
    // Whatever has taken the place of the file that this process was started from.
    std::os::unix::fs::symlink(format!("/proc/{}/exe", std::process::id()), folder.join(FRONT))?;
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders = vec![folder.to_owned()];
    folders.extend(std::env::split_paths(&path));
    command.env("PATH", std::env::join_paths(folders).map_err(io::Error::other)?);
    command.env(PATH, path).env(WORK, work);
    Ok(())
}

/// Does the work. To be run by `main` when [`is_front`] says so.
#[must_use]
pub fn front_main(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    match run(&arguments.collect::<Vec<_>>()) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("criu: gpusnap cannot stand in for it: {error}");
            ExitCode::FAILURE
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "there is no reaper in this process, whose only child criu is")]
fn run(arguments: &[OsString]) -> io::Result<u8> {
    let mut command = Command::new(real()?);
    command.args(arguments).env("PATH", std::env::var_os(PATH).unwrap_or_default()).env_remove(PATH).env_remove(WORK);
    let socket = match arguments {
        [.., swrk, fd] if swrk == "swrk" => fd.to_str().and_then(|fd| fd.parse::<i32>().ok()),
        _ => None,
    };
    let Some(number) = socket else { return Err(command.exec()) };
    if let Some(work) = std::env::var_os(WORK) {
        // By it, who waits for the end of a criu that was left behind finds this one.
        rustix::process::chdir(&work)?;
    }
    let runtime = sys::inherited(number)?;
    let (criu, theirs) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    command.fd_mappings(vec![FdMapping { parent_fd: theirs, child_fd: number }]).map_err(io::Error::other)?;
    // The runtime moves this process to the container's cgroup before it asks for anything, and criu has to be there too.
    let Some(request) = receive_packet(runtime.as_fd(), MAX_MESSAGE)? else { return Ok(1) };
    let mut child = command.spawn()?;
    drop(command);
    let mut front = Front { runtime, criu, child: pid_of(&child), folders: Vec::new(), root: None, is_heard: true };
    front.ask(request)?;
    let forwarded = front.forward();
    drop(front);
    let status = child.wait()?;
    forwarded?;
    Ok(status
        .code()
        .or(status.signal().map(|signal| 128 + signal))
        .and_then(|code| u8::try_from(code).ok())
        .unwrap_or(1))
}

/// The criu that the runtime would have found.
fn real() -> io::Result<PathBuf> {
    let path = std::env::var_os(PATH).unwrap_or_default();
    let mut found = std::env::split_paths(&path).map(|folder| folder.join(FRONT)).filter(|file| file.is_file());
    found.next().ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "there is no criu in the PATH"))
}

fn pid_of(child: &Child) -> i32 {
    i32::try_from(child.id()).unwrap_or_default()
}

struct Front {
    runtime: OwnedFd,
    criu: OwnedFd,
    child: i32,
    /// The runtime's that criu is asked to use. It opens them by this process's descriptors.
    folders: Vec<File>,
    /// Of the restored tree, once it is there.
    root: Option<i32>,
    /// The runtime may still say something.
    is_heard: bool,
}

impl Front {
    fn ask(&mut self, (request, descriptors): Packet) -> io::Result<()> {
        let runtime = rustix::process::getppid().map_or(0, Pid::as_raw_pid);
        let request = criu::with_other_folders(&request, |number| {
            let folder = File::open(format!("/proc/{runtime}/fd/{number}"))?;
            let number = folder.as_raw_fd();
            self.folders.push(folder);
            Ok(number)
        })?;
        send(self.criu.as_fd(), (request, descriptors))
    }

    /// Until criu has ended, and all that it said is told.
    fn forward(&mut self) -> io::Result<()> {
        let child = Pid::from_raw(self.child).ok_or(io::ErrorKind::NotFound)?;
        let ended = rustix::process::pidfd_open(child, PidfdFlags::empty())?;
        loop {
            let heard = if self.is_heard { PollFlags::IN } else { PollFlags::empty() };
            let mut polled = [
                PollFd::new(&self.criu, PollFlags::IN),
                PollFd::new(&ended, PollFlags::IN),
                PollFd::new(&self.runtime, heard),
            ];
            match rustix::event::poll(&mut polled, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            let [of_criu, of_end, of_runtime] = polled.map(|polled| polled.revents());
            if of_criu.contains(PollFlags::IN) || of_criu.contains(PollFlags::HUP) {
                match receive_packet(self.criu.as_fd(), MAX_MESSAGE)? {
                    Some(message) => self.tell_runtime(message)?,
                    // Helpers that it forks keep the socket open when it is killed, but not the other way round.
                    None => return Ok(()),
                }
            } else if !of_end.is_empty() {
                return Ok(());
            } else if self.is_heard && !of_runtime.is_empty() {
                match receive_packet(self.runtime.as_fd(), MAX_MESSAGE)? {
                    Some(message) => self.ask(message)?,
                    None => {
                        self.is_heard = false;
                        rustix::net::shutdown(&self.criu, Shutdown::Write)?;
                    }
                }
            }
        }
    }

    /// Freezes the tree, but not criu, and not this process, which the runtime has moved to its cgroup.
    fn freeze(&self, root: HostPid) -> io::Result<()> {
        let runtime = HostPid::from(rustix::process::getppid().ok_or(io::ErrorKind::NotFound)?);
        let [own, of_runtime, of_root] = [HostPid::own(), runtime, root].map(|pid| Cgroup::of_process(pid.raw()));
        let of_root = of_root.map_err(io::Error::other)?;
        // The restored init may be in a cgroup below the container's. This process is in that one itself.
        let cgroup = match (own, of_runtime) {
            (Ok(own), of_runtime) if of_runtime.as_ref().ok() != Some(&own) && own.contains(&of_root) => own,
            _ => of_root,
        };
        let makers = [HostPid::own(), HostPid::try_from(self.child)?];
        cgroup.freeze_around(&makers, runtime).map_err(io::Error::other)
    }

    fn tell_runtime(&mut self, message: Packet) -> io::Result<()> {
        if let Some((stage, pid)) = criu::announced(&message.0) {
            self.root = pid.or(self.root);
            if let (Stage::PreResume, Some(root)) = (stage, self.root.and_then(HostPid::new)) {
                self.freeze(root)?;
            }
        }
        match send(self.runtime.as_fd(), message) {
            // It has been killed. criu is told by the closed socket.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                self.is_heard = false;
                Ok(rustix::net::shutdown(&self.criu, Shutdown::Both)?)
            }
            sent => sent,
        }
    }
}

fn send(socket: BorrowedFd<'_>, (bytes, descriptors): Packet) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    if !descriptors.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(&descriptors));
    }
    rustix::net::sendmsg(socket, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Whether a program of this name is to be it.
#[must_use]
pub fn is_front(name: &OsStr) -> bool {
    Path::new(name).file_name() == Some(OsStr::new(FRONT)) && std::env::var_os(PATH).is_some()
}
