//! The pointer: the entry of a checkpoint directory that leads to the memory.

use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{Digest, Name};

const VERSION: u32 = 1;
const PATH_LIMIT: usize = 4096;
/// Most characters of a reference: a host, a repository of 255 characters and a digest fit easily.
const REGISTRY_LIMIT: usize = 512;

/// Location of the snapshot that belongs to a checkpoint directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", try_from = "Raw")]
pub struct Pointer {
    version: u32,
    digest: Digest,
    store: PathBuf,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<Name>,
    #[serde(skip_serializing_if = "Option::is_none")]
    registry: Option<String>,
}

#[derive(Deserialize)]
struct Raw {
    version: u32,
    digest: Digest,
    store: PathBuf,
    #[serde(default)]
    name: Option<Name>,
    #[serde(default)]
    registry: Option<String>,
}

/// Failure to follow a pointer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PointerError {
    /// The pointer is of a later version of gpusnap.
    #[error("the pointer to the snapshot is of version {found}, and this gpusnap knows {VERSION}: use a newer one")]
    Version {
        /// The pointer's version.
        found: u32,
    },
    /// The store is not an absolute path without `.` and `..`.
    #[error("{} is not a place for a store", path.display())]
    Store {
        /// The path found.
        path: PathBuf,
    },
    /// The reference to a registry is too long or has odd characters.
    #[error("{given:?} is not a reference into a registry")]
    Registry {
        /// The reference found, at most 100 characters.
        given: String,
    },
}

impl Pointer {
    /// A pointer to the snapshot with this manifest digest in the store at `store`. `registry` is a
    /// reference from which a store without the snapshot can pull it.
    ///
    /// # Errors
    /// A store that is not a plain absolute path; a reference that is not valid.
    pub fn new(
        digest: Digest,
        store: &Path,
        name: Option<Name>,
        registry: Option<String>,
    ) -> Result<Self, PointerError> {
        Raw { version: VERSION, digest, store: store.to_owned(), name, registry }.try_into()
    }

    /// The digest of the snapshot's manifest.
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// The store of the publication.
    #[must_use]
    pub fn store(&self) -> &Path {
        &self.store
    }

    /// The name of the snapshot at the publication.
    #[must_use]
    pub fn name(&self) -> Option<&Name> {
        self.name.as_ref()
    }

    /// The reference for a pull from a registry.
    #[must_use]
    pub fn registry(&self) -> Option<&str> {
        self.registry.as_deref()
    }
}

impl TryFrom<Raw> for Pointer {
    type Error = PointerError;

    fn try_from(raw: Raw) -> Result<Self, PointerError> {
        let Raw { version, digest, store, name, registry } = raw;
        if version != VERSION {
            return Err(PointerError::Version { found: version });
        }
        let plain = store.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
        let printable = store.to_str().is_some_and(|text| !text.chars().any(char::is_control));
        if !store.is_absolute() || !plain || !printable || store.as_os_str().len() > PATH_LIMIT {
            return Err(PointerError::Store { path: store });
        }
        if let Some(given) = &registry
            && (given.is_empty() || given.len() > REGISTRY_LIMIT || !given.bytes().all(|byte| byte.is_ascii_graphic()))
        {
            return Err(PointerError::Registry { given: given.chars().take(100).collect() });
        }
        Ok(Self { version, digest, store, name, registry })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOLDEN: &str = include_str!("testdata/pointer.json");

    #[test]
    fn the_golden_file_is_what_is_written() {
        let pointer: Pointer = serde_json::from_str(GOLDEN).unwrap();
        assert_eq!(pointer.digest(), Digest::of(b""));
        assert_eq!(pointer.store(), Path::new("/var/lib/gpusnap"));
        assert_eq!(pointer.name().unwrap().to_string(), "k8s.io/team-a/vit");
        assert_eq!(pointer.registry(), Some("registry.example/models/vit:warm"));
        assert_eq!(serde_json::to_string(&pointer).unwrap(), GOLDEN.trim_end());
    }

    #[test]
    fn a_pointer_that_leads_nowhere_good_is_refused() {
        let golden = |from: &str, to: &str| {
            assert!(GOLDEN.contains(from));
            serde_json::from_str::<Pointer>(&GOLDEN.replace(from, to)).unwrap_err().to_string()
        };
        assert!(golden("\"version\":1", "\"version\":2").contains("use a newer one"));
        for path in ["gpusnap", "/var/../etc", "", "/var/lib/gpusnap\\nx"] {
            assert!(golden("/var/lib/gpusnap", path).contains("not a place"), "{path}");
        }
        golden("sha256:e3", "sha256:..");
        golden("k8s.io/team-a/vit", "k8s.io/../vit");
        golden("registry.example/models/vit:warm", "a b");
        golden("registry.example/models/vit:warm", &"a".repeat(600));
    }
}
