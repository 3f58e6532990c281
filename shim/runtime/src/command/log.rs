//! A runtime's log, written on request: a sequence of JSON objects.
//!
//! runc and nvidia-container-runtime write one object per line, crun spreads an object over several
//! lines. All three have the keys `level` and `msg`. youki has `level` in capitals, and the message
//! in `fields.message`.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use serde::Deserialize;

/// Bytes read from the end of a log. An error stands at the end, and is shorter.
const TAIL: u64 = 256 << 10;

/// Messages in the log of one call.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Log {
    /// The last error, on one line.
    pub(super) error: Option<String>,
    /// All warnings.
    pub(super) warnings: Vec<String>,
}

#[derive(Deserialize)]
struct Entry {
    level: String,
    msg: Option<String>,
    fields: Option<Fields>,
}

#[derive(Deserialize)]
struct Fields {
    message: Option<String>,
}

impl Entry {
    fn message(self) -> Option<String> {
        self.msg.or_else(|| self.fields.and_then(|fields| fields.message))
    }
}

/// Reads a log. A missing log is empty: the program ended too early.
pub(super) fn read(path: &Path) -> Log {
    match tail(path) {
        Ok(tail) => parse(&tail),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Log::default(),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "cannot read a runtime's log");
            Log::default()
        }
    }
}

fn tail(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(TAIL)))?;
    let mut bytes = vec![];
    file.take(TAIL).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn parse(text: &str) -> Log {
    let mut log = Log::default();
    for entry in entries(text) {
        let level = entry.level.to_ascii_lowercase();
        let Some(mut message) = entry.message() else { continue };
        // crun's own process logs the message of a process in the container once more, unchanged.
        if let Some(inner) = entries(&message).pop().and_then(Entry::message) {
            message = inner;
        }
        match level.as_str() {
            "error" | "fatal" | "panic" => log.error = Some(one_line(&message)),
            "warning" | "warn" => log.warnings.push(one_line(&message)),
            _ => {}
        }
    }
    log
}

/// Returns the log's objects. Lines outside an object are skipped: the rest of a cut-off object, or
/// the output of a hook or wrapper.
fn entries(text: &str) -> Vec<Entry> {
    let mut entries = vec![];
    // Lines since a brace still open.
    let mut open: Option<String> = None;
    for line in text.lines() {
        if let Ok(entry) = serde_json::from_str(line) {
            entries.push(entry);
            open = None;
        } else if line == "{" {
            open = Some(line.to_owned());
        } else if let Some(object) = &mut open {
            object.push_str(line);
            if line == "}" {
                entries.extend(serde_json::from_str::<Entry>(object).ok());
                open = None;
            }
        }
    }
    entries
}

fn one_line(message: &str) -> String {
    let lines: Vec<&str> = message.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    lines.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_error_is_the_reason_and_warnings_are_kept() {
        let text = r#"
{"level":"warning","msg":"cgroup v1 is deprecated","time":"2026-11-24T18:00:00Z"}
{"level":"error","msg":"first","time":"2026-11-24T18:00:00Z"}
{"level":"error","msg":"runc create failed: unable to start container process: exec: \"nosuch\": executable file not found in $PATH\n","time":"2026-11-24T18:00:00Z"}
{"level":"info","msg":"done","time":"2026-11-24T18:00:00Z"}
"#;
        let log = parse(text);
        let reason = r#"runc create failed: unable to start container process: exec: "nosuch": executable file not found in $PATH"#;
        assert_eq!(log.error.as_deref(), Some(reason));
        assert_eq!(log.warnings, ["cgroup v1 is deprecated"]);
    }

    #[test]
    fn cruns_and_youkis_lines_are_understood() {
        let crun = r#"{
  "msg": "cgroup v1 is deprecated",
  "level": "warning",
  "time": "2026-11-24T19:46:45.000000Z"
}
{
  "msg": "executable file `nosuch` not found in $PATH: No such file or directory",
  "level": "error",
  "time": "2026-11-24T19:46:45.339652Z"
}
"#;
        let message = "executable file `nosuch` not found in $PATH: No such file or directory";
        assert_eq!(parse(crun).error.as_deref(), Some(message));
        assert_eq!(parse(crun).warnings, ["cgroup v1 is deprecated"]);
        let youki =
            r#"{"timestamp":"2026-11-24T18:00:00Z","level":"ERROR","fields":{"message":"failed"},"target":"x"}"#;
        assert_eq!(parse(youki).error.as_deref(), Some("failed"));
    }

    #[test]
    fn a_message_that_is_an_entry_itself_is_opened() {
        let text = r#"{
  "msg": "{\n  \"msg\": \"error executing hook `\/bin\/sh` (exit code: 9)\",\n  \"level\": \"error\",\n  \"time\": \"2026-11-24T19:54:38.608479Z\"\n}\n",
  "level": "error",
  "time": "2026-11-24T19:54:38.608500Z"
}
"#;
        assert_eq!(parse(text).error.as_deref(), Some("error executing hook `/bin/sh` (exit code: 9)"));
    }

    #[test]
    fn a_message_of_several_lines_becomes_one() {
        assert_eq!(parse(r#"{"level":"fatal","msg":"one\n\n  two\n"}"#).error.as_deref(), Some("one; two"));
    }

    #[test]
    fn what_is_no_log_line_is_passed_over() {
        assert_eq!(
            parse("Error: hook\n{\"level\":\"error\"}\n{\"level\":7,\"msg\":\"x\"}\n}\n{\n{\n\"x\"\n}\n{"),
            Log::default()
        );
        assert_eq!(read(Path::new("/nonexistent/log.json")), Log::default());
    }

    #[test]
    fn of_a_huge_log_the_end_is_read() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let noise = format!("{}\n", r#"{"level":"error","msg":"noise"}"#).repeat(20_000);
        std::fs::write(file.path(), format!("{noise}{}", r#"{"level":"error","msg":"the reason"}"#)).unwrap();
        assert_eq!(read(file.path()).error.as_deref(), Some("the reason"));
    }
}
