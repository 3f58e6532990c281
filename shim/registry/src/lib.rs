//! Snapshots to and from OCI registries.
//!
//! A snapshot is an OCI image manifest and its blobs; [`pull`] and [`push`] move what the other side lacks, several blobs at a
//! time, each verified while it streams. Nothing a registry says is trusted: sizes are capped before memory or disk is spent,
//! every wait ends when nothing moves for a while ([`Patience`]), and every failure is tried again a bounded number of times.
//!
//! A crate of its own, because it links HTTP and TLS, which a shim process beside each container must not carry.

mod credentials;
mod download;
mod error;
mod progress;
mod pull;
mod push;
mod session;
mod target;
#[cfg(test)]
mod testing;
mod upload;

pub use credentials::{CredentialsError, credentials};
pub use error::RegistryError;
pub use progress::{Meter, Totals};
pub use pull::{Pull, PullError, pull};
pub use push::{PushError, push};
pub use session::{Options, Patience};
pub use target::{Target, TargetError};

/// What fuzz targets call that nobody else outside has a use for.
#[cfg(fuzzing)]
pub mod fuzzing {
    use std::time::Duration;

    use reqwest::header::HeaderValue;

    /// What an answer's body says of an error.
    #[must_use]
    pub fn said(body: &[u8]) -> Option<String> {
        crate::session::said(body)
    }

    /// A `Retry-After` header.
    #[must_use]
    pub fn seconds(header: &[u8]) -> Option<Duration> {
        crate::session::seconds(&HeaderValue::from_bytes(header).ok()?)
    }

    /// Foreign text as it is shown.
    #[must_use]
    pub fn one_line(text: &str) -> String {
        crate::session::one_line(text)
    }
}
