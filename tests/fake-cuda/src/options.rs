//! Options of a program's driver beside the usual behaviour: the text of `FAKE_CUDA`.

use crate::control::Operation;

/// Frequency of an injected failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) code: u32,
    pub(crate) always: bool,
}

/// The parsed text. `README.md` describes each option.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Options {
    pub(crate) lock_ms: u64,
    pub(crate) checkpoint_ms: u64,
    pub(crate) restore_ms: u64,
    pub(crate) lock_fails: u32,
    pub(crate) checkpoint_fails: Option<Failure>,
    pub(crate) restore_fails: Option<Failure>,
    pub(crate) fail_state: bool,
    pub(crate) crash_at: Option<Operation>,
    pub(crate) hang_at: Option<(Operation, Option<u64>)>,
    pub(crate) poll: bool,
}

impl Options {
    /// Reads the text without allocating: the driver's thread does so while other threads may be
    /// held inside malloc. The error is the first unreadable part.
    pub(crate) fn parse(text: &str) -> Result<Self, &str> {
        let mut options = Self::default();
        for part in text.split([',', '\n', ' ']).map(str::trim).filter(|part| !part.is_empty()) {
            options.set(part).ok_or(part)?;
        }
        Ok(options)
    }

    fn set(&mut self, part: &str) -> Option<()> {
        let (name, value) = part.split_once('=').unwrap_or((part, ""));
        match name {
            "lock-ms" => self.lock_ms = value.parse().ok()?,
            "checkpoint-ms" => self.checkpoint_ms = value.parse().ok()?,
            "restore-ms" => self.restore_ms = value.parse().ok()?,
            "lock-fails" => self.lock_fails = value.parse().ok()?,
            "checkpoint-fails" => self.checkpoint_fails = Some(failure(value)?),
            "restore-fails" => self.restore_fails = Some(failure(value)?),
            "fail-state" if value.is_empty() => self.fail_state = true,
            "crash-at" => self.crash_at = Some(changing(value)?),
            "hang-at" => {
                let (operation, limit) =
                    value.split_once(':').map_or((value, None), |(name, limit)| (name, Some(limit)));
                let limit = match limit {
                    Some(limit) => Some(limit.parse().ok()?),
                    None => None,
                };
                self.hang_at = Some((Operation::from_name(operation)?, limit));
            }
            "poll" if value.is_empty() => self.poll = true,
            _ => return None,
        }
        Some(())
    }
}

/// `CODE` or `CODE:always`.
fn failure(value: &str) -> Option<Failure> {
    let (code, always) = match value.split_once(':') {
        Some((code, "always")) => (code, true),
        Some(_) => return None,
        None => (value, false),
    };
    Some(Failure { code: code.parse().ok().filter(|code| *code != 0)?, always })
}

fn changing(value: &str) -> Option<Operation> {
    Operation::from_name(value).filter(|operation| !matches!(operation, Operation::State | Operation::RestoreThread))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_option_of_the_readme_is_read() {
        let text = "lock-ms=1,checkpoint-ms=2,restore-ms=3,lock-fails=4,checkpoint-fails=801,restore-fails=999:always,\
                    fail-state,crash-at=restore,hang-at=lock:250,poll";
        let expected = Options {
            lock_ms: 1,
            checkpoint_ms: 2,
            restore_ms: 3,
            lock_fails: 4,
            checkpoint_fails: Some(Failure { code: 801, always: false }),
            restore_fails: Some(Failure { code: 999, always: true }),
            fail_state: true,
            crash_at: Some(Operation::Restore),
            hang_at: Some((Operation::Lock, Some(250))),
            poll: true,
        };
        assert_eq!(Options::parse(text), Ok(expected));
    }

    #[test]
    fn nothing_is_the_default_and_what_is_unknown_is_named() {
        assert_eq!(Options::parse(" \n"), Ok(Options::default()));
        assert_eq!(Options::parse("poll,chekpoint-ms=3"), Err("chekpoint-ms=3"));
        assert_eq!(Options::parse("crash-at=state"), Err("crash-at=state"));
    }
}
