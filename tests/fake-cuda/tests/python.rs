//! The end-to-end tests' program for containers, on the simulated driver.

#[cfg(test)]
mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use common::{CHECKPOINTED, Machine, eventually};

/// The program, and the output file.
struct Python {
    child: Child,
    log: PathBuf,
}

impl Python {
    /// Starts the program; `None` without Python.
    fn run(machine: &Machine, options: &str, arguments: &str) -> Option<Self> {
        let mut probe = Command::new("python3");
        let Ok(mut probe) = probe.args(["-c", "import ctypes"]).stderr(Stdio::null()).spawn() else {
            eprintln!("skipped: there is no python3");
            return None;
        };
        let mut status = None;
        eventually("Python starts", || {
            status = probe.try_wait().ok().flatten();
            status.is_some()
        });
        if !status?.success() {
            eprintln!("skipped: this python3 has no ctypes");
            return None;
        }
        let log = machine.path("log");
        let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("../programs/gpu.py");
        let mut command = machine.command("python3");
        command.arg(program).arg("--log").arg(&log).args(arguments.split_whitespace());
        let child = command.env("FAKE_CUDA", options).stderr(Stdio::null()).spawn().ok()?;
        Some(Self { child, log })
    }

    fn lines(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits for `more` further rounds.
    fn goes_on(&self, more: usize) {
        let rounds = || self.lines().lines().filter(|line| line.starts_with("n=") && line.ends_with(" ok")).count();
        let wanted = rounds() + more;
        eventually("the program goes on", || rounds() >= wanted);
    }

    fn end(&mut self) -> Option<i32> {
        let mut status = None;
        eventually("the program ends", || {
            status = self.child.try_wait().ok().flatten();
            status.is_some()
        });
        status?.code()
    }
}

impl Drop for Python {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _ended = self.child.try_wait();
    }
}

#[test]
fn the_program_checks_itself_with_children_and_several_gpus() {
    let machine = Machine::with_gpus(2);
    let arguments = "--devices 2 --size 1 --pinned --fork 1 --spawn 1 --count 3";
    // The spawned one ends at a command.
    let Some(mut python) = Python::run(&machine, "", arguments) else { return };
    assert_eq!(python.end(), Some(0), "{}", python.lines());
    assert!(python.lines().ends_with("end\n"), "{}", python.lines());
}

#[test]
fn the_program_goes_on_after_checkpoint_and_restore() {
    let machine = Machine::with_gpus(1);
    let Some(mut python) = Python::run(&machine, "", "--size 2 --pinned") else { return };
    let pid = python.child.id();
    for _ in 0..2 {
        python.goes_on(3);
        assert_eq!(machine.call(&format!("lock {pid}")), 0);
        assert_eq!(machine.call(&format!("checkpoint {pid}")), 0);
        assert_eq!(machine.state(pid), CHECKPOINTED);
        assert_eq!(machine.call(&format!("restore {pid}")), 0);
        assert_eq!(machine.call(&format!("unlock {pid}")), 0);
    }
    python.goes_on(3);
    common::send(pid, 12);
    eventually("all of it is checked", || python.lines().contains("full n="));
    common::send(pid, 15);
    assert_eq!(python.end(), Some(0), "{}", python.lines());
}

#[test]
fn the_program_says_what_is_wrong_and_ends() {
    let machine = Machine::with_gpus(1);
    let Some(mut python) = Python::run(&machine, "fail-state", "--size 1") else { return };
    python.goes_on(1);
    assert_eq!(machine.call(&format!("lock {}", python.child.id())), 0);
    assert_eq!(machine.call(&format!("checkpoint {}", python.child.id())), 999);
    assert_eq!(python.end(), Some(1));
    assert!(python.lines().contains("FAILED: ") && python.lines().contains("999"), "{}", python.lines());
}
