//! Settings of a child between fork and exec.

use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::fs::Mode;

/// Gives the program the usual umask, 022, whatever this process has: runtimes make mount points in
/// the container's root with the inherited umask, and another one would shut out users of the
/// container.
pub(super) fn set_umask(command: &mut Command) {
    let set = || {
        rustix::process::umask(Mode::from_raw_mode(0o022));
        Ok(())
    };
    // SAFETY: between fork and exec the closure only calls umask; it neither allocates nor takes a lock.
    unsafe { command.pre_exec(set) };
}
