//! Tests of the store as a whole.

mod archive;
pub(crate) mod child;
mod concurrency;
mod crash;
mod damage;
mod full;
mod publication;
mod removal;
mod tools;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::{Config, Digest, Host, IfTaken, Name, NewLayer, NewSnapshot, PublishError, Reference, Snapshot, Store};

pub(super) struct World {
    _folder: tempfile::TempDir,
    pub(super) store: Store,
}

impl World {
    pub(super) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("store")).unwrap();
        Self { _folder: folder, store }
    }

    pub(super) fn publish(&self, name: &str, layers: &[&[u8]]) -> Snapshot {
        publish(&self.store, name, layers).unwrap()
    }

    pub(super) fn blob(&self, digest: Digest) -> PathBuf {
        self.store.folders.blobs.join(digest.hex())
    }

    /// The lines of a verification of everything.
    pub(super) fn problems(&self) -> Vec<String> {
        problems(&self.store)
    }

    pub(super) fn names(&self) -> Vec<String> {
        names(&self.store)
    }
}

pub(super) fn problems(store: &Store) -> Vec<String> {
    store.verify(None, None, &|_| {}).unwrap().problems.iter().map(ToString::to_string).collect()
}

pub(super) fn names(store: &Store) -> Vec<String> {
    store.list().unwrap().iter().flat_map(|listed| &listed.names).map(ToString::to_string).collect()
}

pub(super) fn name(name: &str) -> Name {
    name.parse().unwrap()
}

pub(super) fn reference(name: &str) -> Reference {
    name.parse().unwrap()
}

/// A snapshot of layers with this content; an empty name stands for no name.
pub(super) fn new(given: &str, paths: Vec<PathBuf>) -> NewSnapshot {
    let layer = |path| NewLayer {
        media_type: crate::GPU_MEMORY_TYPE.to_owned(),
        path,
        digest: None,
        annotations: BTreeMap::new(),
    };
    NewSnapshot {
        name: (!given.is_empty()).then(|| name(given)),
        if_taken: IfTaken::Move,
        config: Config::new(1_795_000_000, "web", "libcontainer", Host::default()),
        layers: paths.into_iter().map(layer).collect(),
        subject: None,
        annotations: BTreeMap::new(),
    }
}

pub(super) fn publish(store: &Store, name: &str, layers: &[&[u8]]) -> Result<Snapshot, PublishError> {
    let draft = store.draft()?;
    let paths: Vec<PathBuf> = (0..layers.len()).map(|n| PathBuf::from(format!("pack-{n}"))).collect();
    for (path, content) in paths.iter().zip(layers) {
        std::fs::write(draft.folder().join(path), content)
            .map_err(crate::FileError::new("write", draft.folder().join(path)))?;
    }
    draft.publish(new(name, paths), &|_| {})
}

pub(super) fn mode(path: &Path) -> u32 {
    use std::os::unix::fs::PermissionsExt;
    std::fs::symlink_metadata(path).unwrap().permissions().mode() & 0o777
}
