//! TCP connections of a container that is being saved.
//!
//! CRIU puts connections into repair mode, and back if the container goes on. A container that ends leaves
//! them in that mode: closed so, they tell the other ends nothing, and a client would wait for ever. A criu
//! that dies leaves them so in a container that goes on. So the session has hold of them meanwhile.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;

use cgroup::Cgroup;
use nix::sys::socket::{getsockopt, setsockopt, sockopt};
use proc::HostPid;
use rustix::net::sockopt::{set_socket_reuseaddr, socket_protocol, socket_reuseaddr};
use rustix::net::{getpeername, getsockname, ipproto};
use rustix::process::{PidfdFlags, PidfdGetfdFlags};

/// TCP sockets of a container, held until dropped.
pub(crate) struct Connections(Vec<Connection>);

struct Connection {
    socket: OwnedFd,
    /// The socket allows others at its address. CRIU changes that.
    shares_address: bool,
}

impl Connections {
    /// Takes hold of the TCP sockets of all processes. A process that cannot be looked at is passed over.
    pub(crate) fn of(cgroup: &Cgroup) -> Self {
        let mut connections = Vec::new();
        let mut known = BTreeSet::new();
        for pid in cgroup.pids().unwrap_or_default() {
            if let Err(error) = take_all(pid, &mut known, &mut connections) {
                tracing::debug!(pid = pid.raw(), "some of its connections are not held: {error}");
            }
        }
        Self(connections)
    }

    /// Lets go of connections that go on with the container. Those in repair mode are put back first.
    pub(crate) fn go_on(self) {
        for Connection { socket, shares_address } in self.0 {
            if is_in_repair(&socket) {
                end_repair(&socket, shares_address);
            }
        }
    }

    /// Closes the connections of a container that has ended, so that other ends outside are told.
    /// Connections of the container with itself end without a trace: they are made again at their addresses.
    pub(crate) fn close(self) {
        let inner: BTreeSet<_> = self.0.iter().filter_map(|of| ends(&of.socket)).collect();
        for Connection { socket, .. } in self.0 {
            let is_inner = ends(&socket).is_some_and(|(here, there)| inner.contains(&(there, here)));
            if !is_inner && is_in_repair(&socket) {
                // The last packets of a connection must not keep its address from a restored listener.
                end_repair(&socket, true);
            }
        }
    }
}

/// Takes hold of the TCP sockets of a process. `known` has the inodes of sockets seen before.
fn take_all(pid: HostPid, known: &mut BTreeSet<u64>, connections: &mut Vec<Connection>) -> io::Result<()> {
    let process = rustix::process::pidfd_open(pid.as_pid(), PidfdFlags::empty())?;
    for entry in fs::read_dir(pid.path("fd"))? {
        let entry = entry?;
        let Ok(link) = fs::read_link(entry.path()) else { continue };
        let link = link.to_string_lossy();
        let inode = link.strip_prefix("socket:[").and_then(|rest| rest.strip_suffix(']')?.parse().ok());
        let number = entry.file_name().to_string_lossy().parse().ok();
        let (Some(inode), Some(number)) = (inode, number) else { continue };
        if !known.insert(inode) {
            continue;
        }
        let socket = rustix::process::pidfd_getfd(&process, number, PidfdGetfdFlags::empty())?;
        if socket_protocol(&socket).is_ok_and(|protocol| protocol == Some(ipproto::TCP)) {
            connections.push(Connection { shares_address: socket_reuseaddr(&socket)?, socket });
        }
    }
    Ok(())
}

/// Returns the address of a connection here, and the address there.
fn ends(socket: &OwnedFd) -> Option<(SocketAddr, SocketAddr)> {
    let plain = |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
    let here = getsockname(socket).ok()?.try_into().ok()?;
    let there = getpeername(socket).ok()??.try_into().ok()?;
    Some((plain(here), plain(there)))
}

fn is_in_repair(socket: &OwnedFd) -> bool {
    getsockopt(socket, sockopt::TcpRepair).is_ok_and(|repair| repair != 0)
}

fn end_repair(socket: &OwnedFd, shares_address: bool) {
    let ended = setsockopt(socket, sockopt::TcpRepair, &0).map_err(io::Error::from);
    if let Err(error) = ended.and_then(|()| Ok(set_socket_reuseaddr(socket, shares_address)?)) {
        tracing::warn!("a TCP connection is not as it was before the checkpoint: {error}");
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    use super::*;

    /// Returns both ends of a connection.
    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (client, listener.accept().unwrap().0)
    }

    fn held(socket: &TcpStream) -> Connection {
        let socket = OwnedFd::from(socket.try_clone().unwrap());
        Connection { shares_address: socket_reuseaddr(&socket).unwrap(), socket }
    }

    /// Does to a socket what CRIU does for a dump. Returns whether this process may.
    fn repair(socket: &TcpStream) -> bool {
        let is_set = setsockopt(socket, sockopt::TcpRepair, &1).is_ok();
        if !is_set {
            eprintln!("skipped: repair mode needs CAP_NET_ADMIN");
        }
        is_set
    }

    #[test]
    fn a_connection_that_criu_left_in_repair_mode_goes_on_as_it_was() {
        let (mut client, mut server) = pair();
        let shares = socket_reuseaddr(&server).unwrap();
        let connections = Connections(vec![held(&server)]);
        if !repair(&server) {
            return;
        }
        connections.go_on();
        server.write_all(b"hello").unwrap();
        let mut read = [0; 5];
        client.read_exact(&mut read).unwrap();
        assert_eq!(&read, b"hello");
        assert_eq!(socket_reuseaddr(&server).unwrap(), shares);
    }

    #[test]
    fn the_other_end_outside_is_told_of_a_containers_end() {
        let (mut client, server) = pair();
        let connections = Connections(vec![held(&server)]);
        if !repair(&server) {
            return;
        }
        drop(server);
        connections.close();
        assert_eq!(client.read(&mut [0; 5]).unwrap(), 0);
    }

    #[test]
    fn a_connection_of_the_container_with_itself_leaves_nothing_at_its_addresses() {
        let (client, server) = pair();
        let connections = Connections(vec![held(&server), held(&client)]);
        if !repair(&server) || !repair(&client) {
            return;
        }
        let ports = [&client, &server].map(|end| end.local_addr().unwrap().port());
        drop((client, server));
        connections.close();
        let left = fs::read_to_string("/proc/net/tcp").unwrap();
        let of_both = |line: &&str| ports.iter().all(|port| line.contains(&format!(":{port:04X} ")));
        assert_eq!(left.lines().find(of_both), None);
    }
}
