//! Request to give up an operation.

use std::sync::{Arc, Mutex, PoisonError};

/// Handle for giving up an operation with an unwanted result. Clones concern the same operation.
#[derive(Clone, Debug, Default)]
pub struct Cancel {
    reason: Arc<Mutex<Option<String>>>,
}

/// Error of an operation given up on request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cancelled: {reason}")]
pub struct Cancelled {
    /// Reason for the request, such as "the client is gone".
    pub reason: String,
}

impl Cancel {
    /// Asks the operation to give up. The first reason counts.
    pub fn cancel(&self, reason: &str) {
        self.reason().get_or_insert_with(|| reason.to_owned());
    }

    /// Returns an error once the operation is to be given up. Called only between steps.
    ///
    /// # Errors
    /// Fails after a call of [`Cancel::cancel`].
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
