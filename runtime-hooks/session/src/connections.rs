//! TCP connections of a dumped container.
//!
//! CRIU leaves the sockets of a dump in repair mode when it kills their processes, so that the other
//! ends of connections hear nothing of the end and wait. Out of repair mode the kernel tells them.

use std::os::fd::AsFd;

use cgroup::Cgroup;
use nix::sys::socket::{getsockopt, setsockopt, sockopt};
use proc::HostPid;
use rustix::process::{PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

/// Takes all TCP sockets of a container out of repair mode. CRIU does the same after a failure, and does
/// not mind to find it done. What cannot be reached is left: the other end then waits for its own limit.
pub(crate) fn end_repair(cgroup: &Cgroup) {
    for pid in cgroup.pids().unwrap_or_default() {
        if let Err(error) = end_repair_of(pid) {
            tracing::debug!("connections of process {pid} end without a word: {error}");
        }
    }
}

fn end_repair_of(pid: HostPid) -> std::io::Result<()> {
    let process = pidfd_open(pid.as_pid(), PidfdFlags::empty())?;
    for entry in std::fs::read_dir(pid.path("fd"))? {
        let entry = entry?;
        let is_socket = std::fs::read_link(entry.path())
            .is_ok_and(|link| link.as_os_str().as_encoded_bytes().starts_with(b"socket:"));
        let Some(fd) = entry.file_name().to_str().filter(|_| is_socket).and_then(|name| name.parse().ok()) else {
            continue;
        };
        let socket = pidfd_getfd(process.as_fd(), fd, PidfdGetfdFlags::empty())?;
        // Not a TCP socket, or not in repair mode.
        if getsockopt(&socket, sockopt::TcpRepair).is_ok_and(|repair| repair != 0) {
            setsockopt(&socket, sockopt::TcpRepair, &0)?;
        }
    }
    Ok(())
}
