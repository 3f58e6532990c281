//! Descriptors that a session is started with, and calls about networks that rustix lacks.

use std::ffi::CStr;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// First descriptor after the standard streams.
pub(crate) const FIRST: i32 = 3;

/// Takes the three descriptors from [`FIRST`] on. To be called once, first thing in a process that was started with them.
pub(crate) fn take_streams() -> [OwnedFd; 3] {
    [FIRST, FIRST + 1, FIRST + 2].map(|fd| {
        // SAFETY: the starter of the session has put these descriptors in place. Nothing in this process knows their
        // numbers yet, and this function is called once.
        unsafe { OwnedFd::from_raw_fd(fd) }
    })
}

/// Returns whether a TCP socket is in repair mode, as CRIU leaves it: closed then, it tells the other end nothing.
pub(crate) fn is_in_repair(socket: BorrowedFd<'_>) -> io::Result<bool> {
    let (mut value, mut size): (libc::c_int, _) = (0, INT);
    let option = (&raw mut value).cast();
    // SAFETY: both pointers are to locals that live during the call, and `size` is the size of `value`.
    let got = unsafe { libc::getsockopt(socket.as_raw_fd(), libc::SOL_TCP, libc::TCP_REPAIR, option, &raw mut size) };
    if got == 0 { Ok(value != 0) } else { Err(io::Error::last_os_error()) }
}

/// Takes a TCP socket out of repair mode.
pub(crate) fn end_repair(socket: BorrowedFd<'_>) -> io::Result<()> {
    let value: libc::c_int = 0;
    let option = (&raw const value).cast();
    // SAFETY: the pointer is to a local that lives during the call, and `INT` is its size.
    let set = unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_TCP, libc::TCP_REPAIR, option, INT) };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

const INT: libc::socklen_t = size_of::<libc::c_int>() as libc::socklen_t;

/// Returns the addresses in the network of this thread, with the names of their interfaces.
pub(crate) fn addresses() -> io::Result<Vec<(String, IpAddr)>> {
    let mut first = std::ptr::null_mut();
    // SAFETY: the pointer is to a local that lives during the call.
    if unsafe { libc::getifaddrs(&raw mut first) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let mut found = Vec::new();
    let mut next = first;
    // SAFETY: libc has made the list, each element of which is null or points to the next one. Nobody changes it up to
    // the call that frees it.
    while let Some(entry) = unsafe { next.as_ref() } {
        next = entry.ifa_next;
        // SAFETY: an element's address is null, or valid as a `sockaddr`.
        let Some(family) = (unsafe { entry.ifa_addr.as_ref() }).map(|address| i32::from(address.sa_family)) else {
            continue;
        };
        let address = match family {
            // SAFETY: an address of this family is as long as its own type, and libc has aligned it.
            libc::AF_INET => unsafe { &*entry.ifa_addr.cast::<libc::sockaddr_in>() }.sin_addr.s_addr.to_ne_bytes().into(),
            // SAFETY: as above.
            libc::AF_INET6 => unsafe { &*entry.ifa_addr.cast::<libc::sockaddr_in6>() }.sin6_addr.s6_addr.into(),
            _ => continue,
        };
        // SAFETY: each element has a name that ends with a zero.
        let name = unsafe { CStr::from_ptr(entry.ifa_name) }.to_string_lossy().into_owned();
        found.push((name, address));
    }
    // SAFETY: the list is libc's, and nothing of it is used any more.
    unsafe { libc::freeifaddrs(first) };
    Ok(found)
}
