//! Sockets in images.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use tempfile::TempDir;

use crate::tests::devices::{FILES, bytes, entries, number, numbers, write};
use crate::wire::{Value, fields, put_message, put_number};
use crate::{Moves, OpenFiles, PrivateCopy, RewriteError};

const STREAM: [u32; 2] = [0x5456_4319, 0x5146_5506];
const ESTABLISHED: u64 = 1;
const CLOSED: u64 = 7;
const LISTENS: u64 = 10;
const TCP: u64 = 6;
const UDP: u64 = 17;

fn put_address(message: &mut Vec<u8>, number: u32, address: IpAddr) {
    let octets = match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    for word in octets.chunks_exact(4) {
        put_number(message, number, u32::from_ne_bytes(word.try_into().unwrap()).into());
    }
}

/// An open file `id`, of a socket with inode `id`.
fn socket(id: u64, protocol: u64, state: u64, source: &str, target: &str) -> Vec<u8> {
    let (source, target): (SocketAddr, SocketAddr) = (source.parse().unwrap(), target.parse().unwrap());
    let (family, kind) = (if source.is_ipv6() { 10 } else { 2 }, if protocol == TCP { 1 } else { 2 });
    let mut socket = numbers(&[(1, id), (2, id), (3, family), (4, kind), (5, protocol), (6, state)]);
    put_number(&mut socket, 7, source.port().into());
    put_number(&mut socket, 8, target.port().into());
    put_number(&mut socket, 9, 2);
    put_number(&mut socket, 10, 0);
    put_address(&mut socket, 11, source.ip());
    put_address(&mut socket, 12, target.ip());
    put_number(&mut socket, 18, 3);
    let mut file = numbers(&[(1, 4), (2, id)]);
    put_message(&mut file, 4, &socket);
    file
}

fn tcp(id: u64, source: &str, target: &str) -> Vec<u8> {
    socket(id, TCP, ESTABLISHED, source, target)
}

/// Writes the stream of socket `id`: the number of the next byte to come, unacknowledged bytes, and the number after the
/// last one written.
fn stream(folder: &Path, id: u64, received: u64, unsent: u64, written: u64) {
    let entry = numbers(&[(1, 0), (2, received), (3, unsent), (4, written), (5, 0)]);
    write(folder, &format!("tcp-stream-{id:x}.img"), &STREAM, &[entry]);
}

/// Writes sockets, and a stream for each that is no listener.
fn images(sockets: &[Vec<u8>]) -> TempDir {
    let folder = TempDir::new().unwrap();
    write(folder.path(), "files.img", &FILES, sockets);
    for file in sockets {
        let id = number(Path::new(""), file, 2).unwrap();
        stream(folder.path(), id, 100, 0, 100);
    }
    folder
}

/// Returns each socket: the file's number, state, ports, shutdown, and whether there is a stream.
fn found(folder: &Path) -> Vec<(u64, [Option<u64>; 4], bool)> {
    let path = folder.join("files.img");
    let of = |entry: &Vec<u8>| {
        let socket = bytes(&path, entry, 4).pop().unwrap();
        let id = number(&path, entry, 2).unwrap();
        let values = [6, 7, 8, 19].map(|field| number(&path, &socket, field));
        (id, values, folder.join(format!("tcp-stream-{id:x}.img")).exists())
    };
    entries(&path, &FILES).iter().map(of).collect()
}

fn close_outside(folder: &Path) -> Result<usize, RewriteError> {
    let mut files = OpenFiles::read(folder)?;
    let closed = files.close_outside()?;
    files.write(folder)?;
    Ok(closed)
}

/// Returns the numbers of sockets that were closed.
fn closed(folder: &Path) -> Vec<u64> {
    assert_eq!(close_outside(folder).unwrap(), found(folder).iter().filter(|(.., exists)| !exists).count());
    let sockets = found(folder);
    for (id, values, exists) in &sockets {
        let is_closed = *values == [Some(CLOSED), Some(0), Some(0), Some(3)];
        assert_eq!(is_closed, !exists, "{id}: {values:?}");
    }
    assert_eq!(close_outside(folder).unwrap(), 0);
    sockets.into_iter().filter_map(|(id, _, exists)| (!exists).then_some(id)).collect()
}

#[test]
fn a_connection_to_the_outside_is_closed_and_one_within_stays() {
    let folder = images(&[
        socket(16, TCP, LISTENS, "10.4.0.2:80", "0.0.0.0:0"),
        tcp(17, "10.4.0.2:80", "10.4.0.1:40000"),
        tcp(18, "127.0.0.1:5000", "127.0.0.1:6000"),
        tcp(19, "127.0.0.1:6000", "127.0.0.1:5000"),
        // Nobody has accepted it: the other end is in no process.
        tcp(20, "127.0.0.1:6001", "127.0.0.1:5000"),
        socket(21, UDP, ESTABLISHED, "10.4.0.2:5353", "10.4.0.1:53"),
        socket(22, TCP, CLOSED, "10.4.0.2:5001", "0.0.0.0:0"),
    ]);
    assert_eq!(closed(folder.path()), [17, 20]);
}

#[test]
fn the_rest_of_a_closed_socket_stays_as_it_was() {
    let folder = images(&[tcp(17, "10.4.0.2:80", "10.4.0.1:40000")]);
    let path = folder.path().join("files.img");
    let rest = || {
        let socket = bytes(&path, &entries(&path, &FILES)[0], 4).pop().unwrap();
        let mut rest = vec![];
        fields(&path, &socket, |field| {
            if let (Value::Number(value), false) = (field.value, [6, 7, 8, 19].contains(&field.number)) {
                rest.push((field.number, value));
            }
            Ok(())
        })
        .unwrap();
        rest
    };
    let before = rest();
    closed(folder.path());
    assert_eq!(rest(), before);
}

#[test]
fn ipv4_in_ipv6_is_the_same_address() {
    let folder = images(&[
        tcp(17, "[::ffff:127.0.0.1]:80", "[::ffff:127.0.0.1]:6000"),
        tcp(18, "127.0.0.1:6000", "127.0.0.1:80"),
        tcp(19, "[fd00::2]:80", "[fd00::1]:6000"),
        tcp(20, "[::1]:80", "[::1]:6000"),
        tcp(21, "[::1]:6000", "[::1]:80"),
    ]);
    assert_eq!(closed(folder.path()), [19]);
}

#[test]
fn a_connection_that_was_reset_is_closed_whatever_has_its_addresses_now() {
    let folder = images(&[
        socket(17, TCP, CLOSED, "127.0.0.1:80", "127.0.0.1:6000"),
        tcp(18, "127.0.0.1:80", "127.0.0.1:6000"),
        tcp(19, "127.0.0.1:6000", "127.0.0.1:80"),
        socket(20, TCP, CLOSED, "127.0.0.1:80", "127.0.0.1:6001"),
    ]);
    assert_eq!(closed(folder.path()), [17, 20]);
}

#[test]
fn a_connection_that_is_over_is_closed_without_any_other() {
    let folder = images(&[
        socket(17, TCP, CLOSED, "10.4.0.2:80", "10.4.0.1:6000"),
        tcp(18, "10.4.0.2:80", "10.4.0.1:6001"),
        socket(19, TCP, CLOSED, "10.4.0.2:81", "0.0.0.0:0"),
    ]);
    let mut files = OpenFiles::read(folder.path()).unwrap();
    files.close_ended().unwrap();
    files.write(folder.path()).unwrap();
    let ports: Vec<_> = found(folder.path()).iter().map(|(_, values, exists)| (values[1], *exists)).collect();
    assert_eq!(ports, [(Some(0), false), (Some(80), true), (Some(81), true)]);
}

#[test]
fn the_same_addresses_in_another_network_are_another_connection() {
    let mut other = tcp(18, "127.0.0.1:6000", "127.0.0.1:80");
    let inner = bytes(Path::new(""), &other, 4).pop().unwrap();
    let inner = crate::wire::with_numbers(Path::new(""), &inner, &[(18, 4)]).unwrap();
    other = numbers(&[(1, 4), (2, 18)]);
    put_message(&mut other, 4, &inner);
    let folder = images(&[tcp(17, "127.0.0.1:80", "127.0.0.1:6000"), other]);
    assert_eq!(closed(folder.path()), [17, 18]);
}

#[test]
fn a_pair_that_has_lost_bytes_between_its_two_dumps_is_closed() {
    let pair = [tcp(17, "127.0.0.1:80", "127.0.0.1:6000"), tcp(18, "127.0.0.1:6000", "127.0.0.1:80")];
    let folder = images(&pair);
    // Bytes on the way are sent again; numbers may wrap around.
    stream(folder.path(), 17, 5, 0, 100);
    stream(folder.path(), 18, 100, 20, 15);
    assert_eq!(closed(folder.path()), [0_u64; 0]);
    // The end of the data counts, too.
    stream(folder.path(), 18, 99, 20, 15);
    assert_eq!(closed(folder.path()), [0_u64; 0]);
    // Socket 17 has been told that 18 has bytes up to 100, and 18 was saved without ten of them.
    stream(folder.path(), 18, 90, 20, 15);
    assert_eq!(closed(folder.path()), [17, 18]);
}

#[test]
fn a_damaged_socket_is_an_error() {
    let folder = images(&[tcp(17, "127.0.0.1:80", "127.0.0.1:6000"), tcp(18, "127.0.0.1:6000", "127.0.0.1:80")]);
    std::fs::remove_file(folder.path().join("tcp-stream-12.img")).unwrap();
    let error = close_outside(folder.path()).unwrap_err().to_string();
    assert!(error.contains("tcp-stream-12.img"), "{error}");
    let mut file = numbers(&[(1, 4), (2, 17)]);
    put_message(&mut file, 4, &numbers(&[(3, 10), (11, 1)]));
    write(folder.path(), "files.img", &FILES, &[file]);
    let error = close_outside(folder.path()).unwrap_err().to_string();
    assert!(error.contains("no address"), "{error}");
}

fn moves(all: &[(&str, &str)]) -> Moves {
    let address = |text: &str| text.parse().unwrap();
    all.iter().map(|(old, new)| (address(old), (!new.is_empty()).then(|| address(new)))).collect()
}

/// Returns the addresses of the sockets after a move.
fn moved(sockets: &[Vec<u8>], to: &Moves, is_reachable: bool) -> Vec<[SocketAddr; 2]> {
    let folder = images(sockets);
    let mut files = OpenFiles::read(folder.path()).unwrap();
    files.move_sockets(to, &|_| is_reachable).unwrap();
    files.write(folder.path()).unwrap();
    let path = folder.path().join("files.img");
    let of = |entry: &Vec<u8>| {
        let socket = bytes(&path, entry, 4).pop().unwrap();
        [(7, 11), (8, 12)].map(|(port, address)| {
            let mut octets = vec![];
            fields(&path, &socket, |field| {
                if let (true, Value::Number(value)) = (field.number == address, field.value) {
                    octets.extend(u32::try_from(value).unwrap().to_ne_bytes());
                }
                Ok(())
            })
            .unwrap();
            let address = match <[u8; 4]>::try_from(&octets[..]) {
                Ok(octets) => IpAddr::from(octets),
                Err(_) => IpAddr::from(<[u8; 16]>::try_from(&octets[..]).unwrap()),
            };
            SocketAddr::new(address, number(&path, &socket, port).unwrap().try_into().unwrap())
        })
    };
    entries(&path, &FILES).iter().map(of).collect()
}

fn addresses(all: &[[&str; 2]]) -> Vec<[SocketAddr; 2]> {
    all.iter().map(|both| both.map(|address| address.parse().unwrap())).collect()
}

/// A listener, a connected UDP socket, both ends of a connection, a listener on IPv6 with an IPv4 address, and one that is
/// bound to any address.
fn of_every_kind() -> [Vec<u8>; 6] {
    [
        socket(16, TCP, LISTENS, "10.4.0.2:80", "0.0.0.0:0"),
        socket(17, UDP, ESTABLISHED, "10.4.0.2:5353", "10.4.0.1:53"),
        tcp(18, "10.4.0.2:6000", "10.4.0.2:5000"),
        tcp(19, "10.4.0.2:5000", "10.4.0.2:6000"),
        socket(20, TCP, LISTENS, "[::ffff:10.4.0.2]:81", "[::]:0"),
        socket(21, UDP, CLOSED, "0.0.0.0:82", "0.0.0.0:0"),
    ]
}

#[test]
fn sockets_follow_an_address_to_its_successor() {
    let expected = addresses(&[
        ["10.9.0.7:80", "0.0.0.0:0"],
        ["10.9.0.7:5353", "10.4.0.1:53"],
        ["10.9.0.7:6000", "10.9.0.7:5000"],
        ["10.9.0.7:5000", "10.9.0.7:6000"],
        ["[::ffff:10.9.0.7]:81", "[::]:0"],
        ["0.0.0.0:82", "0.0.0.0:0"],
    ]);
    assert_eq!(moved(&of_every_kind(), &moves(&[("10.4.0.2", "10.9.0.7")]), true), expected);
}

#[test]
fn without_a_successor_sockets_are_at_any_address_and_inner_connections_on_the_loopback() {
    let expected = addresses(&[
        ["0.0.0.0:80", "0.0.0.0:0"],
        ["0.0.0.0:5353", "0.0.0.0:0"],
        ["127.0.0.1:6000", "127.0.0.1:5000"],
        ["127.0.0.1:5000", "127.0.0.1:6000"],
        ["[::ffff:0.0.0.0]:81", "[::]:0"],
        ["0.0.0.0:82", "0.0.0.0:0"],
    ]);
    assert_eq!(moved(&of_every_kind(), &moves(&[("10.4.0.2", "")]), false), expected);
    let ipv6 = [tcp(16, "[fd00::2]:80", "[fd00::2]:81"), socket(17, TCP, LISTENS, "[fd00::2]:80", "[::]:0")];
    let expected = addresses(&[["[::1]:80", "[::1]:81"], ["[::]:80", "[::]:0"]]);
    assert_eq!(moved(&ipv6, &moves(&[("fd00::2", "")]), true), expected);
}

#[test]
fn sockets_at_other_addresses_stay_and_nothing_is_written() {
    let folder = images(&of_every_kind());
    let mut files = OpenFiles::read(folder.path()).unwrap();
    files.move_sockets(&moves(&[("10.4.0.3", "")]), &|_| true).unwrap();
    assert!(!files.is_changed());
}

#[test]
fn a_private_copy_takes_changes_and_leaves_the_images_as_they_are() {
    let folder = images(&[tcp(17, "10.4.0.2:80", "10.4.0.1:40000")]);
    let before = std::fs::read(folder.path().join("files.img")).unwrap();
    let copy = PrivateCopy::of(folder.path(), folder.path()).unwrap();
    assert_eq!(closed(copy.path()), [17]);
    assert_eq!(std::fs::read(folder.path().join("files.img")).unwrap(), before);
    assert!(folder.path().join("tcp-stream-11.img").exists());
}
