//! Drives a real containerd with the users' command-line clients (`ctr`, `nerdctl`, `crictl`), and
//! gives the tests in `suite/` a vocabulary.

#[macro_use]
mod check;
pub mod bed;
pub mod case;
pub mod cgroup;
pub mod cmd;
pub mod cri;
pub mod ctr;
pub mod events;
pub mod gpu;
pub mod nerdctl;
pub mod proc;
pub mod pty;
pub mod target;
pub mod test;

pub use case::{Case, Skip};
pub use check::{eventually, lines, sha256};
pub use cmd::{Cmd, Output, Running};
pub use test::Test;

/// The test bed's image: busybox with all applets, and `/bin/sh` as the command.
pub const IMAGE: &str = "docker.io/test/bb:1";

/// The same image with Debian's Python on top.
pub const PYTHON: &str = "docker.io/test/python:1";

/// Returns the checkout that these tests belong to: that of this run, which may be another one than they were built in.
#[must_use]
pub fn checkout() -> std::path::PathBuf {
    let package = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    std::path::Path::new(&package).join("../..")
}
