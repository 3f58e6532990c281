//! Import of a snapshot from an archive into the store. An archive may come from anybody.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read};
use std::path::PathBuf;

use super::{INDEX, LAYOUT};
use crate::draft::Draft;
use crate::folder::FileError;
use crate::hash::copy;
use crate::index::{Index, IndexError};
use crate::manifest::DOCUMENT_LIMIT;
use crate::{
    Digest, IfTaken, Manifest, ManifestError, Name, NameError, Progress, PublishError, Received, Snapshot, Store,
};

/// Most bytes of an extended header: enough for a time and an owner's name.
const EXTENDED_LIMIT: u64 = 64 << 10;
/// Most entries of an archive. A terabyte in packs has 4096.
const ENTRY_LIMIT: usize = 100_000;
const SHOWN: usize = 200;

/// Options of an import.
#[derive(Clone, Debug, Default)]
pub struct Import {
    /// The snapshot's name in the store; `None` for the name in the archive, if there is one.
    pub name: Option<Name>,
    /// Treatment of a name in use.
    pub if_taken: IfTaken,
}

/// Failure to import an archive. The store has nothing of the archive.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The archive cannot be read, or is not a tar archive.
    #[error("the archive cannot be read")]
    Read(#[source] io::Error),
    /// The draft cannot be written.
    #[error(transparent)]
    File(#[from] FileError),
    /// An entry has no place in an OCI archive of a snapshot: a link, a device, a path elsewhere.
    #[error("the archive has {what} in it: {path:?}")]
    Odd {
        /// The kind of entry.
        what: &'static str,
        /// The entry's path, at most 200 characters.
        path: String,
    },
    /// The archive has more entries than any real one.
    #[error("the archive has more than {ENTRY_LIMIT} entries")]
    Endless,
    /// The archive ends too early.
    #[error("the archive is cut off in {path}")]
    CutOff {
        /// The incomplete entry.
        path: String,
    },
    /// A blob's bytes do not match the blob's name.
    #[error("{digest} is damaged in the archive: digest mismatch")]
    Digest {
        /// The blob.
        digest: Digest,
    },
    /// A required part is missing.
    #[error("the archive has no {path}")]
    Missing {
        /// The part.
        path: String,
    },
    /// The layout is of an unknown version.
    #[error("the archive is not an OCI image layout of a version known to this gpusnap")]
    Layout,
    /// The index is not valid.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// The archive has no snapshot, or several.
    #[error("the archive has {count} snapshots")]
    Count {
        /// The number of snapshots.
        count: usize,
    },
    /// The name in the archive is not valid.
    #[error("the name in the archive is not valid")]
    Name(#[from] NameError),
    /// The manifest is not a snapshot's, or belongs to a later version.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The snapshot is incomplete, the name is taken, or the store is damaged.
    #[error(transparent)]
    Publish(#[from] PublishError),
}

impl Store {
    /// Imports a snapshot from an OCI archive, verified as it is read. `progress` counts the bytes
    /// of blobs.
    ///
    /// # Errors
    /// See [`ImportError`].
    pub fn import(&self, source: impl Read, import: Import, progress: Progress<'_>) -> Result<Snapshot, ImportError> {
        let draft = self.draft()?;
        let Unpacked { layout, index, blobs } = unpack(source, &draft, progress)?;
        let missing = |path: &str| ImportError::Missing { path: path.to_owned() };
        let layout: oci_spec::image::OciLayout =
            serde_json::from_slice(&layout.ok_or_else(|| missing(LAYOUT))?).map_err(|_| ImportError::Layout)?;
        if !layout.image_layout_version().starts_with("1.") {
            return Err(ImportError::Layout);
        }
        let index = Index::parse(&index.ok_or_else(|| missing(INDEX))?)?;
        let digests: BTreeSet<Digest> = index.entries().map(|entry| entry.digest).collect();
        let Some(digest) = digests.first().copied().filter(|_| digests.len() == 1) else {
            return Err(ImportError::Count { count: digests.len() });
        };
        if !blobs.contains(&digest) {
            return Err(missing(&super::blob_path(digest)));
        }
        let manifest = draft.files().read(digest.hex(), DOCUMENT_LIMIT);
        let manifest = Manifest::parse(&manifest.map_err(FileError::new("read", draft.files().join(digest.hex())))?)?;
        let name = match import.name {
            Some(name) => Some(name),
            None => index.raw_name(digest).map(str::parse).transpose()?,
        };
        let blobs: BTreeMap<Digest, PathBuf> = blobs.into_iter().map(|blob| (blob, blob.hex().into())).collect();
        // An archive without all blobs is incomplete, even if the store has the missing ones.
        if let Some(blob) = manifest.blobs().find(|blob| !blobs.contains_key(&blob.digest)) {
            return Err(missing(&super::blob_path(blob.digest)));
        }
        Ok(draft.publish_received(Received { name, if_taken: import.if_taken, manifest, blobs })?)
    }
}

#[derive(Default)]
struct Unpacked {
    layout: Option<Vec<u8>>,
    index: Option<Vec<u8>>,
    /// Blobs in the draft, each under its hexadecimal digest.
    blobs: BTreeSet<Digest>,
}

fn unpack(source: impl Read, draft: &Draft, progress: Progress<'_>) -> Result<Unpacked, ImportError> {
    let mut unpacked = Unpacked::default();
    let mut archive = tar::Archive::new(source);
    // Raw entries: extended headers can be of any size, and are handled here.
    for (number, entry) in archive.entries().map_err(ImportError::Read)?.raw(true).enumerate() {
        if number == ENTRY_LIMIT {
            return Err(ImportError::Endless);
        }
        let mut entry = entry.map_err(ImportError::Read)?;
        let path = String::from_utf8_lossy(&entry.header().path_bytes()).into_owned();
        let odd = |what| ImportError::Odd { what, path: path.chars().take(SHOWN).collect() };
        let plain = path.strip_prefix("./").unwrap_or(&path);
        match entry.header().entry_type() {
            tar::EntryType::Regular | tar::EntryType::Continuous => {}
            tar::EntryType::Directory if ["", ".", "blobs", "blobs/sha256"].contains(&plain.trim_end_matches('/')) => {
                continue;
            }
            tar::EntryType::XHeader | tar::EntryType::XGlobalHeader => {
                skip_extended(&mut entry, odd)?;
                continue;
            }
            _ => return Err(odd("an entry that is not a file")),
        }
        let size = entry.header().entry_size().map_err(ImportError::Read)?;
        match plain {
            LAYOUT => read_once(&mut unpacked.layout, &mut entry, size, odd)?,
            INDEX => read_once(&mut unpacked.index, &mut entry, size, odd)?,
            _ => {
                let hex = plain.strip_prefix("blobs/sha256/").ok_or_else(|| odd("an odd file"))?;
                let digest = Digest::from_hex(hex).map_err(|_| odd("a file that is not a blob"))?;
                if !unpacked.blobs.insert(digest) {
                    return Err(odd("a blob twice"));
                }
                unpack_blob(&mut entry, digest, size, draft, progress)?;
            }
        }
    }
    Ok(unpacked)
}

fn read_once(
    into: &mut Option<Vec<u8>>,
    entry: &mut impl Read,
    size: u64,
    odd: impl Fn(&'static str) -> ImportError,
) -> Result<(), ImportError> {
    if size > DOCUMENT_LIMIT as u64 {
        return Err(odd("a document that is too large"));
    }
    let mut bytes = Vec::new();
    entry.read_to_end(&mut bytes).map_err(ImportError::Read)?;
    if into.replace(bytes).is_some() {
        return Err(odd("a document twice"));
    }
    Ok(())
}

fn unpack_blob(
    entry: &mut impl Read,
    digest: Digest,
    size: u64,
    draft: &Draft,
    progress: Progress<'_>,
) -> Result<(), ImportError> {
    let path = draft.files().join(digest.hex());
    let mut file = draft.files().create(digest.hex()).map_err(FileError::new("make", &path))?;
    let mut source = Remembering { source: entry, failed: false };
    let (found, read) = match copy(&mut source, &mut file, progress) {
        Ok(copied) => copied,
        Err(error) if source.failed => return Err(ImportError::Read(error)),
        Err(error) => return Err(FileError::new("write", path)(error).into()),
    };
    if read != size {
        return Err(ImportError::CutOff { path: super::blob_path(digest) });
    }
    if found != digest {
        return Err(ImportError::Digest { digest });
    }
    Ok(())
}

/// Skips an extended header. Such a header may say anything but the path or the size of the next
/// file.
fn skip_extended(entry: &mut impl Read, odd: impl Fn(&'static str) -> ImportError) -> Result<(), ImportError> {
    let mut bytes = Vec::new();
    entry.take(EXTENDED_LIMIT + 1).read_to_end(&mut bytes).map_err(ImportError::Read)?;
    let tells = |key: &[u8]| bytes.windows(key.len()).any(|window| window == key);
    if bytes.len() as u64 > EXTENDED_LIMIT || [&b" path="[..], b" size=", b" GNU.sparse"].into_iter().any(tells) {
        return Err(odd("an extended header"));
    }
    Ok(())
}

/// A source and whether the last read of it failed.
struct Remembering<R> {
    source: R,
    failed: bool,
}

impl<R: Read> Read for Remembering<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let result = self.source.read(buffer);
        self.failed = result.as_ref().is_err_and(|error| error.kind() != io::ErrorKind::Interrupted);
        result
    }
}
