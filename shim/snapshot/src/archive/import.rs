//! From an archive to the store. An archive may come from anybody.

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

/// Extended headers say little: a time, an owner's name.
const EXTENDED_LIMIT: u64 = 64 << 10;
/// A terabyte in packs has 4096.
const ENTRY_LIMIT: usize = 100_000;
const SHOWN: usize = 200;

/// How an archive is imported.
#[derive(Clone, Debug, Default)]
pub struct Import {
    /// Its name in the store; None for the one that the archive says, if any.
    pub name: Option<Name>,
    /// What if the name is taken.
    pub if_taken: IfTaken,
}

/// An archive could not be imported. Nothing of it is in the store.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// It cannot be read, or is no tar archive.
    #[error("the archive cannot be read")]
    Read(#[source] io::Error),
    /// It cannot be written to the draft.
    #[error(transparent)]
    File(#[from] FileError),
    /// Something is in it that an OCI archive of a snapshot does not have: a link, a device, a path elsewhere.
    #[error("the archive has {what} in it: {path:?}")]
    Odd {
        /// What it is.
        what: &'static str,
        /// Where it is, at most its first 200 characters.
        path: String,
    },
    /// It has more entries than any real one.
    #[error("the archive has more than {ENTRY_LIMIT} entries")]
    Endless,
    /// It ends before its end.
    #[error("the archive is cut off in {path}")]
    CutOff {
        /// Where.
        path: String,
    },
    /// A blob is not what its name says.
    #[error("{digest} is damaged in the archive: its bytes are others")]
    Digest {
        /// The blob.
        digest: Digest,
    },
    /// A part that every archive has is not there.
    #[error("the archive has no {path}")]
    Missing {
        /// The part.
        path: String,
    },
    /// Its layout is of a version that is not known.
    #[error("the archive is no OCI image layout of a version that this gpusnap knows")]
    Layout,
    /// Its index cannot be understood.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// It has no snapshot, or several.
    #[error("the archive has {count} snapshots")]
    Count {
        /// How many.
        count: usize,
    },
    /// The name in it is none.
    #[error("the name in the archive is none")]
    Name(#[from] NameError),
    /// What is in it is no snapshot, or one of a later version.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// It is not whole, or its name is taken, or the store is damaged.
    #[error(transparent)]
    Publish(#[from] PublishError),
}

impl Store {
    /// Imports a snapshot from an OCI archive, which is verified while it is read. `progress` is told of bytes of blobs.
    ///
    /// # Errors
    /// What [`ImportError`] says.
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
        // The store may have blobs that the archive lacks. Such an archive is not whole all the same.
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
    /// Each in the draft, under its hexadecimal digest.
    blobs: BTreeSet<Digest>,
}

fn unpack(source: impl Read, draft: &Draft, progress: Progress<'_>) -> Result<Unpacked, ImportError> {
    let mut unpacked = Unpacked::default();
    let mut archive = tar::Archive::new(source);
    // Raw: what is to be done about extended headers, which can be of any size, is decided here.
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
            _ => return Err(odd("something that is no file")),
        }
        let size = entry.header().entry_size().map_err(ImportError::Read)?;
        match plain {
            LAYOUT => read_once(&mut unpacked.layout, &mut entry, size, odd)?,
            INDEX => read_once(&mut unpacked.index, &mut entry, size, odd)?,
            _ => {
                let hex = plain.strip_prefix("blobs/sha256/").ok_or_else(|| odd("a file of something else"))?;
                let digest = Digest::from_hex(hex).map_err(|_| odd("a file that is no blob"))?;
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

/// Extended headers may say what they like, but not where or how long the next file is.
fn skip_extended(entry: &mut impl Read, odd: impl Fn(&'static str) -> ImportError) -> Result<(), ImportError> {
    let mut bytes = Vec::new();
    entry.take(EXTENDED_LIMIT + 1).read_to_end(&mut bytes).map_err(ImportError::Read)?;
    let tells = |key: &[u8]| bytes.windows(key.len()).any(|window| window == key);
    if bytes.len() as u64 > EXTENDED_LIMIT || [&b" path="[..], b" size=", b" GNU.sparse"].into_iter().any(tells) {
        return Err(odd("an extended header"));
    }
    Ok(())
}

/// Knows whether it was the one that failed.
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
