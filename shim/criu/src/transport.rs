//! The socket pair: one protobuf message a packet, descriptors beside it.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use protobuf::Message;
use rust_criu::rust_criu_protobuf::rpc::{Criu_req, Criu_req_type, Criu_resp};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags, SocketFlags,
    SocketType,
};
use tokio::io::Interest;
use tokio::net::UnixDatagram;

use crate::notify::Stage;

/// CRIU's answers are some hundred bytes; the longest holds an error of 1 KiB (`struct str_and_lock` in criu/log.c).
const MAX_ANSWER: usize = 64 << 10;
/// CRIU sends one descriptor at a time.
const MAX_DESCRIPTORS: usize = 4;

/// What CRIU has sent.
#[derive(Debug)]
pub(crate) struct Received {
    pub(crate) message: Criu_resp,
    pub(crate) descriptors: Vec<OwnedFd>,
}

/// Our end of the conversation. A datagram socket to tokio, which has no type for SOCK_SEQPACKET: only its readiness
/// is used, and that is the same.
#[derive(Debug)]
pub(crate) struct Channel(UnixDatagram);

impl Channel {
    /// Our end, and the one for criu.
    pub(crate) fn pair() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        rustix::io::ioctl_fionbio(&ours, true)?;
        Ok((Self(UnixDatagram::from_std(ours.into())?), theirs))
    }

    pub(crate) async fn send(&self, request: &Criu_req) -> io::Result<()> {
        let bytes = request.write_to_bytes().map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        let send = || Ok(rustix::net::send(&self.0, &bytes, SendFlags::NOSIGNAL)?);
        self.0.async_io(Interest::WRITABLE, send).await?;
        Ok(())
    }

    /// The next message, or None when the other end is closed.
    pub(crate) async fn receive(&self) -> io::Result<Option<Received>> {
        let mut bytes = vec![0; MAX_ANSWER];
        let receive = || receive(self.0.as_fd(), &mut bytes);
        let packet = self.0.async_io(Interest::READABLE, receive).await?;
        parse(&bytes, packet)
    }

    /// A message that has arrived already. None if there is none.
    pub(crate) fn received(&self) -> io::Result<Option<Received>> {
        let mut bytes = vec![0; MAX_ANSWER];
        match receive(self.0.as_fd(), &mut bytes) {
            Ok(packet) => parse(&bytes, packet),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Its length, 0 at the end of the conversation, and what came with it.
type Packet = (usize, ReturnFlags, Vec<OwnedFd>);

fn parse(bytes: &[u8], (length, flags, descriptors): Packet) -> io::Result<Option<Received>> {
    let invalid = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
    if length == 0 {
        return Ok(None);
    }
    if flags.contains(ReturnFlags::TRUNC) {
        return Err(invalid(format!("it is longer than {MAX_ANSWER} bytes")));
    }
    let message = Criu_resp::parse_from_bytes(&bytes[..length]).map_err(|error| invalid(error.to_string()))?;
    Ok(Some(Received { message, descriptors }))
}

fn receive(socket: BorrowedFd<'_>, bytes: &mut [u8]) -> io::Result<Packet> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut into = [IoSliceMut::new(bytes)];
    let received = match rustix::net::recvmsg(socket, &mut into, &mut control, RecvFlags::CMSG_CLOEXEC) {
        // criu died with our answer unread. That is an end like any other.
        Err(rustix::io::Errno::CONNRESET) => return Ok((0, ReturnFlags::empty(), vec![])),
        other => other?,
    };
    let mut descriptors = vec![];
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(sent) = message {
            descriptors.extend(sent);
        }
    }
    Ok((received.bytes, received.flags, descriptors))
}

/// What a message that criu sends to whoever drives it announces: a stage, with a process of the tree where it names one. None
/// if it is another kind of message, or none.
#[must_use]
pub fn announced(message: &[u8]) -> Option<(Stage, Option<i32>)> {
    let message = Criu_resp::parse_from_bytes(message).ok()?;
    if message.type_() != Criu_req_type::NOTIFY {
        return None;
    }
    Some((Stage::named(message.notify.script()), message.notify.pid))
}

/// A request that another program has made, with other descriptors for its folders: criu takes the numbers for those of
/// whoever has made the socket. `exchange` gives a number for a number.
///
/// # Errors
/// When it is no request, or a descriptor cannot be exchanged.
pub fn with_other_folders(request: &[u8], mut exchange: impl FnMut(i32) -> io::Result<i32>) -> io::Result<Vec<u8>> {
    let invalid = |error: protobuf::Error| io::Error::new(io::ErrorKind::InvalidData, error);
    let mut request = Criu_req::parse_from_bytes(request).map_err(invalid)?;
    if let Some(options) = request.opts.as_mut() {
        for folder in [&mut options.images_dir_fd, &mut options.work_dir_fd] {
            // -1 is none.
            if let Some(number) = folder.filter(|number| *number >= 0) {
                *folder = Some(exchange(number)?);
            }
        }
    }
    request.write_to_bytes().map_err(invalid)
}
