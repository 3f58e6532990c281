//! What can go wrong, one enum per operation.

use std::io;
use std::path::PathBuf;

use nix::errno::Errno;
use proc::{ContainerPid, HostPid};
use thiserror::Error;

use crate::control::Cancelled;
use crate::remote::RemoteError;
use crate::table::TableError;

/// Why memory could not be saved. The caller drops the draft; the processes are as they were.
#[derive(Debug, Error)]
pub enum SaveError {
    /// What is asked for is not made of whole pages within the address space.
    #[error("{length} bytes at {address:#x} of process {pid} are not whole pages of its memory")]
    Range {
        /// The process, in the container.
        pid: ContainerPid,
        /// Begin of the range.
        address: u64,
        /// Its length in bytes.
        length: u64,
    },
    /// The process has ended.
    #[error("process {pid} ended while its memory was read at {address:#x}")]
    Gone {
        /// The process, as the host numbers it.
        pid: HostPid,
        /// What was to be read.
        address: u64,
    },
    /// The memory is not mapped, or not readable.
    #[error("memory of process {pid} at {address:#x} is not there any more")]
    Unmapped {
        /// The process, as the host numbers it.
        pid: HostPid,
        /// The first address that cannot be read.
        address: u64,
    },
    /// Memory of a process cannot be read for another reason.
    #[error("cannot read memory of process {pid} at {address:#x}")]
    Process {
        /// The process, as the host numbers it.
        pid: HostPid,
        /// What was to be read.
        address: u64,
        /// Why.
        source: io::Error,
    },
    /// A file with memory cannot be read.
    #[error("cannot read memory of process {pid} at {address:#x} from {path}")]
    Source {
        /// The process, as the table numbers it.
        pid: ContainerPid,
        /// The address of what was to be read.
        address: u64,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file with memory is not what it was a moment ago.
    #[error("memory of process {pid} at {address:#x} changed in {path} while it was saved")]
    Changed {
        /// The process, as the table numbers it.
        pid: ContainerPid,
        /// Where.
        address: u64,
        /// The file.
        path: PathBuf,
    },
    /// A pack cannot be created: a file of its name exists, or the folder is not there.
    #[error("cannot create {path}")]
    Create {
        /// The pack.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The disk, or what may be used of it, is full.
    #[error("no space is left for {path}")]
    Full {
        /// The pack.
        path: PathBuf,
        /// What the system says: no space, a quota or a limit on the size of files.
        source: io::Error,
    },
    /// A pack cannot be written.
    #[error("cannot write {path}")]
    Write {
        /// The pack.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The ranges do not make a table.
    #[error("the memory to save is not consistent")]
    Table(#[from] TableError),
    /// It was cancelled.
    #[error("saving memory was cancelled")]
    Cancelled,
}

impl SaveError {
    pub(crate) fn process(pid: HostPid, error: RemoteError) -> Self {
        let RemoteError { address, errno } = error;
        match errno {
            Errno::ESRCH => Self::Gone { pid, address },
            Errno::EFAULT => Self::Unmapped { pid, address },
            other => Self::Process { pid, address, source: other.into() },
        }
    }

    pub(crate) fn write(path: PathBuf, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
                Self::Full { path, source }
            }
            _ => Self::Write { path, source },
        }
    }
}

impl From<Cancelled> for SaveError {
    fn from(_: Cancelled) -> Self {
        Self::Cancelled
    }
}

/// Why a file is no pack that can be used.
#[derive(Debug, Error)]
pub enum PackError {
    /// It cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is something else, damaged, or cut off.
    #[error("{path} is no pack: {what}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
    /// It is of a later version of the format.
    #[error("{path} is a pack of version {version}, and only 1 is known")]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
}

/// Why packs are not proven good.
#[derive(Debug, Error)]
pub enum VerifyError {
    /// A chunk is not what was saved.
    #[error("chunk {chunk} of {path} is damaged")]
    Corrupt {
        /// The pack.
        path: PathBuf,
        /// Number of the chunk, from 0.
        chunk: usize,
    },
    /// A pack cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The pack.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It was cancelled.
    #[error("the check of memory was cancelled")]
    Cancelled,
}

impl From<Cancelled> for VerifyError {
    fn from(_: Cancelled) -> Self {
        Self::Cancelled
    }
}

/// Why memory could not be filled. The processes have some of their memory and must not run.
#[derive(Debug, Error)]
pub enum FillError {
    /// The packs are not those of the table.
    #[error("the table speaks of {expected} packs, and there are {found}")]
    Packs {
        /// How many it needs.
        expected: usize,
        /// How many there are.
        found: usize,
    },
    /// A pack is not the one of the table.
    #[error("{path} has {found} bytes of memory, and the table says {expected}")]
    Length {
        /// The pack.
        path: PathBuf,
        /// Bytes of data as the table has it.
        expected: u64,
        /// Bytes of data that it has.
        found: u64,
    },
    /// Nobody said which process it is here.
    #[error("there is memory of process {pid}, which was not restored")]
    Unknown {
        /// The process, as the table numbers it.
        pid: ContainerPid,
    },
    /// A chunk is not what was saved. Nothing of it was written.
    #[error("chunk {chunk} of {path}, pack {pack}, is damaged")]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// Number of the pack in the table, from 0.
        pack: usize,
        /// Number of the chunk in it, from 0.
        chunk: usize,
    },
    /// A pack cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The pack.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The process has ended.
    #[error("process {pid} ended while its memory was filled at {address:#x}")]
    Gone {
        /// The process, as the host numbers it.
        pid: HostPid,
        /// What was to be written.
        address: u64,
    },
    /// The memory is not mapped, or not writable.
    #[error("process {pid} has no memory to fill at {address:#x}")]
    Unmapped {
        /// The process, as the host numbers it.
        pid: HostPid,
        /// The first address that cannot be written.
        address: u64,
    },
    /// Memory of a process cannot be written for another reason.
    #[error("cannot fill memory of process {pid} at {address:#x}")]
    Process {
        /// The process, as the host numbers it.
        pid: HostPid,
        /// What was to be written.
        address: u64,
        /// Why.
        source: io::Error,
    },
    /// It was cancelled.
    #[error("filling memory was cancelled")]
    Cancelled,
}

impl FillError {
    pub(crate) fn process(pid: HostPid, error: RemoteError) -> Self {
        let RemoteError { address, errno } = error;
        match errno {
            Errno::ESRCH => Self::Gone { pid, address },
            Errno::EFAULT => Self::Unmapped { pid, address },
            other => Self::Process { pid, address, source: other.into() },
        }
    }
}

impl From<Cancelled> for FillError {
    fn from(_: Cancelled) -> Self {
        Self::Cancelled
    }
}
