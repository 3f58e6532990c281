//! Publication: a draft becomes a snapshot at once, or nothing of it does.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use oci_spec::image::Descriptor;
use rustix::fs::FlockOperation;
use rustix::io::Errno;

use crate::draft::Draft;
use crate::folder::FileError;
use crate::hash::{Progress, hash, in_parallel};
use crate::snapshot::Snapshot;
use crate::store::{Durability, ReadError};
use crate::{CONFIG_TYPE, Config, ConfigError, Digest, Layer, Manifest, ManifestError, Name};

/// What becomes of a name that stands for another snapshot already.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IfTaken {
    /// It moves to the new one. The other stays, to be asked for by its digest, until it is pruned.
    #[default]
    Move,
    /// Nothing is published.
    Refuse,
}

/// A snapshot whose layers lie in a draft.
#[derive(Debug)]
pub struct NewSnapshot {
    /// Its name. Without one it is asked for by its digest, and goes with the next prune.
    pub name: Option<Name>,
    /// What if the name is taken.
    pub if_taken: IfTaken,
    /// What it was made from.
    pub config: Config,
    /// Its layers, in the order of the manifest.
    pub layers: Vec<NewLayer>,
    /// What it belongs to, as a rule the image of the application.
    pub subject: Option<Descriptor>,
    /// What else is said of it.
    pub annotations: BTreeMap<String, String>,
}

/// A file of a draft that becomes a layer.
#[derive(Debug)]
pub struct NewLayer {
    /// What it is.
    pub media_type: String,
    /// Where it is in the draft.
    pub path: PathBuf,
    /// Its digest if who wrote it has computed it, which is believed.
    pub digest: Option<Digest>,
    /// What else is said of it.
    pub annotations: BTreeMap<String, String>,
}

/// A snapshot that comes from elsewhere, by registry or archive: its manifest as it is, and the blobs in a draft. Blobs that are
/// not among them must be in the store already; see [`Draft::reuse`].
#[derive(Debug)]
pub struct Received {
    /// Its name.
    pub name: Option<Name>,
    /// What if the name is taken.
    pub if_taken: IfTaken,
    /// The manifest.
    pub manifest: Manifest,
    /// Where in the draft a blob is. Whoever received it has checked its digest.
    pub blobs: BTreeMap<Digest, PathBuf>,
}

/// A draft could not be published. The store is as it was.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// A file is out of reach, or the disk is full.
    #[error(transparent)]
    File(#[from] FileError),
    /// The store is damaged.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// A layer is not in the draft.
    #[error("{} is not a file in the draft", path.display())]
    Outside {
        /// The layer.
        path: PathBuf,
    },
    /// The config cannot be written.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The manifest cannot be written.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The name stands for another snapshot.
    #[error("{name} stands for {digest} already")]
    Taken {
        /// The name.
        name: Name,
        /// What it stands for.
        digest: Digest,
    },
    /// A blob is neither in the draft nor in the store.
    #[error("{digest} is missing")]
    Missing {
        /// The blob.
        digest: Digest,
    },
    /// A blob in the draft is not as long as the manifest says.
    #[error("{digest} has {found} bytes, where the manifest says {expected}")]
    Size {
        /// The blob.
        digest: Digest,
        /// How long it is.
        found: u64,
        /// How long it should be.
        expected: u64,
    },
}

impl Draft {
    /// Makes a snapshot of what is in the draft. The rest of the draft goes. What comes back is in use until it is dropped,
    /// so that no quota takes it before anybody could use it. `progress` is told of bytes that are hashed.
    ///
    /// Layers are moved by renaming, never copied, and no byte of them is changed: they may be mapped by live processes. Of
    /// equal blobs the one that is in the store already stays.
    ///
    /// # Errors
    /// What [`PublishError`] says; the draft goes.
    pub fn publish(self, new: NewSnapshot, progress: Progress<'_>) -> Result<Snapshot, PublishError> {
        let layers = in_parallel(&new.layers, |layer| self.look_at(layer, progress))?;
        let mut blobs: BTreeMap<Digest, PathBuf> =
            layers.iter().zip(&new.layers).map(|(layer, new)| (layer.digest, new.path.clone())).collect();
        let config = new.config.to_bytes()?;
        let config_layer = Layer {
            media_type: CONFIG_TYPE.to_owned(),
            digest: Digest::of(&config),
            size: config.len() as u64,
            annotations: BTreeMap::new(),
        };
        blobs.insert(config_layer.digest, self.write_document(&config)?);
        let manifest = Manifest::build(&config_layer, &layers, new.subject, &new.annotations)?;
        self.publish_received(Received { name: new.name, if_taken: new.if_taken, manifest, blobs })
    }

    /// Publishes what came from elsewhere.
    ///
    /// # Errors
    /// What [`PublishError`] says; the draft goes.
    pub fn publish_received(self, received: Received) -> Result<Snapshot, PublishError> {
        let Received { name, if_taken, manifest, mut blobs } = received;
        let digest = manifest.digest();
        blobs.insert(digest, self.write_document(manifest.bytes())?);
        let sizes: BTreeMap<Digest, u64> = manifest
            .blobs()
            .map(|blob| (blob.digest, blob.size))
            .chain([(digest, manifest.bytes().len() as u64)])
            .collect();
        blobs.retain(|blob, _| sizes.contains_key(blob));
        let files: Vec<(Digest, PathBuf)> = blobs.into_iter().collect();
        in_parallel(&files, |(blob, path)| self.make_ready(*blob, path, sizes[blob]))?;
        let here: BTreeSet<Digest> = files.iter().map(|(blob, _)| *blob).collect();

        let folders = &self.store.folders;
        let _lock = folders.lock(FlockOperation::LockExclusive)?;
        let mut index = folders.index()?;
        if if_taken == IfTaken::Refuse
            && let Some(name) = &name
            && let Some(other) = index.named(name).filter(|other| *other != digest)
        {
            return Err(PublishError::Taken { name: name.clone(), digest: other });
        }
        for (blob, size) in sizes.iter().filter(|(blob, _)| !here.contains(blob)) {
            if folders.blob_size(*blob)? != Some(*size) {
                return Err(PublishError::Missing { digest: *blob });
            }
        }
        // Before it can be seen it is in use.
        let snapshot_use = Snapshot::begin_use(folders, digest)?;
        let mut placed = Placed { draft: &self, blobs: Vec::new() };
        for (blob, path) in &files {
            placed.place(*blob, path, sizes[blob])?;
        }
        if self.store.durability == Durability::Machine {
            folders.blobs.sync().map_err(FileError::new("flush", folders.blobs.path()))?;
        }
        let config = folders.config(&manifest)?;
        index.add(&manifest, name.as_ref());
        folders.write_index(&index, false)?;
        placed.blobs.clear();
        if self.store.durability == Durability::Machine {
            folders.root.sync().map_err(FileError::new("flush", folders.root.path()))?;
        }
        Ok(Snapshot::new(std::sync::Arc::clone(folders), index.names_of(digest), manifest, config, snapshot_use))
    }

    fn look_at(&self, new: &NewLayer, progress: Progress<'_>) -> Result<Layer, PublishError> {
        let mut file = self.file(&new.path)?;
        let at = |action| FileError::new(action, self.files().join(&new.path));
        let (digest, size) = match new.digest {
            Some(digest) => (digest, file.metadata().map_err(at("look at"))?.len()),
            None => hash(&mut file, progress).map_err(at("read"))?,
        };
        Ok(Layer { media_type: new.media_type.clone(), digest, size, annotations: new.annotations.clone() })
    }

    fn file(&self, path: &Path) -> Result<std::fs::File, PublishError> {
        self.files().file(self.inner(path)).map_err(|source| match Errno::from_io_error(&source) {
            // Over `..`, or over a link.
            Some(Errno::XDEV | Errno::LOOP) => PublishError::Outside { path: path.to_owned() },
            _ => FileError::new("open", self.files().join(path))(source).into(),
        })
    }

    /// A file of the draft is as long as it should be, for root alone, and on the disk if that is asked for.
    fn make_ready(&self, digest: Digest, path: &Path, expected: u64) -> Result<(), PublishError> {
        let file = self.file(path)?;
        let at = |action| FileError::new(action, self.files().join(path));
        let metadata = file.metadata().map_err(at("look at"))?;
        if metadata.len() != expected {
            return Err(PublishError::Size { digest, found: metadata.len(), expected });
        }
        if metadata.permissions().mode() & 0o7777 != 0o600 {
            file.set_permissions(std::fs::Permissions::from_mode(0o600)).map_err(at("close to others"))?;
        }
        if self.store.durability == Durability::Machine {
            file.sync_all().map_err(at("flush"))?;
        }
        Ok(())
    }

    /// Under a name that nobody else has chosen for a file in the draft.
    fn write_document(&self, bytes: &[u8]) -> Result<PathBuf, FileError> {
        let write = || -> io::Result<PathBuf> {
            let mut file = tempfile::Builder::new().prefix(".document-").tempfile_in(self.folder())?;
            file.write_all(bytes)?;
            file.as_file().sync_all()?;
            Ok(file.keep()?.1)
        };
        write().map_err(FileError::new("write a document to", self.folder()))
    }
}

/// Blobs that were not there and that no index names yet. Dropped, they are removed.
struct Placed<'a> {
    draft: &'a Draft,
    blobs: Vec<Digest>,
}

impl Placed<'_> {
    fn place(&mut self, digest: Digest, path: &Path, size: u64) -> Result<(), PublishError> {
        let folders = &self.draft.store.folders;
        let before = folders.blob_size(digest);
        if matches!(before, Ok(Some(found)) if found == size) {
            return Ok(());
        }
        // Missing or damaged: what the draft has is right, and takes its place at once.
        let target = folders.blobs.join(digest.hex());
        self.draft
            .files()
            .rename(self.draft.inner(path), &folders.blobs, digest.hex())
            .map_err(FileError::new("move a blob to", target))?;
        if matches!(before, Ok(None)) {
            self.blobs.push(digest);
        }
        Ok(())
    }
}

impl Drop for Placed<'_> {
    fn drop(&mut self) {
        let blobs = &self.draft.store.folders.blobs;
        for digest in &self.blobs {
            if let Err(error) = blobs.unlink(digest.hex()) {
                tracing::warn!("{} is left: {error}", blobs.join(digest.hex()).display());
            }
        }
    }
}
