//! Memory of another process.

use std::io::{IoSlice, IoSliceMut};

use nix::errno::Errno;
use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use nix::unistd::Pid;
use proc::{HostPid, ProcessHandle};

use crate::units;

/// Why memory could not be reached, and from which address on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RemoteError {
    pub(crate) address: u64,
    pub(crate) errno: Errno,
}

/// Another process, which is not mistaken for a later one with its pid.
#[derive(Debug)]
pub(crate) struct Remote {
    process: ProcessHandle,
}

impl Remote {
    /// Opens the process that has this pid now, of which something at this address is wanted.
    pub(crate) fn open(pid: HostPid, address: u64) -> Result<Self, RemoteError> {
        let gone = RemoteError { address, errno: Errno::ESRCH };
        let opened = ProcessHandle::open(pid);
        let process = opened.map_err(|error| match error.raw_os_error() {
            Some(number) => RemoteError { address, errno: Errno::from_raw(number) },
            None => gone,
        })?;
        Ok(Self { process })
    }

    pub(crate) fn pid(&self) -> HostPid {
        self.process.pid()
    }

    /// Reads all of the buffer from an address on.
    pub(crate) fn read(&self, address: u64, buffer: &mut [u8]) -> Result<(), RemoteError> {
        self.check(address)?;
        let length = buffer.len();
        whole(address, length, |done, remote| {
            process_vm_readv(self.raw(), &mut [IoSliceMut::new(&mut buffer[done..])], &[remote])
        })?;
        // What was read while it ended may be another's.
        self.check(address)
    }

    /// Writes all of the bytes from an address on.
    pub(crate) fn write(&self, address: u64, bytes: &[u8]) -> Result<(), RemoteError> {
        self.check(address)?;
        whole(address, bytes.len(), |done, remote| {
            process_vm_writev(self.raw(), &[IoSlice::new(&bytes[done..])], &[remote])
        })
    }

    fn raw(&self) -> Pid {
        Pid::from_raw(self.pid().raw())
    }

    fn check(&self, address: u64) -> Result<(), RemoteError> {
        if self.process.is_alive() { Ok(()) } else { Err(RemoteError { address, errno: Errno::ESRCH }) }
    }
}

fn whole(
    address: u64,
    length: usize,
    mut copy: impl FnMut(usize, RemoteIoVec) -> nix::Result<usize>,
) -> Result<(), RemoteError> {
    let mut done = 0;
    while done < length {
        let at = address + units::wide(done);
        match copy(done, RemoteIoVec { base: units::bytes(at), len: length - done }) {
            // The kernel stops short at a page that it cannot reach, and says why only when that is the first one.
            Ok(0) => return Err(RemoteError { address: at, errno: Errno::EFAULT }),
            Ok(copied) => done += copied,
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(RemoteError { address: at, errno }),
        }
    }
    Ok(())
}
