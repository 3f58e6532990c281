//! Client commands. At the deadline a command's whole process group is killed: a hanging shim fails
//! one test instead of stopping the suite.

use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};

use crate::eventually;

/// Default deadline of one client command.
pub const TIMEOUT: Duration = Duration::from_secs(120);

#[derive(Clone, Debug)]
enum Stdin {
    /// A pipe with the other end open until the command ends. `ctr run` with an early end of stdin
    /// can hang for ever, also with runc's shim, so "no input" must not mean "end of file".
    Held,
    Null,
    Bytes(Arc<Vec<u8>>),
}

/// A command not yet started.
#[derive(Clone, Debug)]
pub struct Cmd {
    program: String,
    args: Vec<String>,
    env: Vec<(String, String)>,
    stdin: Stdin,
    timeout: Duration,
}

/// Exit code and output of a command.
#[derive(Clone, Debug)]
pub struct Output {
    /// The command line, for errors.
    pub command: String,
    /// Exit code; 128 + signal for a killed command.
    pub code: i32,
    /// Everything printed to stdout.
    pub stdout: Vec<u8>,
    /// Everything printed to stderr, lossily decoded.
    pub stderr: String,
}

impl Output {
    /// stdout as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// stdout as text without surrounding white space.
    pub fn trimmed(&self) -> String {
        self.text().trim().to_owned()
    }

    /// Fails unless the command ended with this exit code.
    pub fn expect_code(self, code: i32) -> Result<Self> {
        if self.code == code {
            return Ok(self);
        }
        bail!("exit code {} instead of {code}: {self}", self.code)
    }

    /// Fails if the command succeeded.
    pub fn expect_failure(self) -> Result<Self> {
        if self.code != 0 {
            return Ok(self);
        }
        bail!("succeeded, but should not have: {self}")
    }
}

impl std::fmt::Display for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = self.text();
        let shown: String = text.chars().take(2000).collect();
        write!(f, "`{}` exit {}\n  stdout: {}\n  stderr: {}", self.command, self.code, shown.trim(), self.stderr.trim())
    }
}

impl Cmd {
    /// A command without input: stdin stays open and silent.
    pub fn new(program: impl Into<String>) -> Self {
        Self { program: program.into(), args: vec![], env: vec![], stdin: Stdin::Held, timeout: TIMEOUT }
    }

    /// Adds one argument.
    #[must_use]
    pub fn arg(mut self, arg: impl Into<String>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<S: AsRef<str>>(mut self, args: &[S]) -> Self {
        self.args.extend(args.iter().map(|a| a.as_ref().to_owned()));
        self
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl Into<String>) -> Self {
        self.env.push((name.to_owned(), value.into()));
        self
    }

    /// Uses `/dev/null` as stdin.
    #[must_use]
    pub fn stdin_null(mut self) -> Self {
        self.stdin = Stdin::Null;
        self
    }

    /// Uses these bytes as stdin, then end of file.
    #[must_use]
    pub fn stdin_bytes(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = Stdin::Bytes(Arc::new(bytes.into()));
        self
    }

    /// Replaces the default deadline.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// The command line, for messages.
    pub fn line(&self) -> String {
        std::iter::once(&self.program).chain(&self.args).map(String::as_str).collect::<Vec<_>>().join(" ")
    }

    /// Runs the command to the end, at any exit code. An error means a failed start or a missed
    /// deadline.
    pub fn run(self) -> Result<Output> {
        self.spawn()?.wait()
    }

    /// Runs the command and fails unless the exit code is 0.
    pub fn ok(self) -> Result<Output> {
        self.run()?.expect_code(0)
    }

    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.args).envs(self.env.iter().map(|(k, v)| (k, v)));
        command
    }

    pub(crate) fn deadline(&self) -> Duration {
        self.timeout
    }

    /// Starts the command in the background.
    pub fn spawn(self) -> Result<Running> {
        let mut command = self.command();
        // A new process group, so that the deadline reaches the children too.
        command.process_group(0).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.stdin(match self.stdin {
            Stdin::Null => Stdio::null(),
            Stdin::Held | Stdin::Bytes(_) => Stdio::piped(),
        });
        let mut child = command.spawn().with_context(|| format!("cannot start `{}`", self.line()))?;
        let stdin = child.stdin.take();
        let stdin = match (self.stdin.clone(), stdin) {
            (Stdin::Bytes(bytes), Some(mut pipe)) => {
                // A command that ends early breaks the pipe; the exit code is reported elsewhere.
                thread::spawn(move || drop(pipe.write_all(&bytes)));
                None
            }
            (_, pipe) => pipe,
        };
        let stdout = Capture::of(child.stdout.take());
        let stderr = Capture::of(child.stderr.take());
        Ok(Running { line: self.line(), timeout: self.timeout, child, stdin, stdout, stderr })
    }
}

/// Output of a stream so far.
pub(crate) struct Capture {
    bytes: Arc<Mutex<Vec<u8>>>,
    thread: JoinHandle<()>,
}

impl Capture {
    pub(crate) fn of(source: Option<impl Read + Send + 'static>) -> Self {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&bytes);
        let thread = thread::spawn(move || {
            let Some(mut source) = source else { return };
            let mut chunk = vec![0; 64 * 1024];
            // A pty's master gives EIO when the last user of the other side has gone: also an end.
            while let Ok(n @ 1..) = source.read(&mut chunk) {
                sink.lock().unwrap_or_else(std::sync::PoisonError::into_inner).extend_from_slice(&chunk[..n]);
            }
        });
        Self { bytes, thread }
    }

    pub(crate) fn so_far(&self) -> Vec<u8> {
        self.bytes.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    /// Waits for the end of the stream, at most until the deadline if another process keeps the
    /// stream open.
    pub(crate) fn finish(&self, end: Instant) -> Vec<u8> {
        while !self.thread.is_finished() && Instant::now() < end {
            sleep(Duration::from_millis(5));
        }
        self.so_far()
    }
}

/// A command in the background, killed when dropped.
pub struct Running {
    line: String,
    timeout: Duration,
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: Capture,
    stderr: Capture,
}

impl Running {
    /// The command's process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// stdout so far.
    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&self.stdout.so_far()).into_owned()
    }

    /// stderr so far.
    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.stderr.so_far()).into_owned()
    }

    /// Waits until stdout contains this text.
    pub fn sees(&self, text: &str) -> Result<()> {
        eventually(&format!("{text:?} on stdout of `{}`", self.line), || {
            let (out, err) = (self.stdout(), self.stderr());
            ensure!(out.contains(text), "stdout so far: {out:?}, stderr: {err:?}");
            Ok(())
        })
    }

    /// Waits until stderr contains this text.
    pub fn sees_error(&self, text: &str) -> Result<()> {
        eventually(&format!("{text:?} on stderr of `{}`", self.line), || {
            let (out, err) = (self.stdout(), self.stderr());
            ensure!(err.contains(text), "stdout so far: {out:?}, stderr: {err:?}");
            Ok(())
        })
    }

    /// Writes to the command's stdin, left open.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.stdin.as_mut().context("stdin is closed")?.write_all(bytes).context("its stdin")
    }

    /// Closes the command's stdin.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Sends a signal to the command alone (without the children, as for a killed client).
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill_process(pid(&self.child)?, signal).with_context(|| format!("signal to `{}`", self.line))
    }

    /// Waits for the end; at the deadline kills the command and fails.
    pub fn wait(mut self) -> Result<Output> {
        let end = Instant::now() + self.timeout;
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            if Instant::now() > end {
                kill_process_group(pid(&self.child)?, Signal::KILL).ok();
                self.child.wait()?;
                let stdout = String::from_utf8_lossy(&self.stdout.so_far()).into_owned();
                let stderr = String::from_utf8_lossy(&self.stderr.so_far()).into_owned();
                bail!("`{}` did not end in {:?}\n  stdout: {stdout}\n  stderr: {stderr}", self.line, self.timeout);
            }
            sleep(Duration::from_millis(5));
        };
        let code = status.code().or(status.signal().map(|s| 128 + s));
        Ok(Output {
            command: self.line.clone(),
            code: code.ok_or_else(|| anyhow!("`{}` neither exited nor died", self.line))?,
            stdout: self.stdout.finish(end),
            stderr: String::from_utf8_lossy(&self.stderr.finish(end)).into_owned(),
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let (Ok(None), Ok(pid)) = (self.child.try_wait(), pid(&self.child)) {
            kill_process_group(pid, Signal::KILL).ok();
            self.child.wait().ok();
        }
    }
}

fn pid(child: &Child) -> Result<Pid> {
    i32::try_from(child.id()).ok().and_then(Pid::from_raw).context("a pid")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_and_exit_code_come_back() {
        let out = Cmd::new("sh").args(&["-c", "cat; echo err >&2; exit 3"]).stdin_bytes("in").run().unwrap();
        assert_eq!((out.code, out.text().as_str(), out.stderr.as_str()), (3, "in", "err\n"));
    }

    #[test]
    fn a_command_that_never_ends_is_killed_with_its_children() {
        let cmd = Cmd::new("sh").args(&["-c", "sleep 1000 & echo $!; wait"]).timeout(Duration::from_millis(300));
        let error = cmd.run().unwrap_err().to_string();
        assert!(error.contains("did not end"), "{error}");
        let child = error.lines().find_map(|l| l.trim().strip_prefix("stdout: ")).unwrap().trim().to_owned();
        eventually("the child's end", || {
            let stat = std::fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
            ensure!(stat.is_empty() || stat.contains(") Z "), "{stat}");
            Ok(())
        })
        .unwrap();
    }

    #[test]
    fn silent_stdin_stays_open() {
        let mut cat = Cmd::new("cat").spawn().unwrap();
        cat.write(b"one\n").unwrap();
        cat.sees("one").unwrap();
        cat.close_stdin();
        assert_eq!(cat.wait().unwrap().code, 0);
    }
}
