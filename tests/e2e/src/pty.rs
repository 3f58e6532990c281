//! A client on a real terminal, for `-it`.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::process::{Child, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::cmd::Capture;
use crate::{Cmd, eventually};

/// A command with one pty for stdin, stdout, stderr and controlling terminal; the test has the
/// other end.
pub struct Pty {
    line: String,
    timeout: Duration,
    master: File,
    child: Child,
    screen: Capture,
}

impl Pty {
    /// Starts the command on a terminal of this size.
    pub fn spawn(cmd: &Cmd, rows: u16, cols: u16) -> Result<Self> {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        set_size(&master, rows, cols)?;
        let name = ptsname(&master, Vec::new())?;
        let path = std::path::Path::new(std::ffi::OsStr::from_bytes(name.as_bytes()));
        let slave = OpenOptions::new().read(true).write(true).open(path).with_context(|| format!("{path:?}"))?;
        // setsid(1) gives the command a session with its stdin as the controlling terminal. Doing
        // that here would need code between fork and exec, which is unsafe.
        let real = cmd.command();
        let mut command = std::process::Command::new("setsid");
        command.arg("--ctty").arg(real.get_program()).args(real.get_args());
        command.envs(real.get_envs().filter_map(|(k, v)| Some((k, v?)))).env("TERM", "xterm");
        command
            .stdin(Stdio::from(slave.try_clone()?))
            .stdout(Stdio::from(slave.try_clone()?))
            .stderr(Stdio::from(slave));
        let child = command.spawn().with_context(|| format!("cannot start `{}`", cmd.line()))?;
        // Until dropped, the command keeps copies of the slave in our process, and the screen would
        // never end.
        drop(command);
        let master = File::from(master);
        let screen = Capture::of(Some(master.try_clone()?));
        Ok(Self { line: cmd.line(), timeout: cmd.deadline(), master, child, screen })
    }

    /// Types keys.
    pub fn types(&mut self, keys: &str) -> Result<()> {
        self.master.write_all(keys.as_bytes()).context("the terminal")
    }

    /// Everything on the screen so far.
    pub fn screen(&self) -> String {
        String::from_utf8_lossy(&self.screen.so_far()).into_owned()
    }

    /// Waits until the screen has shown this text.
    pub fn shows(&self, text: &str) -> Result<()> {
        eventually(&format!("{text:?} on the terminal of `{}`", self.line), || {
            let screen = self.screen();
            ensure!(screen.contains(text), "the screen: {screen:?}");
            Ok(())
        })
    }

    /// Changes the window size, as by dragging a window's corner: the client gets SIGWINCH.
    pub fn resize(&self, rows: u16, cols: u16) -> Result<()> {
        set_size(&self.master, rows, cols)
    }

    /// Kills the client at once, as for a terminal on a lost machine.
    pub fn vanish(mut self) -> Result<()> {
        kill_process(self.pid()?, Signal::KILL)?;
        self.child.wait()?;
        Ok(())
    }

    /// Waits for the client's end; returns the exit code and the screen.
    pub fn wait(mut self) -> Result<(i32, String)> {
        let end = Instant::now() + self.timeout;
        while Instant::now() < end {
            if let Some(status) = self.child.try_wait()? {
                let screen = String::from_utf8_lossy(&self.screen.finish(end)).into_owned();
                return Ok((status.code().unwrap_or(-1), screen));
            }
            sleep(Duration::from_millis(5));
        }
        bail!("`{}` did not end in {:?}; its screen: {:?}", self.line, self.timeout, self.screen())
    }

    fn pid(&self) -> Result<Pid> {
        i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).context("a pid")
    }
}

impl Drop for Pty {
    fn drop(&mut self) {
        if let (Ok(None), Ok(pid)) = (self.child.try_wait(), self.pid()) {
            kill_process_group(pid, Signal::KILL).ok();
            self.child.wait().ok();
        }
    }
}

fn set_size(master: impl std::os::fd::AsFd, rows: u16, cols: u16) -> Result<()> {
    Ok(tcsetwinsize(master, Winsize { ws_row: rows, ws_col: cols, ws_xpixel: 0, ws_ypixel: 0 })?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_sees_the_terminal_and_its_size() {
        let mut pty =
            Pty::spawn(&Cmd::new("sh").args(&["-c", "tty; stty size; read x; stty size; exit 4"]), 33, 77).unwrap();
        pty.shows("/dev/pts/").unwrap();
        pty.shows("33 77").unwrap();
        pty.resize(40, 100).unwrap();
        pty.types("\n").unwrap();
        let (code, screen) = pty.wait().unwrap();
        assert!(code == 4 && screen.contains("40 100"), "{code} {screen}");
    }
}
