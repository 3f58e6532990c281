//! Memory of another process.

use std::io::{IoSlice, IoSliceMut};

use nix::errno::Errno;
use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use nix::unistd::Pid;

use crate::units;

/// Why memory could not be reached, and from which address on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RemoteError {
    pub(crate) address: u64,
    pub(crate) errno: Errno,
}

/// Reads all of the buffer from an address on.
pub(crate) fn read(pid: i32, address: u64, buffer: &mut [u8]) -> Result<(), RemoteError> {
    let length = buffer.len();
    whole(address, length, |done, remote| {
        process_vm_readv(Pid::from_raw(pid), &mut [IoSliceMut::new(&mut buffer[done..])], &[remote])
    })
}

/// Writes all of the bytes from an address on.
pub(crate) fn write(pid: i32, address: u64, bytes: &[u8]) -> Result<(), RemoteError> {
    whole(address, bytes.len(), |done, remote| {
        process_vm_writev(Pid::from_raw(pid), &[IoSlice::new(&bytes[done..])], &[remote])
    })
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
