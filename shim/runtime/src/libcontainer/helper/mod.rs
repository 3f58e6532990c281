//! The helper's side: one step of one container, in a single-threaded process for libcontainer to
//! change at will.
//!
//! Errors go into the reply. The helper's descriptors 0, 1 and 2 are not the container's: a hook's
//! standard error ends up in the log.

mod adapt;
mod cgroup;
mod create;
mod delete;
mod descriptors;
mod devices;
mod dump;
mod error;
mod exec;
mod filter;
mod fixup;
mod host_name;
mod id_maps;
mod launch;
mod lifecycle;
mod log;
mod preparation;
mod program;
pub(super) mod restore;
mod rootfs;
mod seccomp;
mod state;
mod v1_mounts;

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::ExitCode;

use ::cgroup::Cgroup;
use proc::HostPid;

use super::protocol::{self, Reply, Request, Step};
use super::sys;
use crate::{CheckpointRequest, ProcessIo, RestoreRequest};
use error::{Context, Failure, Result};
use log::Log;
use program::Stdio;
use restore::{Prepared, Streams};
use state::StateDirectory;

/// Returns whether a program, in the kernel's form, is the filter of a prepared container.
pub(super) fn is_preparation(filter: &[u8]) -> bool {
    preparation::program().iter().flat_map(|instruction| instruction.to_ne_bytes()).eq(filter.iter().copied())
}

/// Context of every step.
struct Helper {
    id: String,
    systemd_cgroup: bool,
    directory: StateDirectory,
    /// Faults that did not fail the step.
    warnings: Vec<String>,
}

impl Helper {
    fn new(root: &Path, id: &str, systemd_cgroup: bool) -> Self {
        let directory = StateDirectory::new(root, id);
        Self { id: id.to_owned(), systemd_cgroup, directory, warnings: Vec::new() }
    }
}

/// Largest file from others, in bytes: no honest config.json is larger.
const FILE_LIMIT: u64 = 32 << 20;

/// Runs the helper. Arguments: descriptors of the request and of the reply, then of the process's
/// standard input, output and error (none with a terminal, or without a process).
pub(super) fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().skip(2).collect();
    // Only the shim could be told about wrong arguments, and the shim reads only the reply.
    let Some(mut fds) = arguments.iter().map(descriptor).collect::<Option<VecDeque<OwnedFd>>>() else {
        return ExitCode::from(2);
    };
    let (Some(request), Some(reply)) = (fds.pop_front(), fds.pop_front()) else { return ExitCode::from(2) };
    let stdio = match (fds.pop_front(), fds.pop_front(), fds.pop_front()) {
        (Some(stdin), Some(stdout), Some(stderr)) => Some(Stdio { stdin, stdout, stderr }),
        _ => None,
    };
    let mut reply = File::from(reply);
    let Ok(log) = Log::start(&reply) else { return ExitCode::from(3) };
    let answer = match run(request.into(), stdio) {
        Ok((pid, warnings)) => Reply::Done { pid, warnings },
        Err(failure) => Reply::Failed { message: log.complete(failure.to_string()) },
    };
    let written = serde_json::to_vec(&answer).is_ok_and(|bytes| reply.write_all(&bytes).is_ok());
    if written { ExitCode::SUCCESS } else { ExitCode::from(4) }
}

fn descriptor(argument: &OsString) -> Option<OwnedFd> {
    sys::take(argument.to_str()?.parse().ok()?).ok()
}

fn run(mut request: File, stdio: Option<Stdio>) -> Result<(Option<HostPid>, Vec<String>)> {
    let Request { root, id, systemd_cgroup, step } =
        protocol::read_request(&mut request).context(|| "read the request")?;
    drop(request);
    validate_id(&id)?;
    // The kernel names a process after its executed file: here, a number.
    let _ = rustix::thread::set_name(c"gpusnap:helper");
    // libcontainer's directories in a container get the intended modes, whatever the shim's mask.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));

    let mut helper = Helper::new(&root, &id, systemd_cgroup);
    let pid = match step {
        Step::Create(create) => Some(create::create(&mut helper, &create, stdio)?),
        Step::Exec(exec) => Some(exec::exec(&mut helper, *exec, stdio)?),
        Step::Start => lifecycle::start(&mut helper).map(|()| None)?,
        Step::Update(resources) => lifecycle::update(&helper, &resources).map(|()| None)?,
        Step::Delete => delete::delete(&mut helper).map(|()| None)?,
        Step::Join(join) => restore::join(&helper, &join).map(|()| None)?,
        Step::SetUp { pid, raise_loopback } => restore::set_up(&helper, pid, raise_loopback).map(|()| None)?,
    };
    Ok((pid, helper.warnings))
}

/// Runs a step in the calling process, if possible: without hooks, starting and removing a
/// container only reads and writes a few files, in a fraction of a helper's time. `None` if a
/// helper is needed.
pub(super) fn without_helper(request: &Request) -> Option<Reply> {
    let Request { root, id, systemd_cgroup, step } = request;
    let mut helper = Helper::new(root, id, *systemd_cgroup);
    let is_possible = validate_id(id).is_ok()
        && match step {
            Step::Start => lifecycle::needs_no_helper(&helper),
            Step::Delete => delete::needs_no_helper(&helper),
            // systemd must not keep the shim waiting.
            Step::Join(_) => !*systemd_cgroup,
            _ => false,
        };
    let done = is_possible.then(|| match step {
        Step::Start => lifecycle::start(&mut helper),
        Step::Join(join) => restore::join(&helper, join),
        _ => delete::delete(&mut helper),
    })?;
    Some(match done {
        Ok(()) => Reply::Done { pid: None, warnings: helper.warnings },
        Err(failure) => Reply::Failed { message: failure.to_string() },
    })
}

/// Returns CRIU's request for a dump of a container; puts a record of the streams among the images.
pub(super) fn dump_request(
    root: &Path,
    systemd_cgroup: bool,
    request: &CheckpointRequest,
) -> std::result::Result<criu::DumpRequest, String> {
    dump::request(&Helper::new(root, &request.id, systemd_cgroup), request).map_err(|failure| failure.to_string())
}

/// Makes everything of a container except cgroup and processes.
pub(super) fn prepare_restore(
    root: &Path,
    systemd_cgroup: bool,
    request: &RestoreRequest,
) -> std::result::Result<Prepared, String> {
    let mut helper = Helper::new(root, &request.id, systemd_cgroup);
    let terminal = matches!(request.io, ProcessIo::Terminal { .. });
    validate_id(&request.id)
        .and_then(|()| restore::prepare(&mut helper, &request.bundle, &request.images, terminal))
        .map_err(|failure| failure.to_string())
}

/// Records the existence of a container's processes.
pub(super) fn finish_restore(
    root: &Path,
    id: &str,
    pid: HostPid,
    streams: &Streams,
) -> std::result::Result<(), String> {
    restore::finish(&Helper::new(root, id, false), pid, streams).map_err(|failure| failure.to_string())
}

/// Freezes a container.
pub(super) fn pause(root: &Path, id: &str, systemd_cgroup: bool) -> std::result::Result<(), String> {
    lifecycle::pause(&Helper::new(root, id, systemd_cgroup)).map_err(|failure| failure.to_string())
}

/// Thaws a container.
pub(super) fn resume(root: &Path, id: &str, systemd_cgroup: bool) -> std::result::Result<(), String> {
    lifecycle::resume(&Helper::new(root, id, systemd_cgroup)).map_err(|failure| failure.to_string())
}

/// Returns a container's cgroup: the cgroup of its creation, wherever the processes have moved.
pub(super) fn cgroup(root: &Path, id: &str, systemd_cgroup: bool) -> std::result::Result<Cgroup, String> {
    let place = Helper::new(root, id, systemd_cgroup).place();
    place.and_then(|place| Ok(place.cgroup()?)).map_err(|failure| failure.to_string())
}

/// Sets the host name of the joined namespace again.
pub(super) fn put_back(host_name: &HostName) -> std::result::Result<(), String> {
    host_name.put_back().map_err(|failure| failure.to_string())
}

/// Removes everything needed only by CRIU.
pub(super) fn clean_restore(root: &Path, id: &str) -> std::result::Result<(), String> {
    StateDirectory::new(root, id).unmount_root().map_err(|failure| failure.to_string())
}

pub(super) use descriptors::is_pipe;
pub(super) use dump::criu_options;
pub(super) use host_name::HostName;
pub use id_maps::{is_mapper, mapper_main};
pub(super) use launch::give_to;

/// Checks an id, which becomes a file name below the root.
fn validate_id(id: &str) -> Result<()> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "_+-.".contains(c);
    if id.is_empty() || id == "." || id == ".." || !id.chars().all(allowed) {
        return Err(Failure::new(format!("{id:?} cannot be the id of a container")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_cannot_lead_out_of_the_root() {
        for id in ["", ".", "..", "../x", "a/b", "/", "a\0b", "ä"] {
            validate_id(id).unwrap_err();
        }
        for id in ["a", "...", "k8s.io_x+y-1"] {
            validate_id(id).unwrap();
        }
    }
}
