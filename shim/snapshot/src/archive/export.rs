//! Export of a snapshot from the store to an archive.

use std::collections::BTreeSet;
use std::io::{self, Read, Write};

use sha2::{Digest as _, Sha256};

use super::{INDEX, LAYOUT, blob_path};
use crate::folder::FileError;
use crate::index::{Index, IndexError};
use crate::{Digest, Name, Progress, Snapshot};

/// Failure to export a snapshot. The bytes written so far are useless.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// A layer cannot be opened.
    #[error(transparent)]
    File(#[from] FileError),
    /// The archive cannot be written, or a layer cannot be read.
    #[error("cannot write {what} to the archive")]
    Write {
        /// The part of the archive.
        what: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The index of the archive cannot be written.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// A blob's bytes do not match the digest.
    #[error("{digest} is damaged: digest mismatch")]
    Damaged {
        /// The blob.
        digest: Digest,
    },
}

impl Snapshot {
    /// Writes the snapshot as an OCI archive, under `name` if one is given. Equal snapshots give
    /// equal archives. `progress` counts the bytes of layers.
    ///
    /// # Errors
    /// See [`ExportError`].
    pub fn export(&self, name: Option<&Name>, target: impl Write, progress: Progress<'_>) -> Result<(), ExportError> {
        let mut index = Index::empty();
        index.add(self.manifest(), name);
        let mut archive = tar::Builder::new(target);
        let mut add = |path: &str, size: u64, source: &mut dyn Read| {
            let mut header = tar::Header::new_gnu();
            header.set_size(size);
            header.set_mode(0o600);
            header.set_mtime(self.config().created);
            let appended = archive.append_data(&mut header, path, source);
            appended.map_err(|source| ExportError::Write { what: path.to_owned(), source })
        };
        let layout: &[u8] = crate::store::LAYOUT_CONTENT;
        let index = index.to_bytes()?;
        add(LAYOUT, layout.len() as u64, &mut &*layout)?;
        add(INDEX, index.len() as u64, &mut &*index)?;
        let manifest = self.manifest();
        add(&blob_path(manifest.digest()), manifest.bytes().len() as u64, &mut manifest.bytes())?;
        let mut done = BTreeSet::from([manifest.digest()]);
        for layer in manifest.blobs().filter(|layer| done.insert(layer.digest)) {
            let mut source =
                Hashed { source: self.open(layer)?.take(layer.size), hasher: Sha256::new(), read: 0, progress };
            add(&blob_path(layer.digest), layer.size, &mut source)?;
            let digest: [u8; 32] = source.hasher.finalize().into();
            if source.read != layer.size || Digest::from(digest) != layer.digest {
                return Err(ExportError::Damaged { digest: layer.digest });
            }
        }
        let finish = archive.into_inner().and_then(|mut target| target.flush());
        finish.map_err(|source| ExportError::Write { what: "the end".to_owned(), source })
    }
}

struct Hashed<'a, R> {
    source: R,
    hasher: Sha256,
    read: u64,
    progress: Progress<'a>,
}

impl<R: Read> Read for Hashed<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.source.read(buffer)?;
        self.hasher.update(&buffer[..read]);
        self.read += read as u64;
        (self.progress)(read as u64);
        Ok(read)
    }
}
