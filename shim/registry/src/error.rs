//! Errors of the communication with a registry.

use std::path::PathBuf;

use crate::credentials::CredentialsError;

/// Failure of a request to a registry.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// Configured credentials cannot be read.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    /// The HTTP client cannot be made: no trusted certificates, or a proxy variable with an invalid
    /// URL.
    #[error("cannot prepare connections to {registry}")]
    Client {
        /// Host and port.
        registry: String,
        /// The HTTP library's error.
        #[source]
        source: reqwest::Error,
    },
    /// The token service refused.
    #[error("{registry} does not accept these credentials ({message}): try `docker login {registry}`")]
    Login {
        /// Host and port.
        registry: String,
        /// The token service's message, shortened.
        message: String,
    },
    /// 401 or 403.
    #[error("{registry} refuses access to {what}{message}: try `docker login {registry}`")]
    Refused {
        /// Host and port.
        registry: String,
        /// The requested content.
        what: String,
        /// The registry's message after a separator; may be empty.
        message: String,
    },
    /// 404.
    #[error("{registry} has no {what}{message}")]
    NotFound {
        /// Host and port.
        registry: String,
        /// The requested content.
        what: String,
        /// The registry's message after a separator; may be empty.
        message: String,
    },
    /// Another status of failure, after all reasonable attempts.
    #[error("{registry} answers {status} to {what}{message}{}", tried(*attempts))]
    Status {
        /// Host and port.
        registry: String,
        /// The requested content.
        what: String,
        /// The HTTP status.
        status: u16,
        /// The registry's message after a separator; may be empty.
        message: String,
        /// The number of attempts.
        attempts: u32,
    },
    /// The connection broke, or could not be established.
    #[error("no working connection to {registry} for {what}{}", tried(*attempts))]
    Connection {
        /// Host and port.
        registry: String,
        /// The requested content.
        what: String,
        /// The number of attempts.
        attempts: u32,
        /// The HTTP library's error.
        #[source]
        source: reqwest::Error,
    },
    /// This machine does not trust the registry's certificate.
    #[error("{registry} cannot be trusted: make its authority one of this machine's (`update-ca-certificates`)")]
    Certificate {
        /// Host and port.
        registry: String,
        /// The HTTP library's error.
        #[source]
        source: reqwest::Error,
    },
    /// No byte moved for too long.
    #[error("{registry} stalls: no byte of {what} moved for {seconds} s{}", tried(*attempts))]
    Stalled {
        /// Host and port.
        registry: String,
        /// The requested content.
        what: String,
        /// The limit, in seconds.
        seconds: u64,
        /// The number of attempts.
        attempts: u32,
    },
    /// The connection ended early.
    #[error("{registry} ended {what} after {got} of {size} bytes{}", tried(*attempts))]
    Short {
        /// Host and port.
        registry: String,
        /// The requested content.
        what: String,
        /// Bytes received.
        got: u64,
        /// Bytes expected.
        size: u64,
        /// The number of attempts.
        attempts: u32,
    },
    /// The content does not match its digest, or the answer makes no sense.
    #[error("{registry} sent {what} that is wrong: {reason}; nothing of it was kept")]
    Wrong {
        /// Host and port.
        registry: String,
        /// The requested content.
        what: String,
        /// The fault.
        reason: String,
    },
    /// A blob in the store does not match its digest.
    #[error("blob {digest} in the store is damaged and was not sent: run `gpusnap verify`")]
    Damaged {
        /// The blob's digest.
        digest: String,
    },
    /// A file on this machine failed.
    #[error("cannot {action} {path}")]
    File {
        /// The failed operation: a verb.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: std::io::Error,
    },
}

impl RegistryError {
    pub(crate) fn after(mut self, number: u32) -> Self {
        match &mut self {
            Self::Status { attempts, .. }
            | Self::Connection { attempts, .. }
            | Self::Stalled { attempts, .. }
            | Self::Short { attempts, .. } => *attempts = number,
            _ => {}
        }
        self
    }
}

fn tried(attempts: u32) -> String {
    if attempts > 1 { format!(" ({attempts} attempts)") } else { String::new() }
}
