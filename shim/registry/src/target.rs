//! Location of a snapshot in a registry.

use std::net::IpAddr;

use oci_client::Reference;

/// A repository of a registry, with a tag or digest.
#[derive(Clone, Debug)]
pub struct Target {
    pub(crate) reference: Reference,
    pub(crate) plain_http: bool,
}

/// Failure to read a target.
#[derive(Debug, thiserror::Error)]
#[error(
    "{text:?} names no place in a registry ({reason}): write HOST[:PORT]/REPOSITORY[:TAG] or HOST[:PORT]/REPOSITORY@DIGEST"
)]
pub struct TargetError {
    text: String,
    reason: String,
}

impl Target {
    /// Reads `HOST[:PORT]/REPOSITORY[:TAG|@DIGEST]`; the default tag is `latest`, as everywhere
    /// else.
    ///
    /// TLS is left out for this machine itself (`localhost`, loopback addresses), and with
    /// `plain_http`.
    ///
    /// # Errors
    /// A text of another form.
    pub fn parse(text: &str, plain_http: bool) -> Result<Self, TargetError> {
        let refuse = |reason: &str| TargetError { text: text.to_owned(), reason: reason.to_owned() };
        // The grammar of references has no IPv6 hosts.
        if text.starts_with('[') {
            return Err(refuse("an IPv6 address cannot be a registry's name; use localhost or a host name"));
        }
        let (host, _) = text.split_once('/').ok_or_else(|| refuse("no registry"))?;
        if !(host.contains(['.', ':']) || host == "localhost") {
            return Err(refuse("no registry"));
        }
        let reference: Reference = text.parse().map_err(|error| refuse(&format!("{error}")))?;
        if reference.digest().is_some_and(|digest| !digest.starts_with("sha256:")) {
            return Err(refuse("only sha256 digests are supported"));
        }
        let plain_http = plain_http || is_this_machine(reference.resolve_registry());
        Ok(Self { reference, plain_http })
    }

    /// Host and port of the connection.
    #[must_use]
    pub fn registry(&self) -> &str {
        self.reference.resolve_registry()
    }

    /// The tag or digest for the registry's API.
    pub(crate) fn version(&self) -> &str {
        self.reference.digest().or(self.reference.tag()).unwrap_or("latest")
    }

    /// The last part of the repository's name.
    #[must_use]
    pub fn short_name(&self) -> &str {
        self.repository().rsplit('/').next().unwrap_or_default()
    }

    pub(crate) fn repository(&self) -> &str {
        self.reference.repository()
    }

    pub(crate) fn digest(&self) -> Option<&str> {
        self.reference.digest()
    }

    pub(crate) fn is_loopback(&self) -> bool {
        is_this_machine(self.registry())
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.reference.fmt(out)
    }
}

fn is_this_machine(registry: &str) -> bool {
    let host = registry.rsplit_once(':').map_or(registry, |(host, _)| host);
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_without_a_tag_is_latest() {
        let target = Target::parse("localhost:5000/team/vit", false).unwrap();
        assert_eq!(target.version(), "latest");
        assert_eq!(target.registry(), "localhost:5000");
        assert_eq!(target.to_string(), "localhost:5000/team/vit:latest");
    }

    #[test]
    fn only_this_machine_is_spoken_to_without_tls() {
        for (text, plain) in [
            ("localhost/a", true),
            ("127.0.0.1:5000/a:b", true),
            ("ghcr.io/a/b:c", false),
            ("localhost.example.org/a", false),
            ("10.0.0.1:5000/a", false),
        ] {
            assert_eq!(Target::parse(text, false).unwrap().plain_http, plain, "{text}");
        }
        assert!(Target::parse("10.0.0.1:5000/a", true).unwrap().plain_http);
    }

    #[test]
    fn what_names_no_registry_is_refused() {
        for text in
            ["vit", "library/vit:1", "ghcr.io/UPPER", "ghcr.io/a:b:c", "", "/", "ghcr.io/../../etc", "[::1]:5000/a"]
        {
            assert!(Target::parse(text, false).is_err(), "{text}");
        }
    }

    #[test]
    fn a_digest_pins_a_target() {
        let digest = format!("sha256:{}", "a".repeat(64));
        let target = Target::parse(&format!("ghcr.io/a/b@{digest}"), false).unwrap();
        assert_eq!(target.version(), digest);
        assert_eq!(target.digest(), Some(&*digest));
    }
}
