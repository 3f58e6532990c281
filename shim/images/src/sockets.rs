//! TCP connections whose other end is not in the images.
//!
//! CRIU saves every connection of the tree alike, and at a restore puts each one together again. The
//! other end of a connection to the outside still talks to the saved container, or is gone. Here such
//! a connection becomes a socket that was shut down: a reader finds its end, a writer a broken pipe,
//! as when the other end goes away. Connections of the container with itself stay.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;

use crate::devices::FILE_TYPE;
use crate::files::OpenFiles;
use crate::format::{COMMON_MAGIC, ImageError, damaged};
use crate::wire::{MAX_ENTRY, Value, fields, first_entry, put_message, put_number, with_numbers};

const STREAM_START: [u32; 2] = [COMMON_MAGIC, 0x5146_5506];

/// The kind of an open file, and its field, in images/fdinfo.proto.
const INET: u64 = 4;
const FILE_INET: u32 = 4;

/// Fields of a socket, in images/sk-inet.proto.
const INODE: u32 = 2;
const FAMILY: u32 = 3;
const TYPE: u32 = 4;
const PROTOCOL: u32 = 5;
const STATE: u32 = 6;
const SOURCE_PORT: u32 = 7;
const TARGET_PORT: u32 = 8;
const SOURCE: u32 = 11;
const TARGET: u32 = 12;
const NAMESPACE: u32 = 18;
const SHUTDOWN: u32 = 19;

/// Fields of a connection, in images/tcp-stream.proto.
const RECEIVED: u32 = 2;
const UNSENT: u32 = 3;
const WRITTEN: u32 = 4;

/// Numbers of Linux.
const STREAM: u64 = 1;
const DATAGRAM: u64 = 2;
const TCP: u64 = 6;
const INET6: u64 = 10;
const CLOSED: u64 = 7;
const LISTENS: u64 = 10;

/// Both directions, in images/sk-opts.proto.
const BOTH: u64 = 3;

/// A socket of the internet protocols in the images.
#[derive(Clone, Debug)]
struct Socket {
    inode: u64,
    is_tcp: bool,
    is_udp: bool,
    /// The family, also with an IPv4 address inside.
    is_ipv6: bool,
    state: u64,
    source: SocketAddr,
    target: SocketAddr,
    namespace: Option<u64>,
}

/// Direction of a connection: network namespace, own address and the other end's.
type Route = (Option<u64>, SocketAddr, SocketAddr);

impl Socket {
    /// Reads the socket of an open file; `None` for any other kind of file.
    fn of(path: &Path, entry: &[u8]) -> Result<Option<Self>, ImageError> {
        let (mut kind, mut socket) = (0, None);
        fields(path, entry, |field| {
            match (field.number, field.value) {
                (FILE_TYPE, Value::Number(value)) => kind = value,
                (FILE_INET, Value::Bytes(message)) => socket = Some(message),
                _ => {}
            }
            Ok(())
        })?;
        socket.filter(|_| kind == INET).map(|message| Self::parse(path, message)).transpose()
    }

    fn parse(path: &Path, message: &[u8]) -> Result<Self, ImageError> {
        let mut numbers = BTreeMap::new();
        let (mut source, mut target) = (vec![], vec![]);
        fields(path, message, |field| {
            if let Value::Number(value) = field.value {
                match field.number {
                    SOURCE => source.push(value),
                    TARGET => target.push(value),
                    number => drop(numbers.insert(number, value)),
                }
            }
            Ok(())
        })?;
        let number = |number| numbers.get(&number).copied().unwrap_or_default();
        let address = |words: &[u64], port: u32| {
            let port = u16::try_from(number(port)).ok();
            let address = address(number(FAMILY), words).zip(port);
            address.map(SocketAddr::from).ok_or_else(|| damaged(path, "a socket has no address"))
        };
        Ok(Self {
            inode: number(INODE),
            is_tcp: number(TYPE) == STREAM && number(PROTOCOL) == TCP,
            is_udp: number(TYPE) == DATAGRAM,
            is_ipv6: number(FAMILY) == INET6,
            state: number(STATE),
            source: address(&source, SOURCE_PORT)?,
            target: address(&target, TARGET_PORT)?,
            namespace: numbers.get(&NAMESPACE).copied(),
        })
    }

    /// Returns whether CRIU takes the socket for a connection: one that the other end has reset, too.
    fn is_connection(&self) -> bool {
        self.is_tcp && self.state != LISTENS && (self.state != CLOSED || self.target.port() != 0)
    }

    fn route(&self) -> Route {
        (self.namespace, self.source, self.target)
    }

    fn way_back(&self) -> Route {
        (self.namespace, self.target, self.source)
    }
}

/// Returns the address in words of the images; an IPv4 address mapped into IPv6 as the former.
fn address(family: u64, words: &[u64]) -> Option<IpAddr> {
    let mut bytes = [0; 16];
    let size = if family == INET6 { 16 } else { 4 };
    if words.len() * 4 < size {
        return None;
    }
    for (place, word) in bytes.chunks_exact_mut(4).zip(words) {
        place.copy_from_slice(&u32::try_from(*word).ok()?.to_ne_bytes());
    }
    Some(if family == INET6 {
        Ipv6Addr::from(bytes).to_canonical()
    } else {
        Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]).into()
    })
}

/// Progress of a connection, by the numbers of its bytes.
struct Stream {
    received: u32,
    acknowledged: u32,
}

impl Stream {
    fn of(images: &Path, socket: &Socket) -> Result<Self, ImageError> {
        let path = images.join(stream_name(socket));
        let (mut received, mut unsent, mut written) = (0, 0, 0);
        fields(&path, &first_entry(&path, &STREAM_START, MAX_ENTRY)?, |field| {
            let Value::Number(value) = field.value else { return Ok(()) };
            let value = || u32::try_from(value).map_err(|_| damaged(&path, "a number is too large"));
            match field.number {
                RECEIVED => received = value()?,
                UNSENT => unsent = value()?,
                WRITTEN => written = value()?,
                _ => {}
            }
            Ok(())
        })?;
        Ok(Self { received, acknowledged: written.wrapping_sub(unsent) })
    }

    /// Returns whether the other end has all that it told to have. CRIU saves the two ends one after
    /// the other, and the kernel moves data meanwhile.
    fn is_whole_at(&self, other: &Self) -> bool {
        // The end of the data counts as one more byte, which CRIU does not always count.
        const END: u32 = 1;
        let ahead = self.acknowledged.wrapping_sub(other.received);
        ahead <= END || ahead > u32::MAX / 2
    }
}

fn stream_name(socket: &Socket) -> String {
    format!("tcp-stream-{:x}.img", socket.inode)
}

impl OpenFiles {
    /// Closes the TCP connections that lead out of the images. Returns the number of closed ones. A second
    /// call changes nothing.
    ///
    /// # Errors
    /// Fails if a file is damaged, or cannot be read.
    pub fn close_outside(&mut self) -> Result<usize, ImageError> {
        let sockets = self.sockets()?;
        let connections = sockets.iter().map(|(_, socket)| socket);
        let connections = connections.filter(|socket| socket.is_connection() && socket.state != CLOSED);
        let connections: BTreeMap<_, _> = connections.map(|socket| (socket.route(), socket)).collect();
        let mut inner = BTreeMap::new();
        for (route, socket) in &connections {
            let Some(other) = connections.get(&socket.way_back()) else { continue };
            let (this, that) = (Stream::of(&self.images, socket)?, Stream::of(&self.images, other)?);
            if this.is_whole_at(&that) && that.is_whole_at(&this) {
                inner.insert(*route, socket.inode);
            }
        }
        let mut closed = 0;
        for (at, socket) in &sockets {
            if socket.is_connection() && inner.get(&socket.route()) != Some(&socket.inode) {
                self.close(*at, socket)?;
                closed += 1;
            }
        }
        Ok(closed)
    }

    /// Closes the TCP connections that are over, such as those reset by the other end. CRIU takes them for
    /// established ones at a restore.
    ///
    /// # Errors
    /// Fails if a file is damaged.
    pub fn close_ended(&mut self) -> Result<(), ImageError> {
        let sockets = self.sockets()?;
        let mut ended = sockets.iter().filter(|(_, socket)| socket.is_connection() && socket.state == CLOSED);
        ended.try_for_each(|(at, socket)| self.close(*at, socket))
    }

    fn close(&mut self, at: usize, socket: &Socket) -> Result<(), ImageError> {
        self.entries[at] = without_connection(&self.path, &self.entries[at])?;
        self.unused.push(stream_name(socket));
        self.is_changed = true;
        Ok(())
    }

    /// Returns the sockets, with the places of their open files.
    fn sockets(&self) -> Result<Vec<(usize, Socket)>, ImageError> {
        let mut sockets = vec![];
        for (at, entry) in self.entries.iter().enumerate() {
            sockets.extend(Socket::of(&self.path, entry)?.map(|socket| (at, socket)));
        }
        Ok(sockets)
    }
}

/// Fates of the addresses of a network that is left: successors, or none.
pub type Moves = BTreeMap<IpAddr, Option<IpAddr>>;

impl OpenFiles {
    /// Moves sockets to another network. An address without a successor becomes the loopback address in a
    /// connection of the container with itself, and any address in other sockets. A connection to elsewhere
    /// does not move: its other end knows the address. A UDP socket is connected only to what `is_reachable`.
    ///
    /// # Errors
    /// Fails if a file is damaged.
    pub fn move_sockets(&mut self, moves: &Moves, is_reachable: &dyn Fn(SocketAddr) -> bool) -> Result<(), ImageError> {
        for (at, socket) in self.sockets()? {
            let Some(moved) = socket.moved(moves, is_reachable) else { continue };
            self.entries[at] = with_socket(&self.path, &self.entries[at], |message| moved.put(&self.path, message))?;
            self.is_changed = true;
        }
        Ok(())
    }
}

impl Socket {
    /// Returns the socket in another network; `None` if nothing changes.
    fn moved(&self, moves: &Moves, is_reachable: &dyn Fn(SocketAddr) -> bool) -> Option<Self> {
        let to = |old: SocketAddr, other: fn(&IpAddr) -> IpAddr| {
            let new = moves.get(&old.ip()).map(|new| new.unwrap_or_else(|| other(&old.ip())));
            SocketAddr::new(new.unwrap_or(old.ip()), old.port())
        };
        let leads_out = !self.target.ip().is_loopback() && !moves.contains_key(&self.target.ip());
        if self.is_connection() && leads_out {
            return None;
        }
        let mut moved = self.clone();
        moved.source = to(self.source, if self.is_connection() { loopback } else { any });
        moved.target = to(self.target, loopback);
        if self.is_udp && self.target.port() != 0 && !is_reachable(moved.target) {
            moved.state = CLOSED;
            moved.target = SocketAddr::new(any(&self.target.ip()), 0);
        }
        ((moved.source, moved.target) != (self.source, self.target)).then_some(moved)
    }

    /// Returns the message of a socket with this one's state and addresses.
    fn put(&self, path: &Path, message: &[u8]) -> Result<Vec<u8>, ImageError> {
        let changed = [(STATE, self.state), (TARGET_PORT, self.target.port().into())];
        let mut bytes = vec![];
        fields(path, &with_numbers(path, message, &changed)?, |field| {
            if ![SOURCE, TARGET].contains(&field.number) {
                bytes.extend_from_slice(field.raw);
            }
            Ok(())
        })?;
        for (field, address) in [(SOURCE, self.source), (TARGET, self.target)] {
            words(address.ip(), self.is_ipv6).into_iter().for_each(|word| put_number(&mut bytes, field, word));
        }
        Ok(bytes)
    }
}

fn any(address: &IpAddr) -> IpAddr {
    if address.is_ipv6() { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() }
}

fn loopback(address: &IpAddr) -> IpAddr {
    if address.is_ipv6() { Ipv6Addr::LOCALHOST.into() } else { Ipv4Addr::LOCALHOST.into() }
}

/// Returns an address in words of the images.
fn words(address: IpAddr, is_ipv6: bool) -> Vec<u64> {
    let octets = match address {
        IpAddr::V4(address) if is_ipv6 => address.to_ipv6_mapped().octets().to_vec(),
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    let word = |octets: &[u8]| octets.try_into().map_or(0, u32::from_ne_bytes).into();
    octets.chunks_exact(4).map(word).collect()
}

/// Returns an open file with its connection closed: a socket that was never bound, and shut down.
fn without_connection(path: &Path, entry: &[u8]) -> Result<Vec<u8>, ImageError> {
    let changed = [(STATE, CLOSED), (SOURCE_PORT, 0), (TARGET_PORT, 0)];
    with_socket(path, entry, |message| {
        let mut socket = vec![];
        fields(path, &with_numbers(path, message, &changed)?, |field| {
            if field.number != SHUTDOWN {
                socket.extend_from_slice(field.raw);
            }
            Ok(())
        })?;
        put_number(&mut socket, SHUTDOWN, BOTH);
        Ok(socket)
    })
}

/// Returns an open file with its socket changed.
fn with_socket(
    path: &Path,
    entry: &[u8],
    mut change: impl FnMut(&[u8]) -> Result<Vec<u8>, ImageError>,
) -> Result<Vec<u8>, ImageError> {
    let mut changed = vec![];
    fields(path, entry, |field| {
        match field.value {
            Value::Bytes(message) if field.number == FILE_INET => {
                put_message(&mut changed, FILE_INET, &change(message)?);
            }
            _ => changed.extend_from_slice(field.raw),
        }
        Ok(())
    })?;
    Ok(changed)
}
