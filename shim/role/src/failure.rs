//! Errors on their way from one process to another.

use serde::{Deserialize, Serialize};

/// An error with its sources, as text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[error("{message}")]
pub struct Failure {
    message: String,
    source: Option<Box<Failure>>,
}

impl Failure {
    /// Copies an error and its sources.
    #[must_use]
    pub fn of(error: &(dyn std::error::Error + 'static)) -> Self {
        Self { message: error.to_string(), source: error.source().map(|source| Box::new(Self::of(source))) }
    }

    /// Returns a failure without a source.
    #[must_use]
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), source: None }
    }

    /// Returns a failure with this one as the source.
    #[must_use]
    pub fn within(self, message: impl Into<String>) -> Self {
        Self { message: message.into(), source: Some(Box::new(self)) }
    }
}

/// Gives an error a message about the failed action.
pub trait Because<T> {
    /// Returns the same result, with the error as source of a failure with `message`.
    ///
    /// # Errors
    /// Fails like the result itself.
    fn because(self, message: &str) -> Result<T, Failure>;
}

impl<T, E: std::error::Error + 'static> Because<T> for Result<T, E> {
    fn because(self, message: &str) -> Result<T, Failure> {
        self.map_err(|error| Failure::of(&error).within(message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_cross_with_their_error() {
        let inner = Failure::new("no space").within("cannot write a.img");
        let outer: Failure = serde_json::from_str(&serde_json::to_string(&Failure::of(&inner)).unwrap()).unwrap();
        assert_eq!(outer, inner);
        assert_eq!(std::error::Error::source(&outer).unwrap().to_string(), "no space");
    }
}
