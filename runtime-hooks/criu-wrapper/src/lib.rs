//! The process between a runtime and criu: a tree that the runtime restores is frozen before any of it runs.
//!
//! A program that polls memory of the GPU driver dies when it runs before that memory is back, be it for a moment.
//! The command lines of runtimes have no option to restore a tree frozen. But they look for criu in `PATH`:
//!
//! ```text
//!  runc restore ──► criu (this binary, first in PATH) ──► criu
//!        socket ◄──────── every message, both ways ────────► socket
//!                         held back until the tree is frozen: pre-resume
//! ```
//!
//! [`insert`] puts the wrapper before criu for one run of the runtime. `main` asks [`is_wrapper`] and runs
//! [`wrapper_main`]. The folders in a request become descriptors of the wrapper; every other byte is passed on as it
//! came. When the wrapper fails or is killed, criu finds its socket closed and undoes its work.

#![deny(unsafe_code)]

mod relay;
#[allow(unsafe_code)]
mod sys;

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus};

use command_fds::{CommandFdExt, FdMapping};
use proc::HostPid;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use crate::relay::Relay;

/// Name of the program that runtimes look for, and of the link to this binary.
const CRIU: &str = "criu";

/// Environment variable with the PATH in which the real criu is found.
const PATH: &str = "GPUSNAP_CRIU_PATH";
/// Environment variable with the folder in which criu works.
const WORK: &str = "GPUSNAP_CRIU_WORK";

/// Puts the wrapper before criu in the `PATH` of a runtime's command. The link to this binary is made in `folder`, which
/// has to outlive the command; criu will work in `work`.
///
/// # Errors
/// The link cannot be made, or the path of `folder` has a colon.
pub fn insert(command: &mut Command, folder: &Path, work: &Path) -> io::Result<()> {
    // The file of the running binary, also after another has taken its name.
    std::os::unix::fs::symlink(format!("/proc/{}/exe", std::process::id()), folder.join(CRIU))?;
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders = vec![folder.to_owned()];
    folders.extend(std::env::split_paths(&path));
    command.env("PATH", std::env::join_paths(folders).map_err(io::Error::other)?);
    command.env(PATH, path).env(WORK, work);
    Ok(())
}

/// Returns whether a process that was started under this name is the wrapper.
#[must_use]
pub fn is_wrapper(name: &OsStr) -> bool {
    Path::new(name).file_name() == Some(OsStr::new(CRIU)) && std::env::var_os(PATH).is_some()
}

/// Runs the wrapper to its end. `arguments` are those that the runtime gave to criu.
#[must_use]
pub fn wrapper_main(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    match run(&arguments.collect::<Vec<_>>()) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("criu: gpusnap cannot wrap criu: {error}");
            ExitCode::FAILURE
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "there is no reaper in this process, whose only child criu is")]
fn run(arguments: &[OsString]) -> io::Result<u8> {
    let path = std::env::var_os(PATH).unwrap_or_default();
    let mut command = Command::new(real_criu(&path)?);
    command.args(arguments).env("PATH", path).env_remove(PATH).env_remove(WORK);
    let Some(number) = socket_number(arguments) else { return Err(command.exec()) };
    if let Some(work) = std::env::var_os(WORK) {
        // A criu that is left behind is found by its working directory, and so is its wrapper.
        rustix::process::chdir(&work)?;
    }
    let runtime = sys::inherited(number)?;
    let (criu, theirs) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    command.fd_mappings(vec![FdMapping { parent_fd: theirs, child_fd: number }]).map_err(io::Error::other)?;
    // The runtime moves this process to the container's cgroup before it sends a request. criu has to be there too.
    let Some(request) = relay::receive(&runtime)? else { return Ok(1) };
    let mut child = command.spawn()?;
    drop(command);
    let pid = HostPid::try_from(i32::try_from(child.id()).unwrap_or_default())?;
    let relayed = Relay::new(runtime, criu, pid).run(request);
    let status = child.wait()?;
    relayed?;
    Ok(exit_code(status))
}

/// Returns the number of the socket in criu's arguments. None for a command other than `swrk`.
fn socket_number(arguments: &[OsString]) -> Option<i32> {
    match arguments {
        [.., swrk, number] if swrk == "swrk" => number.to_str()?.parse().ok(),
        _ => None,
    }
}

/// Returns the criu that the runtime would have found.
fn real_criu(path: &OsStr) -> io::Result<PathBuf> {
    let mut found = std::env::split_paths(path).map(|folder| folder.join(CRIU)).filter(|file| file.is_file());
    found.next().ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "there is no criu in the PATH"))
}

/// Returns the exit code by which a shell would tell of this end.
fn exit_code(status: ExitStatus) -> u8 {
    let code = status.code().or(status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
}

#[cfg(test)]
mod tests;
