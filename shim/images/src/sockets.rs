//! TCP connections in images: those of the container with itself are kept, the others closed.
//!
//! CRIU takes all connections of a dump or none. A connection whose other end is not among the images
//! cannot go on in a restored container: its entry becomes that of a socket that was never connected
//! and is shut down. A program then reads the end of the stream and cannot write, as when the other
//! side has gone away.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;

use crate::format::{COMMON_MAGIC, FILES_MAGIC, ImageError, damaged};
use crate::rewrite::{RewriteError, replace};
use crate::wire::{MAX_ENTRY, Reader, Value, fields, put_message, put_number, write_entry, write_magic};

/// The file of all open files of all processes.
pub(crate) const FILES: &str = "files.img";
pub(crate) const FILES_START: [u32; 2] = [COMMON_MAGIC, FILES_MAGIC];

/// `isk` of an open file, in images/fdinfo.proto.
const SOCKET: u32 = 4;

/// Fields of a socket, in images/sk-inet.proto.
const INODE: u32 = 2;
const FAMILY: u32 = 3;
const PROTOCOL: u32 = 5;
const STATE: u32 = 6;
const SOURCE_PORT: u32 = 7;
const TARGET_PORT: u32 = 8;
const SOURCE: u32 = 11;
const TARGET: u32 = 12;
const NAMESPACE: u32 = 18;
const SHUTDOWN: u32 = 19;

/// `IPPROTO_TCP`.
const TCP: u64 = 6;
/// `AF_INET6`.
const INET6: u64 = 10;
/// `TCP_CLOSE` and `TCP_LISTEN` of include/net/tcp_states.h.
const CLOSED: u64 = 7;
const LISTENS: u64 = 10;
/// `BOTH` of images/sk-opts.proto.
const BOTH_WAYS: u64 = 3;
/// Third word of an IPv4 address in IPv6: `::ffff:0:0/96` in network order.
const MAPPED: u64 = 0xffff_0000;

/// One end of a connection.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct End {
    /// Words of the address; one for IPv4, in IPv6 or not.
    address: Vec<u64>,
    port: u64,
}

impl End {
    fn new(address: &[u64], port: u64) -> Self {
        let address = match address {
            [0, 0, MAPPED, v4] => vec![*v4],
            address => address.to_vec(),
        };
        Self { address, port }
    }
}

/// A TCP connection: the namespace, the own end, and the other one.
type Connection = (u64, End, End);

/// A socket among the open files.
#[derive(Default)]
struct Socket {
    inode: u64,
    family: u64,
    protocol: u64,
    state: u64,
    ports: [u64; 2],
    source: Vec<u64>,
    target: Vec<u64>,
    namespace: u64,
}

impl Socket {
    fn of(path: &Path, message: &[u8]) -> Result<Self, ImageError> {
        let mut socket = Self::default();
        fields(path, message, |field| {
            let Value::Number(value) = field.value else { return Ok(()) };
            match field.number {
                INODE => socket.inode = value,
                FAMILY => socket.family = value,
                PROTOCOL => socket.protocol = value,
                STATE => socket.state = value,
                SOURCE_PORT => socket.ports[0] = value,
                TARGET_PORT => socket.ports[1] = value,
                SOURCE => socket.source.push(value),
                TARGET => socket.target.push(value),
                NAMESPACE => socket.namespace = value,
                _ => {}
            }
            Ok(())
        })?;
        let words = if socket.family == INET6 { 4 } else { 1 };
        if socket.source.len() > words || socket.target.len() > words {
            return Err(damaged(path, "a socket has an address of another family"));
        }
        Ok(socket)
    }

    /// Returns the connection; `None` for a socket that is not connected by TCP.
    fn connection(&self) -> Option<Connection> {
        let is_connected = self.protocol == TCP && !matches!(self.state, CLOSED | LISTENS);
        let [own, other] = [(&self.source, self.ports[0]), (&self.target, self.ports[1])]
            .map(|(address, port)| End::new(address, port));
        is_connected.then_some((self.namespace, own, other))
    }
}

/// Numbers of a container's TCP connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Connections {
    /// Ends whose other end is in the images as well.
    pub kept: usize,
    /// Connections to elsewhere.
    pub closed: usize,
}

/// Closes the TCP connections whose other end is not in the images.
///
/// # Errors
/// Fails if a file is damaged, or cannot be read or written. The images are useless then.
pub fn close_outside(images: &Path) -> Result<Connections, RewriteError> {
    let path = images.join(FILES);
    let all = connections(&path)?;
    let mut told = Connections::default();
    let mut entries = vec![];
    let mut closed = vec![];
    let mut reader = Reader::open(&path, &FILES_START)?;
    while let Some(entry) = reader.entry(MAX_ENTRY)? {
        let Some(socket) = socket(&path, &entry)?.filter(|socket| socket.connection().is_some()) else {
            entries.push(entry);
            continue;
        };
        if is_inside(&socket, &all) {
            told.kept += 1;
            entries.push(entry);
        } else {
            told.closed += 1;
            closed.push(socket.inode);
            entries.push(as_closed(&path, &entry)?);
        }
    }
    if closed.is_empty() {
        return Ok(told);
    }
    replace(&path, |out| {
        write_magic(out, &FILES_START)?;
        entries.iter().try_for_each(|entry| write_entry(out, entry))
    })?;
    for inode in closed {
        let stream = images.join(format!("tcp-stream-{inode:x}.img"));
        match std::fs::remove_file(&stream) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(RewriteError::File { action: "remove", path: stream, source });
            }
            _ => {}
        }
    }
    Ok(told)
}

/// Returns whether every TCP connection has both ends in the images.
///
/// # Errors
/// Fails if the file is damaged or cannot be read.
pub fn is_closed_outside(images: &Path) -> Result<bool, ImageError> {
    let path = images.join(FILES);
    let all = connections(&path)?;
    Ok(all.iter().all(|(namespace, own, other)| all.contains(&(*namespace, other.clone(), own.clone()))))
}

fn is_inside(socket: &Socket, all: &BTreeSet<Connection>) -> bool {
    socket.connection().is_some_and(|(namespace, own, other)| all.contains(&(namespace, other, own)))
}

fn connections(path: &Path) -> Result<BTreeSet<Connection>, ImageError> {
    let mut all = BTreeSet::new();
    let mut reader = Reader::open(path, &FILES_START)?;
    while let Some(entry) = reader.entry(MAX_ENTRY)? {
        all.extend(socket(path, &entry)?.and_then(|socket| socket.connection()));
    }
    Ok(all)
}

/// Returns the socket of an open file.
fn socket(path: &Path, entry: &[u8]) -> Result<Option<Socket>, ImageError> {
    let mut found = None;
    fields(path, entry, |field| {
        if let (SOCKET, Value::Bytes(message)) = (field.number, field.value) {
            found = Some(Socket::of(path, message)?);
        }
        Ok(())
    })?;
    Ok(found)
}

/// Returns the entry with a socket that was never connected and is shut down.
fn as_closed(path: &Path, entry: &[u8]) -> Result<Vec<u8>, ImageError> {
    let mut bytes = vec![];
    fields(path, entry, |field| {
        match (field.number, field.value) {
            (SOCKET, Value::Bytes(message)) => put_message(&mut bytes, SOCKET, &closed(path, message)?),
            _ => bytes.extend_from_slice(field.raw),
        }
        Ok(())
    })?;
    Ok(bytes)
}

fn closed(path: &Path, socket: &[u8]) -> Result<Vec<u8>, ImageError> {
    let mut bytes = vec![];
    fields(path, socket, |field| {
        match field.number {
            STATE => put_number(&mut bytes, STATE, CLOSED),
            SOURCE_PORT | TARGET_PORT => put_number(&mut bytes, field.number, 0),
            SHUTDOWN => {}
            _ => bytes.extend_from_slice(field.raw),
        }
        Ok(())
    })?;
    put_number(&mut bytes, SHUTDOWN, BOTH_WAYS);
    Ok(bytes)
}
