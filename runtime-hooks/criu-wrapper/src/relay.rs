//! Messages between the runtime and criu, passed on both ways.

use std::fs::File;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use cgroup::Cgroup;
use criu::{Packet, Stage, receive_packet};
use proc::HostPid;
use rustix::event::{PollFd, PollFlags};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown};
use rustix::process::{Pid, PidfdFlags};

/// Bytes of the longest message: a request lists every mount of the container.
const MAX_MESSAGE: usize = 4 << 20;
/// Descriptors beside one message: more than criu sends.
const MAX_DESCRIPTORS: usize = 16;

/// The two sockets, and the state of the restore that messages tell of.
pub(crate) struct Relay {
    runtime: OwnedFd,
    criu: OwnedFd,
    child: HostPid,
    /// Folders of the runtime that criu opens by this process's descriptors.
    folders: Vec<File>,
    /// Root of the restored tree, once criu has told of it.
    root: Option<HostPid>,
    /// The runtime has not closed its end.
    is_runtime_open: bool,
}

impl Relay {
    /// Makes a relay between the runtime's socket and that of the criu `child`.
    pub(crate) fn new(runtime: OwnedFd, criu: OwnedFd, child: HostPid) -> Self {
        Self { runtime, criu, child, folders: Vec::new(), root: None, is_runtime_open: true }
    }

    /// Passes on the first request and all that follows, until criu has ended and all its messages are delivered.
    ///
    /// # Errors
    /// A socket fails, or the tree cannot be frozen. The sockets are closed then, and criu undoes its work.
    pub(crate) fn run(mut self, request: Packet) -> io::Result<()> {
        self.ask(request)?;
        self.forward()
    }

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

    fn forward(&mut self) -> io::Result<()> {
        let ended = rustix::process::pidfd_open(self.child.as_pid(), PidfdFlags::empty())?;
        loop {
            let from_runtime = if self.is_runtime_open { PollFlags::IN } else { PollFlags::empty() };
            let mut polled = [
                PollFd::new(&self.criu, PollFlags::IN),
                PollFd::new(&ended, PollFlags::IN),
                PollFd::new(&self.runtime, from_runtime),
            ];
            match rustix::event::poll(&mut polled, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            let [of_criu, of_end, of_runtime] = polled.map(|polled| polled.revents());
            if of_criu.contains(PollFlags::IN) || of_criu.contains(PollFlags::HUP) {
                match receive(&self.criu)? {
                    Some(message) => self.answer(message)?,
                    // criu has ended. The pidfd beside it is for a criu that is killed: helpers that it forked keep the
                    // socket open.
                    None => return Ok(()),
                }
            } else if !of_end.is_empty() {
                return Ok(());
            } else if self.is_runtime_open && !of_runtime.is_empty() {
                match receive(&self.runtime)? {
                    Some(message) => self.ask(message)?,
                    None => {
                        self.is_runtime_open = false;
                        rustix::net::shutdown(&self.criu, Shutdown::Write)?;
                    }
                }
            }
        }
    }

    fn answer(&mut self, message: Packet) -> io::Result<()> {
        if let Some((stage, pid)) = criu::announced(&message.0) {
            self.root = pid.and_then(HostPid::new).or(self.root);
            if let (Stage::PreResume, Some(root)) = (stage, self.root) {
                self.freeze(root)?;
            }
        }
        match send(self.runtime.as_fd(), message) {
            // The runtime has been killed. criu learns of it by the closed socket.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                self.is_runtime_open = false;
                Ok(rustix::net::shutdown(&self.criu, Shutdown::Both)?)
            }
            sent => sent,
        }
    }

    /// Freezes the tree, but neither criu nor this process: the runtime has moved both to the tree's cgroup.
    fn freeze(&self, root: HostPid) -> io::Result<()> {
        let runtime = HostPid::from(rustix::process::getppid().ok_or(io::ErrorKind::NotFound)?);
        let [own, of_runtime, of_root] = [HostPid::own(), runtime, root].map(Cgroup::of_process);
        let of_root = of_root.map_err(io::Error::other)?;
        // The restored init may be in a cgroup below the container's. This process is in the container's itself.
        let cgroup = match (own, of_runtime) {
            (Ok(own), of_runtime) if of_runtime.as_ref().ok() != Some(&own) && own.contains(&of_root) => own,
            _ => of_root,
        };
        cgroup.freeze_around(&[HostPid::own(), self.child], runtime).map_err(io::Error::other)
    }
}

/// Returns the next message on a socket; None when the other end is closed.
pub(crate) fn receive(socket: &OwnedFd) -> io::Result<Option<Packet>> {
    receive_packet(socket.as_fd(), MAX_MESSAGE)
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
