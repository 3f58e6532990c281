//! libcontainer's log of errors: often the only place with the file, the mount or the errno. Cloned
//! processes log too before dying, so all write into one inherited memfd.

use std::fmt::{self, Write as _};
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::panic::PanicHookInfo;
use std::sync::Mutex;

use rustix::fs::MemfdFlags;
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

use crate::libcontainer::protocol::Reply;

/// Longest event, in bytes. Errors are few and short, except a whole mount or process in print.
const EVENT_LIMIT: usize = 600;
const LOG_LIMIT: u64 = 64 << 10;
/// Number of lines added to a message. The deepest names the thing, the next up often the error.
const DETAILS: usize = 2;

/// Errors logged by this process and its clones.
pub(super) struct Log {
    file: File,
}

impl Log {
    /// Starts collecting errors and panics of this process, which must be the helper itself.
    pub(super) fn start(reply: &File) -> io::Result<Self> {
        let file = File::from(rustix::fs::memfd_create("gpusnap-helper-log", MemfdFlags::CLOEXEC)?);
        let collector = Collector { file: Mutex::new(file.try_clone()?) };
        tracing::subscriber::set_global_default(collector).map_err(io::Error::other)?;
        let reply = Mutex::new(reply.try_clone()?);
        let panics = Mutex::new(file.try_clone()?);
        rustix::stdio::dup2_stderr(&file)?;
        let helper = std::process::id();
        std::panic::set_hook(Box::new(move |panic| {
            let message = describe(panic);
            // A cloned process inherits the hook. Its panic is a detail of the helper's later
            // failure.
            if std::process::id() != helper {
                append(&panics, &message);
            } else if let (Ok(mut reply), Ok(bytes)) = (
                reply.lock(),
                serde_json::to_vec(&Reply::Panicked { message: format!("the helper panicked: {message}") }),
            ) {
                let _ = reply.write_all(&bytes);
            }
        }));
        Ok(Self { file })
    }

    /// Adds the first logged lines to an error's message, as the deepest failures, unless nothing
    /// is new.
    pub(super) fn complete(mut self, message: String) -> String {
        let mut log = Vec::new();
        if self.file.rewind().and_then(|()| self.file.take(LOG_LIMIT).read_to_end(&mut log)).is_err() {
            return message;
        }
        let log = String::from_utf8_lossy(&log);
        let details: Vec<&str> =
            log.lines().map(str::trim).filter(|line| adds_to(&message, line)).take(DETAILS).collect();
        if details.is_empty() { message } else { format!("{message} ({})", details.join("; ")) }
    }
}

/// Returns whether a detail adds to a message. Many events repeat the message, or report a closed
/// channel.
fn adds_to(message: &str, detail: &str) -> bool {
    let repeats = message.contains(detail) || detail.ends_with(message) || detail.contains(&format!("{message:?}"));
    !detail.is_empty() && !repeats && !detail.starts_with("failed sending error")
}

fn describe(panic: &PanicHookInfo<'_>) -> String {
    let payload = panic.payload();
    let words = payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("without a message");
    match panic.location() {
        Some(location) => format!("{words} ({location})"),
        None => words.to_owned(),
    }
}

/// Writes one line at once, so that lines of several processes do not mix.
fn append(file: &Mutex<File>, text: &str) {
    let mut line = text.replace(['\n', '\r'], " ");
    if line.len() > EVENT_LIMIT {
        let end = line.floor_char_boundary(EVENT_LIMIT);
        line.truncate(end);
        line.push_str("...");
    }
    line.push('\n');
    if let Ok(mut file) = file.lock() {
        let _ = file.write_all(line.as_bytes());
    }
}

struct Collector {
    file: Mutex<File>,
}

impl Subscriber for Collector {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() == tracing::Level::ERROR && metadata.is_event()
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(LevelFilter::ERROR)
    }

    fn new_span(&self, _span: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _span: &Id, _values: &Record<'_>) {}

    fn record_follows_from(&self, _span: &Id, _follows: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut text = Text::default();
        event.record(&mut text);
        append(&self.file, &format!("{}{}", text.message, text.fields));
    }

    fn enter(&self, _span: &Id) {}

    fn exit(&self, _span: &Id) {}
}

/// Text of an event: `message: error, field value, field value`
#[derive(Default)]
struct Text {
    message: String,
    fields: String,
}

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing into a string cannot fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            "err" | "error" | "errno" | "e" | "ret" => write!(self.fields, ": {value:?}"),
            name => write!(self.fields, ", {name} {value:?}"),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(lines: &str) -> Log {
        let mut file = File::from(rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC).unwrap());
        file.write_all(lines.as_bytes()).unwrap();
        Log { file }
    }

    #[test]
    fn the_deepest_errors_complete_the_message() {
        let log = log("failed to mount /x: syscall\nfailed to prepare rootfs: Nix(EINVAL)\nfailed to do all of it\n");
        assert_eq!(
            log.complete("failed to prepare rootfs".into()),
            "failed to prepare rootfs (failed to mount /x: syscall; failed to prepare rootfs: Nix(EINVAL))"
        );
    }

    #[test]
    fn details_already_in_the_message_are_not_repeated() {
        assert_eq!(log("no such file\n").complete("cannot open x: no such file".into()), "cannot open x: no such file");
        assert_eq!(log("failed to run: no such file\n").complete("no such file".into()), "no such file");
        assert_eq!(log("").complete("alone".into()), "alone");
    }

    #[test]
    fn an_event_is_one_short_line() {
        let mut file = File::from(rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC).unwrap());
        append(&Mutex::new(file.try_clone().unwrap()), &format!("a\nb{}", "ü".repeat(EVENT_LIMIT)));
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        assert!(text.starts_with("a bü") && text.ends_with("...\n"), "{text}");
        assert_eq!(text.lines().count(), 1);
    }
}
