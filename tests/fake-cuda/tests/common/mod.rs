//! A machine with simulated GPUs, programs on them, and checkpoint calls on the programs. Every
//! wait has a deadline.

// Each test file uses a part.
#![allow(dead_code)]

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::symlink;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

pub(crate) mod cgroup;
#[allow(unsafe_code)]
pub(crate) mod sys;

/// Limit of any successful wait.
pub(crate) const LONG: Duration = Duration::from_secs(20);

/// Time after which a call counts as hanging.
pub(crate) const HANGS: Duration = Duration::from_millis(400);

pub(crate) const RUNNING: u32 = 0;
pub(crate) const LOCKED: u32 = 1;
pub(crate) const CHECKPOINTED: u32 = 2;
pub(crate) const FAILED: u32 = 3;

/// Waits for a condition.
pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + LONG;
    while !holds() {
        assert!(Instant::now() < end, "never: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// A folder with the library under both names, and one with GPU nodes, which are ordinary files.
pub(crate) struct Machine {
    folder: TempDir,
}

impl Machine {
    pub(crate) fn with_gpus(count: u32) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::create_dir(at("lib")).unwrap();
        let library = Path::new(env!("CARGO_BIN_EXE_cuda-call")).with_file_name("deps").join("libfake_cuda.so");
        symlink(library, at("lib/libcuda.so.1")).unwrap();
        symlink("libcuda.so.1", at("lib/libnvidia-ml.so.1")).unwrap();
        fs::create_dir(at("dev")).unwrap();
        let names = ["nvidiactl".to_owned(), "nvidia-uvm".to_owned()];
        for name in names.into_iter().chain((0..count).map(|minor| format!("nvidia{minor}"))) {
            File::create(at("dev").join(name)).unwrap();
        }
        Self { folder }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn node(&self, name: &str) -> PathBuf {
        self.path("dev").join(name)
    }

    /// A program for this machine.
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .env("LD_LIBRARY_PATH", self.path("lib"))
            .env("FAKE_CUDA_DEV", self.path("dev"))
            .env_remove("FAKE_CUDA")
            .env_remove("FAKE_CUDA_FILE")
            .env_remove("FAKE_CUDA_HOST");
        command
    }

    /// A program without CUDA so far.
    pub(crate) fn program(&self, environment: &[(&str, &str)]) -> Program {
        let mut command = self.command(env!("CARGO_BIN_EXE_gpu-program"));
        command.envs(environment.iter().copied());
        Program::run(command)
    }

    /// A program with 1 MiB on the first GPU.
    pub(crate) fn started(&self, options: &str) -> Program {
        let mut program = self.program(&[("FAKE_CUDA", options)]);
        program.does("start 0 262144");
        program
    }

    /// Begins a checkpoint call, `OPERATION PID ...`.
    pub(crate) fn begin(&self, arguments: &str) -> Call {
        let mut command = self.command(env!("CARGO_BIN_EXE_cuda-call"));
        command.args(arguments.split_whitespace()).stdout(Stdio::piped());
        Call { child: command.spawn().unwrap() }
    }

    /// Makes a call and returns the CUresult.
    pub(crate) fn call(&self, arguments: &str) -> u32 {
        self.begin(arguments).result()
    }

    /// The state of a process, by a GetState that works.
    pub(crate) fn state(&self, pid: u32) -> u32 {
        let text = self.begin(&format!("state {pid}")).output();
        number_after(&text, "state=").unwrap_or_else(|| panic!("no state: {text}"))
    }
}

fn number_after(text: &str, name: &str) -> Option<u32> {
    text.split_whitespace().find_map(|word| word.strip_prefix(name)?.parse().ok())
}

/// A checkpoint call that may or may not return.
pub(crate) struct Call {
    child: Child,
}

impl Call {
    /// Waits for the call's end.
    pub(crate) fn output(mut self) -> String {
        eventually("the call returns", || self.child.try_wait().unwrap().is_some());
        let mut text = String::new();
        self.child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
        text
    }

    pub(crate) fn result(self) -> u32 {
        let text = self.output();
        number_after(&text, "rc=").unwrap_or_else(|| panic!("no result: {text}"))
    }

    pub(crate) fn tid(self) -> u32 {
        let text = self.output();
        number_after(&text, "tid=").unwrap_or_else(|| panic!("no thread: {text}"))
    }

    /// Returns whether the call still runs after the time in which others return.
    pub(crate) fn hangs(&mut self) -> bool {
        thread::sleep(HANGS);
        self.child.try_wait().unwrap().is_none()
    }

    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        eventually("the killed call ends", || self.child.try_wait().unwrap().is_some());
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _ended = self.child.try_wait();
    }
}

/// A program with a GPU, killed at the end of the test.
pub(crate) struct Program {
    child: Child,
    input: Option<ChildStdin>,
    answers: Receiver<String>,
}

impl Program {
    fn run(mut command: Command) -> Self {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let (sender, answers) = channel();
        thread::spawn(move || output.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
        Self { input: child.stdin.take(), child, answers }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a command, without waiting for the answer.
    pub(crate) fn tell(&mut self, command: &str) {
        writeln!(self.input.as_mut().unwrap(), "{command}").unwrap();
    }

    /// The answer to the last command, if there is one in time.
    pub(crate) fn answer(&self, time: Duration) -> Option<String> {
        self.answers.recv_timeout(time).ok()
    }

    /// Sends a command and returns the answer.
    pub(crate) fn ask(&mut self, command: &str) -> String {
        self.tell(command);
        self.answer(LONG).unwrap_or_else(|| panic!("no answer to {command}"))
    }

    /// Sends a command that must succeed.
    pub(crate) fn does(&mut self, command: &str) {
        assert_eq!(self.ask(command), "ok", "{command}");
    }

    /// Sends a command that must succeed with a value.
    pub(crate) fn gives(&mut self, command: &str) -> String {
        let answer = self.ask(command);
        answer.strip_prefix("ok ").unwrap_or_else(|| panic!("{command}: {answer}")).to_owned()
    }

    pub(crate) fn signal(&self, signal: i32) {
        send(self.pid(), signal);
    }

    /// The signal that ends the program.
    pub(crate) fn death(&mut self) -> Option<i32> {
        let mut status = None;
        eventually("the program ends", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap().signal()
    }

    pub(crate) fn is_alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    pub(crate) fn maps(&self) -> Vec<Mapping> {
        maps(self.pid())
    }

    /// Mappings and descriptors of device nodes.
    pub(crate) fn nodes(&self) -> (usize, usize) {
        nodes(self.pid())
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        while matches!(self.child.try_wait(), Ok(None)) {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Sends a signal by the `kill` of the shell: no unsafe code here.
pub(crate) fn send(pid: u32, signal: i32) {
    let mut kill = Command::new("sh").args(["-c", &format!("kill -{signal} {pid}")]).spawn().unwrap();
    eventually("kill returns", || kill.try_wait().unwrap().is_some());
}

/// A line of /proc/PID/maps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mapping {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) mode: String,
    pub(crate) name: String,
}

pub(crate) fn maps(pid: u32) -> Vec<Mapping> {
    let text = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let mapping = |line: &str| {
        let mut words = line.split_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        Some(Mapping {
            start: u64::from_str_radix(start, 16).ok()?,
            end: u64::from_str_radix(end, 16).ok()?,
            mode: words.next()?.to_owned(),
            name: words.skip(3).collect::<Vec<_>>().join(" "),
        })
    };
    text.lines().map(|line| mapping(line).unwrap_or_else(|| panic!("{line}"))).collect()
}

pub(crate) fn nodes(pid: u32) -> (usize, usize) {
    let mapped = maps(pid).iter().filter(|mapping| mapping.name.contains("/dev/nvidia")).count();
    let open = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let open = open.filter_map(|entry| fs::read_link(entry.path()).ok());
    (mapped, open.filter(|target| target.to_string_lossy().contains("/dev/nvidia")).count())
}

/// The threads of a process by name.
pub(crate) fn threads(pid: u32) -> Vec<(u32, String)> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    tasks
        .map(|task| {
            let name = fs::read_to_string(task.path().join("comm")).unwrap();
            (task.file_name().to_str().unwrap().parse().unwrap(), name.trim().to_owned())
        })
        .collect()
}
