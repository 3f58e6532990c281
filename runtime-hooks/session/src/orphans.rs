//! Sessions of a dead shim.
//!
//! A session that takes a checkpoint puts the container back by itself, and finds its processes gone. A session that
//! restores would go on to make what the clean-up after the shim removes at the same time.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, Instant};

use proc::{HostPid, ProcessHandle};
use rustix::process::Signal;

use crate::process::SESSION;

/// Argument of a session that restores.
pub(crate) const RESTORES: &str = "restore";

/// Time for a killed process to end. One that waits for a disk takes as long as the disk.
const END: Duration = Duration::from_secs(2);
const BETWEEN_LOOKS: Duration = Duration::from_millis(5);

/// Kills the sessions that restore the container in `bundle`, and waits for their end. To be called when the shim is
/// dead, before the container is removed.
///
/// # Errors
/// A session that cannot be killed, or does not end.
pub fn end_restores(bundle: &Path) -> io::Result<()> {
    for pid in processes()? {
        if !restores(pid, bundle) {
            continue;
        }
        let Ok(session) = ProcessHandle::open(pid) else { continue };
        // Another process may have had the pid a moment ago.
        if !session.with_pid(|pid| Ok(restores(pid, bundle))).unwrap_or(false) {
            continue;
        }
        tracing::warn!(%pid, bundle = %bundle.display(), "a session of a dead shim restores, and is killed");
        match session.signal(Signal::KILL) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let deadline = Instant::now() + END;
        while session.is_alive() {
            if Instant::now() >= deadline {
                let waits = format!("session {pid} of a dead shim was killed and does not end");
                return Err(io::Error::new(io::ErrorKind::TimedOut, waits));
            }
            std::thread::sleep(BETWEEN_LOOKS);
        }
    }
    Ok(())
}

fn processes() -> io::Result<Vec<HostPid>> {
    let entries = std::fs::read_dir("/proc")?;
    let pid = |entry: std::fs::DirEntry| HostPid::new(entry.file_name().to_str()?.parse().ok()?);
    Ok(entries.flatten().filter_map(pid).collect())
}

/// Returns whether a process is a session that restores the container in `bundle`.
fn restores(pid: HostPid, bundle: &Path) -> bool {
    let arguments = std::fs::read(pid.path("cmdline")).unwrap_or_default();
    let mut arguments = arguments.split(|byte| *byte == 0).skip(1);
    let mut next = || arguments.next().unwrap_or_default();
    if next() != SESSION.name.as_bytes() || next() != RESTORES.as_bytes() {
        return false;
    }
    let its = Path::new(OsStr::from_bytes(next()));
    let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    its == bundle || real(its) == real(bundle)
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};

    use super::*;

    /// Starts a process with the arguments of a session. It ends with its standard input.
    fn session(folder: &Path, kind: &str, bundle: &Path) -> Child {
        let mut command = Command::new("sh");
        command.current_dir(folder).stdin(Stdio::piped()).args([SESSION.name, kind]).arg(bundle);
        let session = command.spawn().unwrap();
        // The arguments are there from the exec on.
        let path = format!("/proc/{}/cmdline", session.id());
        while !std::fs::read(&path).unwrap().starts_with(b"sh\0gpusnap-session\0") {
            std::thread::sleep(Duration::from_millis(1));
        }
        session
    }

    #[test]
    #[expect(clippy::disallowed_methods, reason = "the test waits for its own child")]
    fn the_sessions_that_restore_a_container_are_killed_and_no_others() {
        let folder = tempfile::tempdir().unwrap();
        let (bundle, other) = (folder.path().join("a"), folder.path().join("b"));
        std::fs::write(folder.path().join(SESSION.name), "read line").unwrap();
        let mut ours = session(folder.path(), RESTORES, &bundle);
        let mut others = [session(folder.path(), RESTORES, &other), session(folder.path(), "checkpoint", &bundle)];
        end_restores(&bundle).unwrap();
        assert!(!ours.wait().unwrap().success());
        for other in &mut others {
            assert!(other.try_wait().unwrap().is_none());
            drop(other.stdin.take());
            other.wait().unwrap();
        }
        end_restores(&bundle).unwrap();
    }
}
