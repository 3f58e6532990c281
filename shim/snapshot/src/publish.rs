//! Publication: a draft becomes a snapshot as a whole, or not at all.

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

/// Treatment of a name that stands for another snapshot already.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IfTaken {
    /// The name moves to the new snapshot. The other snapshot stays, reachable by digest, until the
    /// next prune.
    #[default]
    Move,
    /// The publication fails.
    Refuse,
}

/// A snapshot with all layers in a draft.
#[derive(Debug)]
pub struct NewSnapshot {
    /// The snapshot's name. Without a name the snapshot is reachable by digest, until the next
    /// prune.
    pub name: Option<Name>,
    /// Treatment of a name in use.
    pub if_taken: IfTaken,
    /// The snapshot's origin.
    pub config: Config,
    /// The layers, in the order of the manifest.
    pub layers: Vec<NewLayer>,
    /// The image or artifact to which the snapshot belongs, as a rule the application's image.
    pub subject: Option<Descriptor>,
    /// Further annotations.
    pub annotations: BTreeMap<String, String>,
}

/// A file of a draft that becomes a layer.
#[derive(Debug)]
pub struct NewLayer {
    /// Kind of content.
    pub media_type: String,
    /// Path in the draft.
    pub path: PathBuf,
    /// The digest if the writer has computed one; not checked again.
    pub digest: Option<Digest>,
    /// Further annotations.
    pub annotations: BTreeMap<String, String>,
}

/// A snapshot from a registry or an archive: the unchanged manifest, and blobs in a draft. All
/// other blobs must be in the store already; see [`Draft::reuse`].
#[derive(Debug)]
pub struct Received {
    /// The snapshot's name.
    pub name: Option<Name>,
    /// Treatment of a name in use.
    pub if_taken: IfTaken,
    /// The manifest.
    pub manifest: Manifest,
    /// Paths of the blobs in the draft. The receiver has checked the digests.
    pub blobs: BTreeMap<Digest, PathBuf>,
}

/// Failure to publish a draft. The store is unchanged.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// A file cannot be opened, or the disk is full.
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
        /// The snapshot that has the name.
        digest: Digest,
    },
    /// A blob is neither in the draft nor in the store.
    #[error("{digest} is missing")]
    Missing {
        /// The blob.
        digest: Digest,
    },
    /// A blob in the draft has another size than in the manifest.
    #[error("{digest} has {found} bytes, where the manifest says {expected}")]
    Size {
        /// The blob.
        digest: Digest,
        /// The blob's size in bytes.
        found: u64,
        /// The size in the manifest.
        expected: u64,
    },
}

impl Draft {
    /// Publishes the draft as a snapshot; all other files of the draft are removed. The returned
    /// snapshot is in use until it is dropped, and thus safe from a quota. `progress` counts the
    /// hashed bytes.
    ///
    /// Layers are moved by renaming, never copied, and never changed: live processes may have them
    /// mapped. A blob that is in the store already stays there.
    ///
    /// # Errors
    /// See [`PublishError`]; the draft is removed.
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

    /// Publishes a snapshot received from elsewhere.
    ///
    /// # Errors
    /// See [`PublishError`]; the draft is removed.
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
        // Mark the snapshot as in use before anybody can see it.
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
            // The path leads through `..` or a link.
            Some(Errno::XDEV | Errno::LOOP) => PublishError::Outside { path: path.to_owned() },
            _ => FileError::new("open", self.files().join(path))(source).into(),
        })
    }

    /// Checks a file's size, closes it to other users, and flushes it if durability requires that.
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

    /// Writes a document under an unused name in the draft.
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

/// New blobs that no index names yet. A drop removes the blobs.
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
        // Missing or damaged: the draft's blob is right, and replaces it atomically.
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
