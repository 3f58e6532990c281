//! Reachability: the blobs that the entries of an index need.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::time::SystemTime;

use oci_spec::image::{Descriptor, ImageIndex, ImageManifest};

use crate::Digest;
use crate::folder::{FileError, unless_missing};
use crate::index::Index;
use crate::store::{Folders, ReadError};

/// Deepest nesting of indexes: real layouts have no more.
const DEEPEST: usize = 4;

/// Blobs needed by each entry of the index, by the entry's digest.
#[derive(Debug, Default)]
pub(crate) struct Reach {
    pub(crate) trees: BTreeMap<Digest, BTreeSet<Digest>>,
    /// Manifests that cannot be read, so that their blobs are unknown.
    pub(crate) unreadable: BTreeMap<Digest, ReadError>,
}

impl Reach {
    /// Walks the index. Requires the store's lock.
    pub(crate) fn of(folders: &Folders, index: &Index) -> Self {
        let mut reach = Self::default();
        for descriptor in index.descriptors() {
            // Blobs with other digests lie outside of our folder.
            let Ok(top) = Digest::try_from(descriptor.digest()) else { continue };
            let mut blobs = BTreeSet::new();
            if let Err(error) = walk(folders, descriptor, 0, &mut blobs) {
                reach.unreadable.insert(top, error);
            }
            reach.trees.entry(top).or_default().extend(blobs);
        }
        reach
    }

    /// Number of entries that need each blob.
    pub(crate) fn counts(&self) -> BTreeMap<Digest, usize> {
        let mut counts = BTreeMap::new();
        for blob in self.trees.values().flatten() {
            *counts.entry(*blob).or_default() += 1;
        }
        counts
    }
}

fn walk(
    folders: &Folders,
    descriptor: &Descriptor,
    depth: usize,
    blobs: &mut BTreeSet<Digest>,
) -> Result<(), ReadError> {
    let Ok(digest) = Digest::try_from(descriptor.digest()) else { return Ok(()) };
    blobs.insert(digest);
    let invalid = |source| ReadError::Manifest { digest, source: crate::ManifestError::Json(source) };
    match descriptor.media_type().as_ref() {
        "application/vnd.oci.image.manifest.v1+json" | "application/vnd.docker.distribution.manifest.v2+json" => {
            let manifest: ImageManifest = serde_json::from_slice(&folders.document(digest)?).map_err(invalid)?;
            let all = std::iter::once(manifest.config()).chain(manifest.layers());
            blobs.extend(all.filter_map(|blob| Digest::try_from(blob.digest()).ok()));
        }
        "application/vnd.oci.image.index.v1+json" | "application/vnd.docker.distribution.manifest.list.v2+json"
            if depth < DEEPEST =>
        {
            let index: ImageIndex = serde_json::from_slice(&folders.document(digest)?).map_err(invalid)?;
            for descriptor in index.manifests() {
                walk(folders, descriptor, depth + 1, blobs)?;
            }
        }
        _ => {}
    }
    Ok(())
}

/// A file of a blob.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BlobFile {
    /// Size in bytes.
    pub(crate) size: u64,
    /// Time of the last write.
    pub(crate) written: SystemTime,
}

/// All blobs of the store. Other files are left out.
pub(crate) fn blob_files(folders: &Folders) -> Result<BTreeMap<Digest, BlobFile>, FileError> {
    let blobs = &folders.blobs;
    let mut files = BTreeMap::new();
    for name in blobs.names().map_err(FileError::new("read", blobs.path()))? {
        let Some(digest) = name.to_str().and_then(|name| Digest::from_hex(name).ok()) else { continue };
        let look = || -> io::Result<Option<BlobFile>> {
            let Some(metadata) = unless_missing(std::fs::symlink_metadata(blobs.join(&name)))? else { return Ok(None) };
            Ok(metadata.is_file().then_some(BlobFile { size: metadata.len(), written: metadata.modified()? }))
        };
        files.extend(look().map_err(FileError::new("look at", blobs.join(&name)))?.map(|file| (digest, file)));
    }
    Ok(files)
}
