//! `gpusnap`: snapshots of containers with their GPU state, looked at, checked, removed, and moved between nodes.
//!
//! `docs/snapshots.md` is for its users. The shim runs `gpusnap pull` for a snapshot that the node lacks, so that HTTP and TLS
//! are in no shim process.

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

/// What still runs when a command is over is waited for so long: writing out a piece that had been received.
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

/// Shells allow 1024 open files for programs that wait for them in an old way, which this one does not.
fn allow_many_files() {
    let limit = getrlimit(Resource::Nofile);
    // Refused: then a transfer has fewer, and says so when they do not suffice.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
}
