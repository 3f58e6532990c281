//! `containerd-shim-gpusnap-v2`: a containerd runtime shim with GPU memory snapshots.
//!
//! containerd runs this binary by name: with `start` to get a shim for a container, with `delete`
//! to clean up after a dead one, with `-info` to learn the runtime's features. The shim itself is
//! the same binary without an action, and also answers as `containerd-shim-runc-v2`, for clients
//! limited to that name.

#![deny(unsafe_code)]

mod bootstrap;
mod bundle;
mod container;
mod error;
mod events;
mod options;
mod pod;
mod rootfs;
mod stdio;
#[allow(unsafe_code)]
mod sys;
mod table;
mod task;

use std::ffi::OsStr;
use std::path::Path;
use std::process::ExitCode;

use containerd_shim::Config;

use crate::bootstrap::GpusnapShim;

/// Runtime name of this shim in containerd.
const RUNTIME: &str = "io.containerd.gpusnap.v2";
/// Runtime name of the shim replaced under the name [`RUNC_BINARY`].
const RUNC_RUNTIME: &str = "io.containerd.runc.v2";
/// Binary name for [`RUNC_RUNTIME`].
const RUNC_BINARY: &str = "containerd-shim-runc-v2";

/// Threads for the shim's blocking work: file logs, mounts. Each costs stack pages for life.
const BLOCKING_THREADS: usize = 4;

const HELP: &str = "\
containerd-shim-gpusnap-v2: containerd runtime shim with GPU memory snapshots

containerd runs it; there is nothing to run by hand. Install it in containerd's PATH and use it as runtime
io.containerd.gpusnap.v2, or under the name containerd-shim-runc-v2 in place of runc's shim.

usage: containerd-shim-gpusnap-v2 [flags] [start | delete]

  -namespace NAME       containerd namespace of the container
  -id ID                container id
  -address PATH         containerd's gRPC socket
  -publish-binary PATH  containerd's binary
  -socket ADDRESS       socket to serve the Task service on
  -bundle PATH          bundle of the container, with delete
  -debug                debug messages in containerd's log
  -info                 describe the runtime: a RuntimeInfo message on standard output
  -v, -version          print the version
";

fn main() -> ExitCode {
    let mut arguments = std::env::args_os();
    let name = arguments.next().unwrap_or_default();
    if criu_wrapper::is_wrapper(&name) {
        return criu_wrapper::wrapper_main(arguments);
    }
    if runtime::libcontainer::is_mapper(&name) {
        return runtime::libcontainer::mapper_main(&name, arguments);
    }
    match arguments.next() {
        // The helper must come before any thread: container processes are cloned from it without
        // exec.
        Some(first) if first == runtime::libcontainer::HELPER => return runtime::libcontainer::helper_main(),
        Some(first) if first == session::SESSION.name => return session::session_main(),
        Some(first) if first == cuda::CALLER => return cuda::caller_main(),
        Some(first) if is_flag(&first, &["h", "help"]) => {
            print!("{HELP}");
            return ExitCode::SUCCESS;
        }
        Some(first) if is_flag(&first, &["v", "version"]) => {
            print_version(&name);
            return ExitCode::SUCCESS;
        }
        _ => {}
    }
    sys::keep_one_malloc_arena();

    let tokio = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_keep_alive(std::time::Duration::from_secs(1))
        .build();
    match tokio {
        Ok(tokio) => {
            // Only the reaper waits for children.
            let config = Config { no_reaper: true, ..Config::default() };
            tokio.block_on(containerd_shim::run::<GpusnapShim>(runtime_name(&name), Some(config)));
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{}: cannot start the async runtime: {error}", runtime_name(&name));
            ExitCode::FAILURE
        }
    }
}

fn is_flag(argument: &OsStr, names: &[&str]) -> bool {
    let Some(argument) = argument.to_str() else { return false };
    let name = argument.strip_prefix("--").or_else(|| argument.strip_prefix('-'));
    name.is_some_and(|name| names.contains(&name))
}

/// Returns the runtime under whose name this binary was called.
fn runtime_name(argument: &OsStr) -> &'static str {
    match Path::new(argument).file_name() {
        Some(name) if name == RUNC_BINARY => RUNC_RUNTIME,
        _ => RUNTIME,
    }
}

fn print_version(argument: &OsStr) {
    println!("{}:", argument.display());
    println!("  Runtime:  {}", runtime_name(argument));
    println!("  Version:  {}", env!("CARGO_PKG_VERSION"));
    println!("  Task API: v{}", containerd_shim_protos::TASK_API_VERSION);
}
