//! The guardian: the process that has hold of a container's CUDA processes during a checkpoint or a restore.
//!
//! It takes orders from the shim. When the shim hangs up without having ordered the container back (it is dead), the
//! guardian puts it back on its own account.

use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use cgroup::Cgroup;
use phase::Phase;

use crate::host::{Machine, chain};
use crate::protocol::{Order, Report};
use crate::session::Session;

/// First argument by which this binary knows that it is to be a guardian.
pub const GUARDIAN: &str = "cuda-guardian";

/// How long the driver may take to put everything back for a shim that is dead: 80 GB at 4 GB/s (cuda.md), and more.
const LAST_RESUME: Duration = Duration::from_secs(300);

/// Serves one container. To be run by `main` when the first argument is [`GUARDIAN`]; the next is the pid of a process
/// of the container, and standard input is the socket to the shim.
#[must_use]
pub fn guardian_main(mut arguments: impl Iterator<Item = std::ffi::OsString>) -> ExitCode {
    let pid = arguments.next().and_then(|pid| pid.to_str()?.parse().ok());
    let served = match pid {
        Some(pid) => serve(pid),
        None => Err(io::Error::new(io::ErrorKind::InvalidInput, "the pid of a process is missing")),
    };
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{GUARDIAN}: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn serve(pid: i32) -> io::Result<()> {
    let socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let cgroup = Cgroup::of_process(pid).map_err(io::Error::other)?;
    let mut machine = Machine::new(cgroup.clone(), PathBuf::from("/proc/self/exe"));
    let mut orders = BufReader::new(socket.try_clone()?);
    let mut reports = socket;
    let was_frozen = cgroup.is_frozen().map_err(io::Error::other)?;
    // A guardian that takes another's place does not know what that one did.
    let mut is_owed = true;
    let mut line = String::new();
    loop {
        line.clear();
        // A shim that was killed hangs up, with or without an error.
        if matches!(orders.read_line(&mut line), Ok(0) | Err(_)) {
            break;
        }
        // Whoever does not listen any more has hung up: the next read says so.
        let mut progress = |phase: Phase| drop(write(&mut reports, &Report::Began(phase)));
        let session = Session::new(&mut machine, &mut progress);
        let report = match serde_json::from_str(&line)? {
            Order::Suspend { patience, limit } => {
                let suspended = session.suspend(patience, limit);
                is_owed = suspended.is_ok();
                Report::Suspended(suspended)
            }
            Order::Resume { frozen, pairs, limit } => {
                let resumed = session.resume(frozen, &pairs, limit);
                is_owed = resumed.is_err();
                Report::Resumed(resumed)
            }
        };
        drop(write(&mut reports, &report));
    }
    if is_owed {
        // Whoever froze the container before is not there to thaw it if that was the shim.
        let resumed = Session::new(&mut machine, &mut |_| {}).resume(was_frozen, &[], LAST_RESUME);
        resumed.map_err(io::Error::other)?;
    }
    Ok(())
}

fn write(reports: &mut UnixStream, report: &Report) -> io::Result<()> {
    let mut line = serde_json::to_vec(report)?;
    line.push(b'\n');
    reports.write_all(&line)
}
