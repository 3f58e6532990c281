//! The request to give up an operation.

use std::sync::{Arc, Mutex, PoisonError};

/// Tells an operation that nobody wants its result any more. Clones tell the same operation.
#[derive(Clone, Debug, Default)]
pub struct Cancel {
    reason: Arc<Mutex<Option<String>>>,
}

/// An operation was given up on request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cancelled: {reason}")]
pub struct Cancelled {
    /// Says on whose account, such as "the client is gone".
    pub reason: String,
}

impl Cancel {
    /// Asks the operation to give up. The first reason counts.
    pub fn cancel(&self, reason: &str) {
        self.reason().get_or_insert_with(|| reason.to_owned());
    }

    /// Returns an error once the operation is to be given up. Called between steps, never in the middle of one.
    ///
    /// # Errors
    /// When [`Cancel::cancel`] was called.
    pub fn check(&self) -> Result<(), Cancelled> {
        match &*self.reason() {
            None => Ok(()),
            Some(reason) => Err(Cancelled { reason: reason.clone() }),
        }
    }

    fn reason(&self) -> std::sync::MutexGuard<'_, Option<String>> {
        self.reason.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_to_give_up_counts() {
        let cancel = Cancel::default();
        cancel.check().unwrap();
        cancel.clone().cancel("the client is gone");
        cancel.cancel("the container was killed");
        assert_eq!(cancel.check().unwrap_err().to_string(), "cancelled: the client is gone");
    }
}
