//! Names of snapshots, and references to snapshots.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::Digest;

/// containerd's limit for identifiers, in characters.
const NAMESPACE_LIMIT: usize = 76;
/// Limit of a DNS label, in characters.
const KUBERNETES_LIMIT: usize = 63;
/// Limit of a registry's tag, in characters.
const NAME_LIMIT: usize = 128;
/// Least digits of a prefix; fewer digits would soon be ambiguous.
const PREFIX_LEAST: usize = 6;

/// Owner of a snapshot: nobody can name a snapshot of another scope.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Scope {
    containerd: String,
    kubernetes: Option<String>,
}

impl Scope {
    /// The scope of a namespace of containerd and, for pods, a namespace of Kubernetes.
    ///
    /// # Errors
    /// A name that is not valid for a namespace of containerd or Kubernetes.
    pub fn new(containerd: &str, kubernetes: Option<&str>) -> Result<Self, NameError> {
        check("the containerd namespace", containerd, NAMESPACE_LIMIT)?;
        if let Some(namespace) = kubernetes {
            check_label(namespace)?;
        }
        Ok(Self { containerd: containerd.to_owned(), kubernetes: kubernetes.map(str::to_owned) })
    }

    /// containerd's namespace.
    #[must_use]
    pub fn containerd(&self) -> &str {
        &self.containerd
    }

    /// The Kubernetes namespace.
    #[must_use]
    pub fn kubernetes(&self) -> Option<&str> {
        self.kubernetes.as_deref()
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.containerd)?;
        self.kubernetes.iter().try_for_each(|namespace| write!(f, "/{namespace}"))
    }
}

impl TryFrom<String> for Scope {
    type Error = NameError;

    fn try_from(given: String) -> Result<Self, NameError> {
        match given.split_once('/') {
            Some((containerd, kubernetes)) => Self::new(containerd, Some(kubernetes)),
            None => Self::new(&given, None),
        }
    }
}

impl From<Scope> for String {
    fn from(scope: Scope) -> Self {
        scope.to_string()
    }
}

/// The name of a snapshot: `NAMESPACE/NAME`, or `NAMESPACE/KUBERNETES-NAMESPACE/NAME` for a pod's.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Name {
    scope: Scope,
    name: String,
}

impl Name {
    /// A name in a scope.
    ///
    /// # Errors
    /// Anything but letters and digits with single `.`, `_`, `-` between them, or more than 128
    /// characters.
    pub fn new(scope: Scope, name: &str) -> Result<Self, NameError> {
        check("the name", name, NAME_LIMIT)?;
        Ok(Self { scope, name: name.to_owned() })
    }

    /// The name's owner.
    #[must_use]
    pub fn scope(&self) -> &Scope {
        &self.scope
    }

    /// The last part of the name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.scope, self.name)
    }
}

impl FromStr for Name {
    type Err = NameError;

    fn from_str(given: &str) -> Result<Self, NameError> {
        let parts: Vec<&str> = given.splitn(4, '/').collect();
        match parts[..] {
            [namespace, name] => Self::new(Scope::new(namespace, None)?, name),
            [namespace, kubernetes, name] => Self::new(Scope::new(namespace, Some(kubernetes))?, name),
            _ => Err(NameError { what: "the name", rule: "is not NAMESPACE/NAME", given: shown(given) }),
        }
    }
}

impl TryFrom<String> for Name {
    type Error = NameError;

    fn try_from(given: String) -> Result<Self, NameError> {
        given.parse()
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.to_string()
    }
}

/// Failure to read a name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} {given:?} {rule}")]
pub struct NameError {
    /// The part at fault.
    pub what: &'static str,
    /// The violated rule.
    pub rule: &'static str,
    /// The given text, at most 100 characters.
    pub given: String,
}

fn shown(given: &str) -> String {
    given.chars().take(100).collect()
}

/// Checks the rule of containerd's identifiers, stricter than the rule of names in an OCI layout.
fn check(what: &'static str, given: &str, limit: usize) -> Result<(), NameError> {
    let error = |rule| Err(NameError { what, rule, given: shown(given) });
    if given.is_empty() {
        return error("is empty");
    }
    if given.len() > limit {
        return error("is too long");
    }
    if !given
        .split(['.', '_', '-'])
        .all(|word| !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_alphanumeric()))
    {
        return error("is not letters and digits with single '.', '_' or '-' between them");
    }
    Ok(())
}

/// Checks the rule of Kubernetes, with several hyphens in a row allowed.
fn check_label(given: &str) -> Result<(), NameError> {
    let error = |rule| Err(NameError { what: "the Kubernetes namespace", rule, given: shown(given) });
    if given.is_empty() || given.len() > KUBERNETES_LIMIT {
        return error("is not 1 to 63 characters long");
    }
    let inside = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    if !given.bytes().all(inside) || given.starts_with('-') || given.ends_with('-') {
        return error("is not lower-case letters and digits with '-' between them");
    }
    Ok(())
}

/// Reference to a snapshot. Written as the name, the digest, or the first digits of the digest, six
/// at least.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Reference {
    /// By name.
    Name(Name),
    /// By the digest of its manifest.
    Digest(Digest),
    /// By the first hexadecimal digits of the manifest's digest.
    Prefix(String),
}

/// Failure to read a reference.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReferenceError {
    /// The text has a slash, and is not a name.
    #[error(transparent)]
    Name(#[from] NameError),
    /// The text has no slash, and is not a digest.
    #[error("{given:?} is neither NAMESPACE/NAME, nor a digest, nor its first digits (six at least)")]
    Neither {
        /// The given text, at most 100 characters.
        given: String,
    },
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(given: &str) -> Result<Self, ReferenceError> {
        if given.contains('/') {
            return Ok(Self::Name(given.parse()?));
        }
        let hex = given.strip_prefix("sha256:").unwrap_or(given);
        if let Ok(digest) = Digest::from_hex(hex) {
            return Ok(Self::Digest(digest));
        }
        let digits = hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        if !digits || !(PREFIX_LEAST..64).contains(&hex.len()) {
            return Err(ReferenceError::Neither { given: shown(given) });
        }
        Ok(Self::Prefix(hex.to_owned()))
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => name.fmt(f),
            Self::Digest(digest) => digest.fmt(f),
            Self::Prefix(prefix) => f.write_str(prefix),
        }
    }
}

impl From<Name> for Reference {
    fn from(name: Name) -> Self {
        Self::Name(name)
    }
}

impl From<Digest> for Reference {
    fn from(digest: Digest) -> Self {
        Self::Digest(digest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_written_as_they_are_read() {
        for given in ["default/vit", "k8s.io/team-a/vit.2", "k8s.io/a--b/x_1", "A/B"] {
            assert_eq!(given.parse::<Name>().unwrap().to_string(), given);
        }
        let name: Name = "k8s.io/team-a/vit".parse().unwrap();
        assert_eq!(
            (name.scope().containerd(), name.scope().kubernetes(), name.name()),
            ("k8s.io", Some("team-a"), "vit")
        );
    }

    #[test]
    fn what_could_lead_elsewhere_is_no_name() {
        let long = format!("default/{}", "x".repeat(129));
        let namespace = format!("{}/x", "n".repeat(77));
        for given in [
            "",
            "/",
            "vit",
            "default/",
            "/vit",
            "../vit",
            "default/..",
            "default/.",
            "a/../b",
            "a/b/c/d",
            "a//b",
            "a/b\0",
            "a/b\n",
            "a/b c",
            "a/-b",
            "a/b-",
            "a/b..c",
            "a/\u{e9}",
            "k8s.io/Team/x",
            "k8s.io/-a/x",
            &long,
            &namespace,
        ] {
            assert!(given.parse::<Name>().is_err(), "{given:?}");
            assert!(serde_json::from_value::<Name>(given.into()).is_err(), "{given:?}");
        }
    }

    #[test]
    fn a_name_of_one_scope_is_none_of_another() {
        let scope = Scope::new("k8s.io", Some("team-a")).unwrap();
        assert!(Name::new(scope.clone(), "../team-b/x").is_err());
        assert!(Name::new(scope, "x").is_ok());
        assert!(Scope::new("default/x", None).is_err());
        assert!(Scope::new("default", Some("a/b")).is_err());
    }

    #[test]
    fn a_snapshot_is_asked_for_by_name_digest_or_first_digits() {
        let digest = Digest::of(b"");
        let read = |given: &str| given.parse::<Reference>();
        assert_eq!(read("a/b").unwrap(), Reference::Name("a/b".parse().unwrap()));
        assert_eq!(read(&digest.to_string()).unwrap(), digest.into());
        assert_eq!(read(&digest.hex()).unwrap(), digest.into());
        assert_eq!(read(&digest.short()).unwrap(), Reference::Prefix("e3b0c44298fc".into()));
        assert_eq!(read("sha256:e3b0c4").unwrap(), Reference::Prefix("e3b0c4".into()));
        for given in ["", "e3b0c", "vit", "../..", "E3B0C4", "a/.."] {
            assert!(read(given).is_err(), "{given}");
        }
    }
}
