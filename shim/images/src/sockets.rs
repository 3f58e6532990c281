//! Sockets in images: connections of the container with itself are kept, others closed, and addresses freed.
//!
//! CRIU takes all connections of a dump or none. A connection whose other end is not among the images
//! cannot go on in a restored container: its entry becomes that of a socket that was never connected
//! and is shut down. A program then reads the end of the stream and cannot write, as when the other
//! side has gone away.
//!
//! A restored container may have another address, and CRIU cannot bind the old one. So a socket on the
//! container's own address gets the wildcard address. A connection of the container with itself over
//! its own address gets the loopback's.

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
/// 127.0.0.1 and the last word of `::1`, in network order.
const LOOPBACK: u64 = 0x0100_007f;
const LOOPBACK_6: u64 = 0x0100_0000;

/// End of a connection.
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

    /// Returns the connection; `None` for a socket that is not connected by TCP. A socket whose
    /// connection was reset has still the other end's port, and CRIU would connect it again.
    fn connection(&self) -> Option<Connection> {
        let is_reset = self.state == CLOSED && self.ports[1] != 0;
        let is_connected = self.protocol == TCP && (is_reset || !matches!(self.state, CLOSED | LISTENS));
        let [own, other] = [(&self.source, self.ports[0]), (&self.target, self.ports[1])]
            .map(|(address, port)| End::new(address, port));
        is_connected.then_some((self.namespace, own, other))
    }
}

/// Treatment of sockets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sockets {
    /// Close TCP connections whose other end is not in the images.
    pub close_outside: bool,
    /// Free sockets of the container's own addresses. Not in the host's network, whose addresses stay.
    pub free_addresses: bool,
}

/// Numbers of a container's TCP connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Connections {
    /// Ends whose other end is in the images as well.
    pub kept: usize,
    /// Connections to elsewhere.
    pub closed: usize,
}

/// Rewrites the sockets of all processes.
///
/// # Errors
/// Fails if a file is damaged, or cannot be read or written. The images are useless then.
pub fn rewrite_sockets(images: &Path, sockets: Sockets) -> Result<Connections, RewriteError> {
    let path = images.join(FILES);
    let all = connections(&path)?;
    let mut told = Connections::default();
    let (mut entries, mut closed, mut is_changed) = (vec![], vec![], false);
    let mut reader = Reader::open(&path, &FILES_START)?;
    while let Some(entry) = reader.entry(MAX_ENTRY)? {
        let Some(found) = socket(&path, &entry)? else {
            entries.push(entry);
            continue;
        };
        let change = match found.connection() {
            Some(connection) if is_inside(&connection, &all) => {
                told.kept += 1;
                let is_own =
                    sockets.free_addresses && is_own(&found.source) && connection.1.address == connection.2.address;
                is_own.then_some(Change::Loopback)
            }
            Some(_) if sockets.close_outside => {
                told.closed += 1;
                closed.push(found.inode);
                Some(Change::Close)
            }
            Some(_) => None,
            None => (sockets.free_addresses && is_own(&found.source)).then_some(Change::Free),
        };
        is_changed |= change.is_some();
        entries.push(change.map_or(Ok(entry.clone()), |change| with_socket(&path, &entry, change))?);
    }
    if !is_changed {
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

/// Returns whether an address is one of the container's interfaces: no wildcard, loopback or multicast address. A program
/// can be bound to no others.
fn is_own(address: &[u64]) -> bool {
    // The first byte of an address is the lowest of its word.
    let is_own_v4 = |word: u64| word != 0 && word & 0xff != 127 && word & 0xff < 224;
    match address {
        [word] | [0, 0, MAPPED, word] => is_own_v4(*word),
        [0, 0, 0, 0 | LOOPBACK_6] => false,
        // ff00::/8 is multicast; fe80::/10 is bound by an interface, whose name CRIU has.
        [first, ..] => first & 0xff != 0xff && first & 0xc0ff != 0x80fe,
        [] => false,
    }
}

/// Returns whether every TCP connection has both ends in the images.
///
/// # Errors
/// Fails if the file is damaged or cannot be read.
pub fn is_closed_outside(images: &Path) -> Result<bool, ImageError> {
    let path = images.join(FILES);
    let all = connections(&path)?;
    Ok(all.iter().all(|connection| is_inside(connection, &all)))
}

fn is_inside((namespace, own, other): &Connection, all: &BTreeSet<Connection>) -> bool {
    all.contains(&(*namespace, other.clone(), own.clone()))
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

/// Change to a socket.
#[derive(Clone, Copy)]
enum Change {
    /// The socket was never connected, and is shut down.
    Close,
    /// The socket is bound to all addresses.
    Free,
    /// The connection goes over the loopback.
    Loopback,
}

/// Returns the entry with a changed socket.
fn with_socket(path: &Path, entry: &[u8], change: Change) -> Result<Vec<u8>, ImageError> {
    let mut bytes = vec![];
    fields(path, entry, |field| {
        match (field.number, field.value) {
            (SOCKET, Value::Bytes(message)) => put_message(&mut bytes, SOCKET, &changed(path, message, change)?),
            _ => bytes.extend_from_slice(field.raw),
        }
        Ok(())
    })?;
    Ok(bytes)
}

fn changed(path: &Path, socket: &[u8], change: Change) -> Result<Vec<u8>, ImageError> {
    let Socket { source, target, .. } = Socket::of(path, socket)?;
    let [mut source, mut target] = [source, target].map(|address| match change {
        Change::Loopback => loopback(&address).into_iter(),
        Change::Close | Change::Free => vec![0; address.len()].into_iter(),
    });
    let mut bytes = vec![];
    fields(path, socket, |field| {
        match (field.number, change) {
            (STATE, Change::Close) => put_number(&mut bytes, STATE, CLOSED),
            (SOURCE_PORT | TARGET_PORT, Change::Close) => put_number(&mut bytes, field.number, 0),
            (SHUTDOWN, Change::Close) => {}
            (SOURCE, _) => source.next().into_iter().for_each(|word| put_number(&mut bytes, SOURCE, word)),
            (TARGET, Change::Close | Change::Loopback) => {
                target.next().into_iter().for_each(|word| put_number(&mut bytes, TARGET, word));
            }
            _ => bytes.extend_from_slice(field.raw),
        }
        Ok(())
    })?;
    if matches!(change, Change::Close) {
        put_number(&mut bytes, SHUTDOWN, BOTH_WAYS);
    }
    Ok(bytes)
}

/// Returns the loopback's address of the same family.
fn loopback(address: &[u64]) -> Vec<u64> {
    match address {
        [_] => vec![LOOPBACK],
        [0, 0, MAPPED, _] => vec![0, 0, MAPPED, LOOPBACK],
        _ => vec![0, 0, 0, LOOPBACK_6],
    }
}
