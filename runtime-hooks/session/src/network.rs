//! Networks of containers: their addresses, and sockets that move from one to the other.

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::path::Path;

use checkpoint::{Address, Network};
use images::{Moves, OpenFiles};
use nix::ifaddrs::getifaddrs;
use proc::HostPid;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::error::SessionError;

/// Returns the addresses in the network of a process, but for those of the loopback; none in this process's network.
pub(crate) fn addresses(pid: HostPid) -> io::Result<Vec<Address>> {
    let path = pid.path("ns/net");
    if std::fs::read_link(&path)? == std::fs::read_link("/proc/self/ns/net")? {
        return Ok(Vec::new());
    }
    within(&path, own_addresses)?
}

/// Moves the sockets in images from a network with these addresses to a container's new network.
pub(crate) fn move_sockets(files: &mut OpenFiles, old: &[Address], network: &Network) -> Result<(), SessionError> {
    match network {
        // A program that listens on one address must not listen on all of the host's.
        Network::Hosts => Ok(()),
        Network::New { has_hooks } => {
            // CRIU reads the images before hooks are run: the addresses are not known yet.
            let is_reachable = |target: SocketAddr| *has_hooks || target.ip().is_loopback();
            Ok(files.move_sockets(&moves(old, &[]), &is_reachable)?)
        }
        Network::Joined(path) => {
            let failed = |source| SessionError::File { action: "look into the network", path: path.clone(), source };
            let moved = within(path, || {
                let new = own_addresses().map_err(failed)?;
                Ok(files.move_sockets(&moves(old, &new), &is_reachable)?)
            });
            moved.map_err(failed)?
        }
    }
}

/// Runs `work` on a thread in the network at `path`.
fn within<T: Send>(path: &Path, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    let namespace = File::open(path)?;
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
            Ok(work())
        });
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread in another network panicked")))
    })
}

fn own_addresses() -> io::Result<Vec<Address>> {
    let address = |entry: nix::ifaddrs::InterfaceAddress| {
        let of = entry.address?;
        let v4 = of.as_sockaddr_in().map(|of| IpAddr::from(of.ip()));
        let address = v4.or_else(|| of.as_sockaddr_in6().map(|of| of.ip().into()))?;
        Some(Address { interface: entry.interface_name, address })
    };
    let all = getifaddrs()?.filter_map(address);
    Ok(all.filter(|of| !of.address.is_loopback()).collect())
}

/// Returns the fates of old addresses: each goes to the one with the same rank, of the same kind, at the interface of the
/// same name. What the new network has as well stays.
fn moves(old: &[Address], new: &[Address]) -> Moves {
    let is_kept = |of: &&Address| new.iter().any(|new| new.address == of.address);
    let mut moves = Moves::new();
    for address in old.iter().filter(|of| !is_kept(of)) {
        let is_like = |other: &&Address| other.interface == address.interface && kind(other) == kind(address);
        let rank = old.iter().filter(is_like).take_while(|other| *other != address).count();
        moves.insert(address.address, new.iter().filter(is_like).nth(rank).map(|new| new.address));
    }
    moves
}

/// Returns whether an address is of IPv6, and whether it is valid on its link only.
fn kind(of: &Address) -> (bool, bool) {
    let is_of_link = match of.address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    };
    (of.address.is_ipv6(), is_of_link)
}

/// Returns whether the network of this thread has a route to an address.
fn is_reachable(target: SocketAddr) -> bool {
    let any: IpAddr = if target.is_ipv6() { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
    UdpSocket::bind((any, 0)).and_then(|socket| socket.connect(target)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(all: &[(&str, &str)]) -> Vec<Address> {
        let address = |(interface, address): &(&str, &str)| Address {
            interface: (*interface).to_owned(),
            address: address.parse().unwrap(),
        };
        all.iter().map(address).collect()
    }

    #[test]
    fn an_address_goes_to_its_like_at_the_same_interface_or_to_none() {
        let old = addresses(&[
            ("eth0", "10.4.0.2"),
            ("eth0", "10.4.0.3"),
            ("eth0", "fd00::2"),
            ("eth0", "fe80::2"),
            ("eth1", "10.5.0.2"),
            ("eth2", "10.6.0.2"),
        ]);
        let new = addresses(&[
            ("eth0", "10.9.0.7"),
            ("eth0", "fe80::7"),
            ("eth0", "fd00::7"),
            ("eth1", "fd01::7"),
            ("eth3", "10.6.0.2"),
        ]);
        let expected = [
            ("10.4.0.2", Some("10.9.0.7")),
            ("10.4.0.3", None),
            ("10.5.0.2", None),
            ("fd00::2", Some("fd00::7")),
            ("fe80::2", Some("fe80::7")),
        ];
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        let expected = expected.map(|(old, new)| (address(old), new.map(address)));
        assert_eq!(moves(&old, &new), Moves::from(expected));
        assert_eq!(moves(&old, &old), Moves::new());
    }

    #[test]
    fn this_process_is_in_the_hosts_network() {
        assert_eq!(super::addresses(HostPid::own()).unwrap(), []);
        assert!(is_reachable(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 9)));
    }
}
