//! Errors of the helper: text, as on the way to the shim.

use std::error::Error;
use std::fmt::{self, Display};

pub(super) type Result<T> = std::result::Result<T, Failure>;

/// Failure of a step, on one line.
#[derive(Debug)]
pub(super) struct Failure {
    message: String,
}

impl Failure {
    pub(super) fn new(message: impl Into<String>) -> Self {
        Self { message: one_line(&message.into()) }
    }

    /// Returns "cannot ACTION: " and the error with its sources.
    pub(super) fn because(action: impl Display, error: &dyn Error) -> Self {
        Self::new(format!("cannot {action}: {}", chain(error)))
    }
}

impl Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

// Failure is no Error, to leave room for this impl: libcontainer has a dozen error types.
impl<E: Error> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::new(chain(&error))
    }
}

/// Adds the current action to an error.
pub(super) trait Context<T> {
    /// Returns "cannot ACTION: " and the error.
    fn context<A: Display>(self, action: impl FnOnce() -> A) -> Result<T>;
}

impl<T, E: Error> Context<T> for std::result::Result<T, E> {
    fn context<A: Display>(self, action: impl FnOnce() -> A) -> Result<T> {
        self.map_err(|error| Failure::because(action(), &error))
    }
}

/// Returns an error and its sources. libcontainer's errors often repeat the source's message.
pub(super) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let words = error.to_string();
        if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
        source = error.source();
    }
    text
}

/// libcontainer's phrases around the message of a failed process.
const WRAPPERS: [&str; 5] = [
    "error in executing process : ",
    "failed to create container: ",
    "exec process failed with error ",
    "intermediate process error ",
    "invalid executable: ",
];

/// Removes libcontainer's wrappers and the ends of lines. One process passes its error to another
/// as text in a buffer, often not full, hence the zeros.
fn one_line(text: &str) -> String {
    let mut text = text.replace('\0', "");
    for wrapper in WRAPPERS {
        text = text.replace(wrapper, "");
    }
    text.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Layer(&'static str, Option<Box<Layer>>);

    impl Display for Layer {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(self.0)
        }
    }

    impl Error for Layer {
        fn source(&self) -> Option<&(dyn Error + 'static)> {
            self.1.as_deref().map(|layer| layer as &(dyn Error + 'static))
        }
    }

    #[test]
    fn sources_are_told_once_each() {
        let error = Layer("io error", Some(Box::new(Layer("io error", Some(Box::new(Layer("no space left", None)))))));
        assert_eq!(Failure::because("write x", &error).to_string(), "cannot write x: io error: no space left");
    }

    #[test]
    fn a_failure_is_one_line_without_wrapping() {
        let failure = Failure::new("exec process failed with error one\n\n  two\0\0");
        assert_eq!(failure.to_string(), "one; two");
    }
}
