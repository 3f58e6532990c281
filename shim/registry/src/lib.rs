//! Transfer of snapshots to and from OCI registries.
//!
//! A snapshot is an OCI image manifest and its blobs. [`pull`] and [`push`] move the missing blobs,
//! several at a time, each verified while it streams. No registry is trusted: sizes are capped
//! before memory or disk is spent, every wait ends if nothing moves for a while ([`Patience`]), and
//! the number of retries is bounded.
//!
//! A separate crate for the sake of HTTP and TLS: a shim process beside each container must not
//! carry them.

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

/// Functions for fuzz targets only.
#[cfg(fuzzing)]
pub mod fuzzing {
    use std::time::Duration;

    use reqwest::header::HeaderValue;

    /// The error message in an answer's body.
    #[must_use]
    pub fn said(body: &[u8]) -> Option<String> {
        crate::session::said(body)
    }

    /// Parses a `Retry-After` header.
    #[must_use]
    pub fn seconds(header: &[u8]) -> Option<Duration> {
        crate::session::seconds(&HeaderValue::from_bytes(header).ok()?)
    }

    /// Prepares foreign text for display.
    #[must_use]
    pub fn one_line(text: &str) -> String {
        crate::session::one_line(text)
    }
}
