//! Facts about processes from `/proc`. The test bed shares the machine's pid namespace, so that
//! every container process and every shim is visible here.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use rustix::process::{Pid, Signal, kill_process};

use crate::eventually;

/// A file of a process.
pub fn read(pid: u32, file: &str) -> Result<String> {
    let path = format!("/proc/{pid}/{file}");
    let bytes = fs::read(&path).with_context(|| path)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// A line of `/proc/PID/status`, without the name.
pub fn status(pid: u32, field: &str) -> Result<String> {
    let text = read(pid, "status")?;
    status_line(&text, field)
}

/// A line of a printed `status`, without the name.
pub fn status_line(text: &str, field: &str) -> Result<String> {
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    Ok(line.with_context(|| format!("no {field} in {text:?}"))?.trim().to_owned())
}

/// A size of `/proc/PID/status`, in kB.
pub fn kilobytes(pid: u32, field: &str) -> Result<u64> {
    let value = status(pid, field)?;
    value.trim_end_matches(" kB").parse().with_context(|| format!("{field}: {value:?}"))
}

/// The parent.
pub fn parent(pid: u32) -> Result<u32> {
    status(pid, "PPid")?.parse().context("PPid")
}

/// The state letter: R, S, D, T, Z, ...
pub fn state(pid: u32) -> Result<char> {
    status(pid, "State")?.chars().next().context("State")
}

/// Returns whether the process exists and is no zombie.
pub fn alive(pid: u32) -> bool {
    state(pid).is_ok_and(|s| s != 'Z' && s != 'X')
}

/// Waits until the process has gone, or is a zombie.
pub fn gone(pid: u32) -> Result<()> {
    eventually(&format!("the end of process {pid}"), || {
        ensure!(!alive(pid), "it is there: {}", cmdline(pid));
        Ok(())
    })
}

/// Ends the process with SIGKILL.
pub fn kill(pid: u32) -> Result<()> {
    signal(pid, Signal::KILL)
}

/// Sends the process a signal.
pub fn signal(pid: u32, signal: Signal) -> Result<()> {
    let raw = i32::try_from(pid).ok().and_then(Pid::from_raw).context("a pid")?;
    kill_process(raw, signal).with_context(|| format!("{signal:?} to {pid}"))
}

/// The command line, for messages and searches.
pub fn cmdline(pid: u32) -> String {
    read(pid, "cmdline").unwrap_or_default().replace('\0', " ").trim().to_owned()
}

/// All processes.
pub fn all() -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// All processes of this name, or of this first argument.
pub fn acting_as(role: &str) -> Vec<u32> {
    let is_it = |pid: &u32| {
        read(*pid, "comm").is_ok_and(|name| name.trim() == role) || cmdline(*pid).split(' ').nth(1) == Some(role)
    };
    all().into_iter().filter(is_it).collect()
}

/// Direct children.
pub fn children(pid: u32) -> Vec<u32> {
    all().into_iter().filter(|child| parent(*child).is_ok_and(|p| p == pid)).collect()
}

/// Children, their children, and so on.
pub fn descendants(pid: u32) -> Vec<u32> {
    children(pid).into_iter().flat_map(|child| [vec![child], descendants(child)].concat()).collect()
}

/// Identity of a namespace, such as `net:[4026531840]`.
pub fn namespace(pid: u32, kind: &str) -> Result<String> {
    link(Path::new(&format!("/proc/{pid}/ns/{kind}")))
}

/// Identity of our own namespace.
pub fn own_namespace(kind: &str) -> Result<String> {
    link(Path::new(&format!("/proc/self/ns/{kind}")))
}

fn link(path: &Path) -> Result<String> {
    Ok(fs::read_link(path).with_context(|| path.display().to_string())?.display().to_string())
}

/// Number of open file descriptors.
pub fn open_files(pid: u32) -> Result<usize> {
    Ok(fs::read_dir(format!("/proc/{pid}/fd")).with_context(|| format!("fds of {pid}"))?.count())
}
