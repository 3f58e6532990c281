//! The socket pair: one protobuf message per packet, with descriptors.

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

/// Longest answer, in bytes. CRIU's answers have some hundred bytes; the longest holds an error of
/// 1 KiB (`struct str_and_lock` in criu/log.c).
const MAX_ANSWER: usize = 64 << 10;
/// CRIU sends one descriptor at a time.
const MAX_DESCRIPTORS: usize = 4;

/// A message from CRIU.
#[derive(Debug)]
pub(crate) struct Received {
    pub(crate) message: Criu_resp,
    pub(crate) descriptors: Vec<OwnedFd>,
}

/// Our end of the conversation. A datagram socket for tokio, which has no type for SOCK_SEQPACKET:
/// only readiness is used, and works the same.
#[derive(Debug)]
pub(crate) struct Channel(UnixDatagram);

impl Channel {
    /// Returns our end, and the one for criu.
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

    /// Returns the next message, or `None` after the close of the other end.
    pub(crate) async fn receive(&self) -> io::Result<Option<Received>> {
        let receive = || receive_packet(self.0.as_fd(), MAX_ANSWER);
        self.0.async_io(Interest::READABLE, receive).await?.map(parse).transpose()
    }

    /// Returns a message already arrived, or `None`.
    pub(crate) fn received(&self) -> io::Result<Option<Received>> {
        match receive_packet(self.0.as_fd(), MAX_ANSWER) {
            Ok(packet) => packet.map(parse).transpose(),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// A message with descriptors.
pub type Packet = (Vec<u8>, Vec<OwnedFd>);

fn parse((bytes, descriptors): Packet) -> io::Result<Received> {
    let message = Criu_resp::parse_from_bytes(&bytes);
    let message = message.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?;
    Ok(Received { message, descriptors })
}

/// Returns the next message on a socket to or from criu, or `None` after the close of the other
/// end.
///
/// # Errors
/// Fails if the message is longer than `most` bytes, or a nonblocking socket has none.
pub fn receive_packet(socket: BorrowedFd<'_>, most: usize) -> io::Result<Option<Packet>> {
    let mut bytes = vec![0; most];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut into = [IoSliceMut::new(&mut bytes)];
    let received = match rustix::net::recvmsg(socket, &mut into, &mut control, RecvFlags::CMSG_CLOEXEC) {
        // The other end died with unread messages: an end like any other.
        Err(rustix::io::Errno::CONNRESET) => return Ok(None),
        other => other?,
    };
    if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        let what = format!("it is longer than {most} bytes, or has more than {MAX_DESCRIPTORS} descriptors");
        return Err(io::Error::new(io::ErrorKind::InvalidData, what));
    }
    let mut descriptors = vec![];
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(sent) = message {
            descriptors.extend(sent);
        }
    }
    bytes.truncate(received.bytes);
    Ok((!bytes.is_empty()).then_some((bytes, descriptors)))
}

/// Returns the stage announced by a message of criu, and the process if one is named; `None` for
/// every other message.
#[must_use]
pub fn announced(message: &[u8]) -> Option<(Stage, Option<i32>)> {
    let message = Criu_resp::parse_from_bytes(message).ok()?;
    if message.type_() != Criu_req_type::NOTIFY {
        return None;
    }
    Some((Stage::named(message.notify.script()), message.notify.pid))
}

/// Returns another program's request, with other descriptors for the folders: criu reads the
/// numbers in the process of the socket's maker. `exchange` maps a number to a number.
///
/// # Errors Fails if the bytes are no request, or a descriptor cannot be exchanged.
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
