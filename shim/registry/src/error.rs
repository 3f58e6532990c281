//! What a conversation with a registry can fail with.

use std::path::PathBuf;

use crate::credentials::CredentialsError;

/// Why a registry did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// Credentials are configured but cannot be had.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    /// No HTTP client could be made: no trusted certificates, or a proxy variable that is no URL.
    #[error("cannot prepare connections to {registry}")]
    Client {
        /// Host and port.
        registry: String,
        /// What the HTTP library says.
        #[source]
        source: reqwest::Error,
    },
    /// The token service refused.
    #[error("{registry} does not accept these credentials ({message}): try `docker login {registry}`")]
    Login {
        /// Host and port.
        registry: String,
        /// What the token service said, shortened.
        message: String,
    },
    /// 401 or 403.
    #[error("{registry} refuses access to {what}{message}: try `docker login {registry}`")]
    Refused {
        /// Host and port.
        registry: String,
        /// What was asked for.
        what: String,
        /// What the registry said, with its separator; may be empty.
        message: String,
    },
    /// 404.
    #[error("{registry} has no {what}{message}")]
    NotFound {
        /// Host and port.
        registry: String,
        /// What was asked for.
        what: String,
        /// What the registry said, with its separator; may be empty.
        message: String,
    },
    /// Another status that is no success, after all attempts that made sense.
    #[error("{registry} answers {status} to {what}{message}{}", tried(*attempts))]
    Status {
        /// Host and port.
        registry: String,
        /// What was asked for.
        what: String,
        /// The HTTP status.
        status: u16,
        /// What the registry said, with its separator; may be empty.
        message: String,
        /// How often it was asked.
        attempts: u32,
    },
    /// The connection broke, or none came about.
    #[error("no working connection to {registry} for {what}{}", tried(*attempts))]
    Connection {
        /// Host and port.
        registry: String,
        /// What was asked for.
        what: String,
        /// How often it was tried.
        attempts: u32,
        /// What the HTTP library says.
        #[source]
        source: reqwest::Error,
    },
    /// Its certificate is none that this machine trusts.
    #[error("{registry} cannot be trusted: make its authority one of this machine's (`update-ca-certificates`)")]
    Certificate {
        /// Host and port.
        registry: String,
        /// What the HTTP library says.
        #[source]
        source: reqwest::Error,
    },
    /// Nothing moved for too long.
    #[error("{registry} stalls: no byte of {what} moved for {seconds} s{}", tried(*attempts))]
    Stalled {
        /// Host and port.
        registry: String,
        /// What was asked for.
        what: String,
        /// The limit, in seconds.
        seconds: u64,
        /// How often it was tried.
        attempts: u32,
    },
    /// The connection ended in the middle.
    #[error("{registry} ended {what} after {got} of {size} bytes{}", tried(*attempts))]
    Short {
        /// Host and port.
        registry: String,
        /// What was asked for.
        what: String,
        /// Bytes that came.
        got: u64,
        /// Bytes that should have come.
        size: u64,
        /// How often it was tried.
        attempts: u32,
    },
    /// Content that is not what was named, or an answer that makes no sense.
    #[error("{registry} sent {what} that is wrong: {reason}; nothing of it was kept")]
    Wrong {
        /// Host and port.
        registry: String,
        /// What was asked for.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A blob of this machine is not what its name says.
    #[error("blob {digest} in the store is damaged and was not sent: run `gpusnap verify`")]
    Damaged {
        /// Its digest.
        digest: String,
    },
    /// A file of this machine.
    #[error("cannot {action} {path}")]
    File {
        /// What was tried: a verb.
        action: &'static str,
        /// Which file.
        path: PathBuf,
        /// What the system says.
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
