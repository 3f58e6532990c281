//! `gpusnap`: lists, verifies and removes snapshots of containers with their GPU state, and moves
//! them between nodes.
//!
//! Users read `docs/snapshots.md`. The shim runs `gpusnap pull` for missing snapshots, so that no
//! shim process has HTTP and TLS.

mod args;
mod commands;
mod error;
mod output;
mod progress;
mod units;

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::args::Arguments;

/// Longest wait for threads after a command: a thread may still write a received piece.
const LAST_WORK: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    allow_many_files();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("gpusnap: cannot begin: {error}");
            return ExitCode::from(error::FAILED);
        }
    };
    let done = runtime.block_on(commands::run(arguments));
    runtime.shutdown_timeout(LAST_WORK);
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}", error.line());
            ExitCode::from(error.code())
        }
    }
}

/// Raises the limit of open files. Shells allow 1024, for the sake of programs that use `select`.
fn allow_many_files() {
    let limit = getrlimit(Resource::Nofile);
    // On failure a transfer has fewer files, and reports when they run out.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
}
