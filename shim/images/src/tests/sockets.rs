//! Connections in images.

use std::path::Path;

use tempfile::TempDir;

use crate::tests::formats::file;
use crate::wire::{Reader, Value, fields, put_message, put_number};
use crate::{Connections, Sockets, is_closed_outside, rewrite_sockets};

const FILES: [u32; 2] = [0x5456_4319, 0x5630_3138];
const ESTABLISHED: u64 = 1;
const CLOSED: u64 = 7;
const LISTENS: u64 = 10;
const TCP: u64 = 6;
const CLOSE: Sockets = Sockets { close_outside: true, free_addresses: false };
const ALL: Sockets = Sockets { close_outside: true, free_addresses: true };
const UDP: u64 = 17;

/// An end: address and port. `Six` is an address of IPv6, `Mapped` one of IPv4 in it.
#[derive(Clone, Copy)]
enum At {
    Four(u64, u64),
    Six(u64, u64),
    Mapped(u64, u64),
}

impl At {
    fn words(self) -> (Vec<u64>, u64) {
        match self {
            Self::Four(address, port) => (vec![address], port),
            Self::Six(address, port) => (vec![0x20, 0, 0, address], port),
            Self::Mapped(address, port) => (vec![0, 0, 0xffff_0000, address], port),
        }
    }
}

fn socket(inode: u64, protocol: u64, state: u64, own: At, other: At) -> Vec<u8> {
    let family = if matches!(own, At::Four(..)) { 2 } else { 10 };
    let ((source, source_port), (target, target_port)) = (own.words(), other.words());
    let mut socket = vec![];
    let head = [(1, inode + 500), (2, inode), (3, family), (4, 1), (5, protocol), (6, state)];
    for (number, value) in head.into_iter().chain([(7, source_port), (8, target_port), (9, 2), (10, 0)]) {
        put_number(&mut socket, number, value);
    }
    source.into_iter().for_each(|word| put_number(&mut socket, 11, word));
    target.into_iter().for_each(|word| put_number(&mut socket, 12, word));
    put_message(&mut socket, 13, &[8, 5]);
    put_number(&mut socket, 18, 9);
    let mut entry = vec![];
    put_number(&mut entry, 1, 4);
    put_number(&mut entry, 2, inode + 500);
    put_message(&mut entry, 4, &socket);
    entry
}

fn images(sockets: &[Vec<u8>]) -> TempDir {
    let folder = TempDir::new().unwrap();
    file(&folder.path().join("files.img"), &FILES, &sockets.iter().map(Vec::as_slice).collect::<Vec<_>>());
    for inode in 1..20 {
        std::fs::write(folder.path().join(format!("tcp-stream-{inode:x}.img")), b"queue").unwrap();
    }
    folder
}

/// State, ports and shutdown of each socket.
fn states(folder: &Path) -> Vec<(u64, u64, u64, Option<u64>)> {
    let path = folder.join("files.img");
    let mut reader = Reader::open(&path, &FILES).unwrap();
    let mut states = vec![];
    while let Some(entry) = reader.entry(1 << 20).unwrap() {
        let (mut state, mut ports, mut shutdown) = (0, [0, 0], None);
        fields(&path, &entry, |field| {
            let (4, Value::Bytes(socket)) = (field.number, field.value) else { return Ok(()) };
            fields(&path, socket, |field| {
                match (field.number, field.value) {
                    (6, Value::Number(value)) => state = value,
                    (7, Value::Number(value)) => ports[0] = value,
                    (8, Value::Number(value)) => ports[1] = value,
                    (19, Value::Number(value)) => shutdown = Some(value),
                    _ => {}
                }
                Ok(())
            })
        })
        .unwrap();
        states.push((state, ports[0], ports[1], shutdown));
    }
    states
}

#[test]
fn connections_within_the_container_stay_and_others_are_shut_down() {
    use At::{Four, Mapped, Six};
    let (local, peer) = (0x0100_007f, 0x0808_0808);
    let folder = images(&[
        socket(1, TCP, LISTENS, Four(0, 80), Four(0, 0)),
        socket(2, TCP, ESTABLISHED, Four(local, 80), Four(local, 4000)),
        socket(3, TCP, ESTABLISHED, Four(local, 4000), Four(local, 80)),
        socket(10, TCP, ESTABLISHED, Four(local, 80), Four(peer, 4000)),
        socket(11, TCP, 2, Four(local, 4001), Four(peer, 443)),
        socket(12, UDP, ESTABLISHED, Four(local, 53), Four(peer, 53)),
        socket(13, TCP, 4, Mapped(local, 90), Six(7, 1)),
        socket(14, TCP, ESTABLISHED, Mapped(local, 90), Mapped(local, 91)),
        socket(15, TCP, 8, Four(local, 91), Four(local, 90)),
        socket(16, TCP, ESTABLISHED, Six(1, 80), Six(2, 81)),
    ]);
    let path = folder.path();
    assert!(!is_closed_outside(path).unwrap());
    assert_eq!(rewrite_sockets(path, CLOSE).unwrap(), Connections { kept: 4, closed: 4 });
    let shut = (CLOSED, 0, 0, Some(3));
    let kept = |state, own, other| (state, own, other, None);
    let expected = [
        kept(LISTENS, 80, 0),
        kept(ESTABLISHED, 80, 4000),
        kept(ESTABLISHED, 4000, 80),
        shut,
        shut,
        kept(ESTABLISHED, 53, 53),
        shut,
        kept(ESTABLISHED, 90, 91),
        kept(8, 91, 90),
        shut,
    ];
    assert_eq!(states(path), expected);
    let has_stream = |inode: u64| path.join(format!("tcp-stream-{inode:x}.img")).exists();
    assert!([2, 3, 14, 15].into_iter().all(has_stream) && ![10, 11, 13, 16].into_iter().any(has_stream));
    assert!(is_closed_outside(path).unwrap());
    assert_eq!(rewrite_sockets(path, CLOSE).unwrap(), Connections { kept: 4, closed: 0 });
}

#[test]
fn a_connection_in_another_network_namespace_is_another_one() {
    let mut other = vec![];
    let path = Path::new("files.img");
    fields(path, &socket(2, TCP, ESTABLISHED, At::Four(1, 2), At::Four(1, 1)), |field| {
        match (field.number, field.value) {
            (4, Value::Bytes(socket)) => {
                put_message(&mut other, 4, &crate::wire::with_numbers(path, socket, &[(18, 10)]).unwrap());
            }
            _ => other.extend_from_slice(field.raw),
        }
        Ok(())
    })
    .unwrap();
    let folder = images(&[socket(1, TCP, ESTABLISHED, At::Four(1, 1), At::Four(1, 2)), other]);
    assert_eq!(rewrite_sockets(folder.path(), ALL).unwrap(), Connections { kept: 0, closed: 2 });
}

#[test]
fn images_without_connections_are_left_as_they_are() {
    let folder = images(&[socket(1, TCP, LISTENS, At::Four(0, 80), At::Four(0, 0))]);
    let before = std::fs::read(folder.path().join("files.img")).unwrap();
    assert_eq!(rewrite_sockets(folder.path(), ALL).unwrap(), Connections::default());
    assert_eq!(std::fs::read(folder.path().join("files.img")).unwrap(), before);
    std::fs::remove_file(folder.path().join("files.img")).unwrap();
    assert!(rewrite_sockets(folder.path(), ALL).is_err());
}

/// Source and target of each socket.
fn addresses(folder: &Path) -> Vec<(Vec<u64>, Vec<u64>)> {
    let path = folder.join("files.img");
    let mut reader = Reader::open(&path, &FILES).unwrap();
    let mut all = vec![];
    while let Some(entry) = reader.entry(1 << 20).unwrap() {
        let (mut source, mut target) = (vec![], vec![]);
        fields(&path, &entry, |field| {
            let (4, Value::Bytes(socket)) = (field.number, field.value) else { return Ok(()) };
            fields(&path, socket, |field| {
                match (field.number, field.value) {
                    (11, Value::Number(value)) => source.push(value),
                    (12, Value::Number(value)) => target.push(value),
                    _ => {}
                }
                Ok(())
            })
        })
        .unwrap();
        all.push((source, target));
    }
    all
}

#[test]
fn sockets_on_the_containers_own_address_are_freed_of_it() {
    use At::{Four, Mapped, Six};
    // 10.4.0.5, 127.0.0.1, 8.8.8.8 and 224.0.0.1 in network order.
    let (own, local, peer, group) = (0x0500_040a, 0x0100_007f, 0x0808_0808, 0x0100_00e0);
    let folder = images(&[
        socket(1, TCP, LISTENS, Four(own, 80), Four(0, 0)),
        socket(2, UDP, ESTABLISHED, Four(own, 53), Four(peer, 53)),
        socket(3, TCP, LISTENS, Four(local, 80), Four(0, 0)),
        socket(4, UDP, CLOSED, Four(group, 5), Four(0, 0)),
        socket(5, TCP, ESTABLISHED, Four(own, 80), Four(own, 90)),
        socket(6, TCP, ESTABLISHED, Four(own, 90), Four(own, 80)),
        socket(7, TCP, LISTENS, Mapped(own, 81), Six(0, 0)),
        socket(8, TCP, LISTENS, Six(9, 82), Six(0, 0)),
        // Its connection was reset.
        socket(9, TCP, CLOSED, Four(own, 91), Four(peer, 80)),
    ]);
    let before = addresses(folder.path());
    assert_eq!(rewrite_sockets(folder.path(), ALL).unwrap(), Connections { kept: 2, closed: 1 });
    let after = addresses(folder.path());
    let loopback = || (vec![local], vec![local]);
    let expected = [
        (vec![0], vec![0]),
        (vec![0], vec![peer]),
        before[2].clone(),
        before[3].clone(),
        loopback(),
        loopback(),
        (vec![0; 4], before[6].1.clone()),
        (vec![0; 4], before[7].1.clone()),
        (vec![0], vec![0]),
    ];
    assert_eq!(after, expected);
}
