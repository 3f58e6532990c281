//! A single call of the program.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use reaper::{Child, Exit, Reaper};
use serde::Serialize;
use tempfile::TempDir;

use super::{log, sys};
use crate::{Operation, ProcessIo, RuntimeError};

/// Variables of systemd's protocol with a service. A runtime would mistake these for the
/// container's settings: runc would wait for the container's `sd_notify`, or pass descriptors on.
const NOT_FOR_RUNTIMES: [&str; 4] = ["NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"];

/// Longest list of features, or message, to be read, in bytes.
const OUTPUT_LIMIT: u64 = 1 << 20;

/// Everything about one call except the arguments.
pub(super) struct Call<'a> {
    pub(super) reaper: &'a Reaper,
    pub(super) binary: &'a Path,
    pub(super) root: &'a Path,
    pub(super) systemd_cgroup: bool,
    pub(super) operation: Operation,
    pub(super) container: &'a str,
}

impl Call<'_> {
    pub(super) fn refused(&self, message: String) -> RuntimeError {
        RuntimeError::Refused {
            runtime: self.runtime(),
            operation: self.operation,
            container: self.container.to_owned(),
            message,
        }
    }

    pub(super) fn answer(&self, message: String) -> RuntimeError {
        RuntimeError::Answer {
            runtime: self.runtime(),
            operation: self.operation,
            container: self.container.to_owned(),
            message,
        }
    }

    pub(super) fn file(&self, action: &'static str, path: PathBuf, source: io::Error) -> RuntimeError {
        RuntimeError::File { action, path, operation: self.operation, container: self.container.to_owned(), source }
    }

    /// Returns the error with the message in CRIU's log. The runtime's own message says only that
    /// CRIU failed.
    pub(super) async fn explained(&self, error: RuntimeError, log: &Path) -> RuntimeError {
        if !matches!(error, RuntimeError::Refused { .. } | RuntimeError::Answer { .. }) {
            return error;
        }
        if let Some(too_old) = criu::Criu::new(self.reaper.clone()).too_old().await {
            return self.refused(too_old.to_string());
        }
        criu::explain(log).map_or(error, |explanation| self.refused(explanation))
    }

    /// Returns the program's name, without the folder.
    fn runtime(&self) -> String {
        self.binary.file_name().unwrap_or(self.binary.as_os_str()).to_string_lossy().into_owned()
    }

    /// Makes a folder for the files of this call. The parent is the runtime's root: private, in
    /// memory as a rule, and present in every call. The leading dot keeps the folder out of the
    /// runtime's lists.
    pub(super) fn scratch(&self) -> Result<Scratch, RuntimeError> {
        let make = || {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(self.root)?;
            tempfile::Builder::new().prefix(".gpusnap-").tempdir_in(self.root)
        };
        let folder = make().map_err(|source| self.file("make a folder in", self.root.to_owned(), source))?;
        Ok(Scratch { folder })
    }

    /// Runs the program for an operation that leaves no process behind. Output goes to the scratch
    /// folder.
    pub(super) async fn run(&self, scratch: &Scratch, arguments: Vec<OsString>) -> Result<(), RuntimeError> {
        self.run_command(scratch, self.command(scratch, arguments)).await
    }

    /// As [`Self::run`], for a command of [`Self::command`].
    pub(super) async fn run_command(
        &self,
        scratch: &Scratch,
        mut command: std::process::Command,
    ) -> Result<(), RuntimeError> {
        command.stdin(Stdio::null()).stdout(scratch.create(self, OUTPUT)?).stderr(scratch.create(self, ERRORS)?);
        self.finish(scratch, command).await
    }

    /// Runs the program for an operation that leaves a process behind, and adopts the process. With
    /// `criu_wrapper`, the folder of a criu wrapper, a restored tree is frozen.
    pub(super) async fn process(
        &self,
        scratch: &Scratch,
        mut arguments: Vec<OsString>,
        io: ProcessIo,
        criu_wrapper: Option<&Path>,
    ) -> Result<Child, RuntimeError> {
        let pid_file = scratch.path(PID);
        arguments.extend(["--pid-file".into(), pid_file.clone().into()]);
        if let ProcessIo::Terminal { console_socket } = &io {
            arguments.extend(["--console-socket".into(), console_socket.clone().into()]);
        }
        arguments.push(self.container.into());
        let mut command = self.command(scratch, arguments);
        if let Some(work) = criu_wrapper {
            let inserted = criu_wrapper::insert(&mut command, scratch.folder.path(), work);
            inserted.map_err(|source| self.file("make a link in", scratch.folder.path().to_owned(), source))?;
        }
        match io {
            ProcessIo::Fds { stdin, stdout, stderr } => command.stdin(stdin).stdout(stdout).stderr(stderr),
            ProcessIo::Terminal { .. } => {
                command.stdin(Stdio::null()).stdout(scratch.create(self, OUTPUT)?).stderr(scratch.create(self, ERRORS)?)
            }
        };
        // Open until the end: the process may be dead before its pid is known.
        let adoption = self.reaper.adoption();
        self.finish(scratch, command).await?;
        let pid = std::fs::read_to_string(&pid_file).map_err(|source| self.file("read", pid_file, source))?;
        let pid = pid.trim().parse().map_err(|_| self.answer(format!("its pid file holds {:?}", pid.trim())))?;
        adoption.adopt(pid).map_err(|error| self.answer(format!("its process {pid} cannot be adopted: {error}")))
    }

    pub(super) fn command(&self, scratch: &Scratch, arguments: Vec<OsString>) -> std::process::Command {
        let mut command = std::process::Command::new(self.binary);
        command.arg("--root").arg(self.root).arg("--log").arg(scratch.path(LOG)).args(["--log-format", "json"]);
        if self.systemd_cgroup {
            command.arg("--systemd-cgroup");
        }
        command.args(arguments);
        for name in NOT_FOR_RUNTIMES {
            command.env_remove(name);
        }
        // Not this process's group: a signal to the group must not hit a runtime half-way.
        command.current_dir(working_directory()).process_group(0);
        sys::set_umask(&mut command);
        command
    }

    /// Spawns the program and waits for the end. Consumes the command with the container's
    /// descriptors: open copies here would hide the container's close from the other ends.
    async fn finish(&self, scratch: &Scratch, mut command: std::process::Command) -> Result<(), RuntimeError> {
        let spawned = self.reaper.spawn(&mut command);
        drop(command);
        let child = spawned.map_err(|source| RuntimeError::Spawn {
            binary: self.binary.to_owned(),
            operation: self.operation,
            container: self.container.to_owned(),
            source,
        })?;
        let exit = child.wait().await;
        let log = log::read(&scratch.path(LOG));
        for warning in &log.warnings {
            tracing::warn!(container = self.container, operation = %self.operation, "{warning}");
        }
        if exit.code == 0 {
            return Ok(());
        }
        // Standard error is the second choice: usage and the output of hooks are mixed in.
        match log.error.or_else(|| scratch.last_error()) {
            Some(message) => Err(self.refused(message)),
            None => Err(self.answer(death(exit))),
        }
    }
}

/// Returns this process's directory: the bundle of the shim's start, in which wrappers of runc read
/// config.json. A program cannot be started in a removed directory.
fn working_directory() -> PathBuf {
    std::env::current_dir().unwrap_or_else(|_| "/".into())
}

fn death(exit: Exit) -> String {
    match exit.code {
        code @ 129.. => format!("it was killed by signal {}", code - 128),
        code => format!("it ended with exit code {code} and no message"),
    }
}

const LOG: &str = "log.json";
const PID: &str = "pid";
const OUTPUT: &str = "stdout";
const ERRORS: &str = "stderr";

/// The files of one call, removed after the call. Separate folders allow several calls at a time.
pub(super) struct Scratch {
    folder: TempDir,
}

impl Scratch {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn create(&self, call: &Call<'_>, name: &str) -> Result<File, RuntimeError> {
        let path = self.path(name);
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        file.map_err(|source| call.file("create", path, source))
    }

    /// Writes a file for the program to read; returns its path.
    pub(super) fn write_json(
        &self,
        call: &Call<'_>,
        name: &str,
        content: &impl Serialize,
    ) -> Result<PathBuf, RuntimeError> {
        let file = self.create(call, name)?;
        let path = self.path(name);
        match serde_json::to_writer(io::BufWriter::new(file), content) {
            Ok(()) => Ok(path),
            Err(error) => Err(call.file("write", path, error.into())),
        }
    }

    /// Returns the program's output.
    pub(super) fn output(&self, call: &Call<'_>) -> Result<Vec<u8>, RuntimeError> {
        let path = self.path(OUTPUT);
        read(&path).map_err(|source| call.file("read", path, source))
    }

    /// Returns the last line of the program's standard error, if separate from the container's.
    fn last_error(&self) -> Option<String> {
        let text = read(&self.path(ERRORS)).ok()?;
        let text = String::from_utf8_lossy(&text).into_owned();
        text.lines().rev().map(str::trim).find(|line| !line.is_empty()).map(str::to_owned)
    }
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut content = vec![];
    File::open(path)?.take(OUTPUT_LIMIT).read_to_end(&mut content)?;
    Ok(content)
}
