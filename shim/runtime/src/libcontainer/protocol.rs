//! Messages between the shim and a helper.
//!
//! Both sides are the same executable, so the protocol has no version. The request and the reply
//! each travel in a memfd. A pipe would have no end of file while the container's init, with all of
//! the helper's descriptors, waits for the start.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::path::PathBuf;

use oci_spec::runtime::{LinuxResources, Process};
use proc::HostPid;
use rustix::fs::MemfdFlags;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::Prepare;

/// Longest reply, in bytes: a pid, or a few lines of text.
const REPLY_LIMIT: u64 = 256 << 10;
/// Longest request, in bytes: a process description, from a containerd message of at most 16 MiB.
const REQUEST_LIMIT: u64 = 32 << 20;

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Request {
    /// Directory below which each container has its state directory.
    pub(super) root: PathBuf,
    pub(super) id: String,
    pub(super) systemd_cgroup: bool,
    pub(super) step: Step,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Step {
    Create(Create),
    Start,
    Exec(Box<Exec>),
    Update(Box<LinuxResources>),
    Delete,
    /// Makes the cgroup of a container during a restore, around criu.
    Join(Box<Join>),
    /// Sets up the namespaces of a container during a restore.
    SetUp {
        pid: HostPid,
        raise_loopback: bool,
    },
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Join {
    /// Pid of criu.
    pub(super) pid: HostPid,
    pub(super) resources: LinuxResources,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Create {
    pub(super) bundle: PathBuf,
    pub(super) console_socket: Option<PathBuf>,
    pub(super) no_pivot_root: bool,
    pub(super) no_new_keyring: bool,
    pub(super) prepare: Prepare,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Exec {
    pub(super) bundle: PathBuf,
    pub(super) process: Process,
    pub(super) console_socket: Option<PathBuf>,
    pub(super) prepare: Prepare,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Reply {
    /// Done. `pid` is the new process, a child of the shim, after create and exec.
    Done { pid: Option<HostPid>, warnings: Vec<String> },
    /// Failed, with nothing left.
    Failed { message: String },
    /// The helper gave up in the middle: partial results may be left.
    Panicked { message: String },
}

/// Returns a new file with `value`, or an empty one.
pub(super) fn memory_file(value: Option<&Request>) -> io::Result<File> {
    let mut file = File::from(rustix::fs::memfd_create("gpusnap-helper", MemfdFlags::CLOEXEC)?);
    if let Some(value) = value {
        file.write_all(&serde_json::to_vec(value)?)?;
    }
    Ok(file)
}

pub(super) fn read_request(file: &mut File) -> io::Result<Request> {
    read(file, REQUEST_LIMIT)
}

/// Reads the reply; `None` if the file is empty.
pub(super) fn read_reply(file: &mut File) -> io::Result<Option<Reply>> {
    if file.metadata()?.len() == 0 {
        return Ok(None);
    }
    read(file, REPLY_LIMIT).map(Some)
}

fn read<T: DeserializeOwned>(file: &mut File, limit: u64) -> io::Result<T> {
    let length = file.metadata()?.len();
    if length > limit {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("{length} bytes, where {limit} are the most")));
    }
    file.rewind()?;
    let mut bytes = Vec::new();
    file.take(length).read_to_end(&mut bytes)?;
    Ok(serde_json::from_slice(&bytes)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_arrives_as_it_was_sent() {
        let request = Request {
            root: "/run/gpusnap".into(),
            id: "one".into(),
            systemd_cgroup: true,
            step: Step::Create(Create {
                bundle: "/bundle".into(),
                console_socket: Some("/tty".into()),
                no_pivot_root: false,
                no_new_keyring: true,
                prepare: Prepare::Seccomp,
            }),
        };
        let mut file = memory_file(Some(&request)).unwrap();
        let read = read_request(&mut file).unwrap();
        assert_eq!(format!("{request:?}"), format!("{read:?}"));
    }

    #[test]
    fn an_empty_reply_is_no_reply() {
        assert_eq!(read_reply(&mut memory_file(None).unwrap()).unwrap(), None);
    }

    #[test]
    fn half_a_reply_is_an_error() {
        let mut file = memory_file(None).unwrap();
        file.write_all(br#"{"Failed":{"mess"#).unwrap();
        read_reply(&mut file).unwrap_err();
    }

    #[test]
    fn an_endless_reply_is_not_read() {
        let mut file = memory_file(None).unwrap();
        file.set_len(REPLY_LIMIT + 1).unwrap();
        file.rewind().unwrap();
        assert_eq!(read_reply(&mut file).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
