//! Log records of a role: one JSON line each on standard error, repeated in the starter's log.

use std::io::{self, Write};
use std::os::fd::OwnedFd;

use log::{Level, LevelFilter, Log, Metadata, Record};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::unix::pipe;

/// Environment variable with the level of the starter's log.
pub(crate) const LEVEL_VARIABLE: &str = "GPUSNAP_LOG_LEVEL";
/// Longest line forwarded, in bytes. Longer lines are cut.
const LONGEST: usize = 16 << 10;

#[derive(Serialize, Deserialize)]
struct Line {
    level: Level,
    role: String,
    pid: u32,
    message: String,
}

struct ToStandardError {
    role: &'static str,
}

impl ToStandardError {
    fn say(&self, level: Level, message: String) {
        let line = Line { level, role: self.role.to_owned(), pid: std::process::id(), message };
        if let Ok(mut line) = serde_json::to_vec(&line) {
            line.push(b'\n');
            // A single write: a pipe keeps lines of up to 4 KiB of several processes apart.
            let _ = io::stderr().write_all(&line);
        }
    }
}

impl Log for ToStandardError {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            self.say(record.level(), record.args().to_string());
        }
    }

    fn flush(&self) {}
}

/// Sends this process's log records and panics to standard error.
pub(crate) fn install(role: &'static str) {
    let level = std::env::var(LEVEL_VARIABLE).ok().and_then(|level| level.parse().ok()).unwrap_or(LevelFilter::Info);
    // A second logger is refused; the first one serves.
    if log::set_boxed_logger(Box::new(ToStandardError { role })).is_ok() {
        log::set_max_level(level);
    }
    std::panic::set_hook(Box::new(move |panic| {
        ToStandardError { role }.say(Level::Error, format!("panic: {panic}"));
    }));
}

/// Returns a pipe for the log of a role: the end to read and the end for the role.
///
/// # Errors
/// Fails if the kernel makes no pipe.
pub fn log_pipe() -> io::Result<(pipe::Receiver, OwnedFd)> {
    let (read, write) = io::pipe()?;
    Ok((pipe::Receiver::from_owned_fd(read.into())?, write.into()))
}

/// Forwards the pipe's records to this process's log until all writers are gone, each with the
/// container's id. A line of another kind (a library's message) is logged as a warning.
pub async fn forward(from: pipe::Receiver, container: String) {
    let mut lines = BufReader::new(from);
    let mut line = Vec::new();
    loop {
        line.clear();
        match lines.read_until(b'\n', &mut line).await {
            Ok(0) | Err(_) => return,
            Ok(_) => tell(&line, &container),
        }
    }
}

fn tell(line: &[u8], container: &str) {
    let Ok(Line { level, role, pid, message }) = serde_json::from_slice(line) else {
        let text = String::from_utf8_lossy(&line[..line.len().min(LONGEST)]);
        tracing::warn!(container, "a process of the shim says: {}", text.trim_end());
        return;
    };
    match level {
        Level::Error => tracing::error!(container, role, pid, "{message}"),
        Level::Warn => tracing::warn!(container, role, pid, "{message}"),
        Level::Info => tracing::info!(container, role, pid, "{message}"),
        Level::Debug => tracing::debug!(container, role, pid, "{message}"),
        Level::Trace => tracing::trace!(container, role, pid, "{message}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_keeps_its_level_role_and_pid() {
        let line = Line { level: Level::Warn, role: "session".into(), pid: 7, message: "a\nb".into() };
        let text = serde_json::to_string(&line).unwrap();
        assert!(!text.contains('\n'));
        let read: Line = serde_json::from_str(&text).unwrap();
        assert_eq!(
            (read.level, read.role.as_str(), read.pid, read.message.as_str()),
            (Level::Warn, "session", 7, "a\nb")
        );
    }
}
