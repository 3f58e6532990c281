//! Verification: every byte is read and compared with digests and sizes.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::File;
use std::io::Seek;

use rustix::fs::FlockOperation;

use crate::hash::{Progress, hash, in_parallel};
use crate::index::Index;
use crate::manifest::ManifestError;
use crate::snapshot::{hold, resolve};
use crate::store::ReadError;
use crate::{Digest, Layer, Reference, SnapshotError, Store};

/// Check inside a layer after the digest, as of a pack's own checksums; returns the fault in words.
/// Called from any thread.
pub type Inner<'a> = &'a (dyn Fn(&Layer, &File) -> Result<(), String> + Sync);

/// Result of a verification.
#[derive(Debug, Default)]
pub struct Report {
    /// Number of verified snapshots.
    pub snapshots: usize,
    /// Number of blobs read.
    pub blobs: usize,
    /// Size of the blobs in bytes.
    pub bytes: u64,
    /// Faults found.
    pub problems: Vec<Problem>,
}

/// A fault.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The place of the fault.
    pub place: String,
    /// The fault in words.
    pub what: String,
    /// Snapshots that cannot be trusted any more.
    pub snapshots: Vec<Digest>,
}

/// Prints a single line.
impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.what)?;
        for (index, snapshot) in self.snapshots.iter().enumerate() {
            write!(f, "{}{}", if index == 0 { " (needed by " } else { ", " }, snapshot.short())?;
        }
        f.write_str(if self.snapshots.is_empty() { "" } else { ")" })
    }
}

impl Store {
    /// Reads all bytes of one snapshot, or of all snapshots, and checks each file of the store. The
    /// snapshots are in use meanwhile. `inner` checks inside layers, `progress` counts the bytes
    /// read.
    ///
    /// # Errors
    /// No such snapshot; the lock cannot be taken. Damage is not an error.
    pub fn verify(
        &self,
        which: Option<&Reference>,
        inner: Option<Inner<'_>>,
        progress: Progress<'_>,
    ) -> Result<Report, SnapshotError> {
        let folders = &self.folders;
        let mut report = Report::default();
        let (entries, _uses) = {
            let _lock = folders.lock(FlockOperation::LockShared)?;
            let index = match folders.index() {
                Ok(index) => index,
                Err(error) if which.is_none() => {
                    report.note("index.json", &error, &[]);
                    return Ok(report);
                }
                Err(error) => return Err(error.into()),
            };
            let wanted = which.map(|reference| resolve(&index, reference)).transpose()?;
            if wanted.is_none() {
                self.check_files(&index, &mut report);
            }
            let entries = index.entries().filter(|entry| wanted.is_none_or(|wanted| entry.digest == wanted));
            let entries: BTreeMap<Digest, u64> = entries.map(|entry| (entry.digest, entry.size)).collect();
            let uses = entries.keys().map(|digest| hold(folders, *digest)).collect::<Result<Vec<_>, _>>()?;
            (entries, uses)
        };
        let mut layers: BTreeMap<Digest, (Layer, Vec<Digest>)> = BTreeMap::new();
        for (digest, size) in entries {
            let manifest = match folders.manifest(digest) {
                Ok(manifest) => manifest,
                // An image stored by another tool.
                Err(ReadError::Manifest { source: ManifestError::Foreign { .. }, .. }) if which.is_none() => continue,
                Err(error) => {
                    report.snapshots += 1;
                    report.note("manifest", &error, &[digest]);
                    continue;
                }
            };
            report.snapshots += 1;
            let found = manifest.bytes().len() as u64;
            if found != size {
                let what = format!("the manifest has {found} bytes, where the index says {size}");
                report.problem("index.json", what, &[digest]);
            }
            if let Err(error) = folders.config(&manifest) {
                report.note("config", &error, &[digest]);
            }
            for layer in manifest.layers() {
                layers.entry(layer.digest).or_insert_with(|| (layer.clone(), Vec::new())).1.push(digest);
            }
        }
        let layers: Vec<(Layer, Vec<Digest>)> = layers.into_values().collect();
        let checked = in_parallel(&layers, |(layer, _)| {
            Ok::<_, std::convert::Infallible>(self.check_layer(layer, inner, progress).err())
        });
        let Ok(checked) = checked;
        for ((layer, snapshots), wrong) in layers.into_iter().zip(checked) {
            report.blobs += 1;
            report.bytes += layer.size;
            if let Some(what) = wrong {
                let snapshots: BTreeSet<Digest> = snapshots.into_iter().collect();
                report.problems.push(Problem {
                    place: layer.digest.to_string(),
                    what,
                    snapshots: snapshots.into_iter().collect(),
                });
            }
        }
        Ok(report)
    }

    fn check_layer(&self, layer: &Layer, inner: Option<Inner<'_>>, progress: Progress<'_>) -> Result<(), String> {
        let mut file = self.folders.blob(layer.digest).map_err(|error| crate::chain(&error))?;
        let found = file.metadata().map_err(|error| error.to_string())?.len();
        if found != layer.size {
            return Err(format!("it has {found} bytes, where the manifest says {}", layer.size));
        }
        let (digest, size) = hash(&mut file, progress).map_err(|error| format!("it cannot be read: {error}"))?;
        if digest != layer.digest || size != layer.size {
            return Err("digest mismatch".to_owned());
        }
        file.rewind().map_err(|error| error.to_string())?;
        inner.map_or(Ok(()), |inner| inner(layer, &file))
    }

    /// Checks the index and the folder of blobs.
    fn check_files(&self, index: &Index, report: &mut Report) {
        let mut names = BTreeSet::new();
        for name in index.entries().filter_map(|entry| entry.name) {
            if !names.insert(name.clone()) {
                report.problem("index.json", format!("{name} stands for several snapshots"), &[]);
            }
        }
        let blobs = &self.folders.blobs;
        let found = match blobs.names() {
            Ok(found) => found,
            Err(error) => return report.problem("blobs/sha256", error.to_string(), &[]),
        };
        for name in found {
            let place = || format!("blobs/sha256/{}", name.to_string_lossy().escape_debug());
            if name.to_str().is_none_or(|name| Digest::from_hex(name).is_err()) {
                report.problem(&place(), "it is no blob".to_owned(), &[]);
            } else if !std::fs::symlink_metadata(blobs.join(&name)).is_ok_and(|metadata| metadata.is_file()) {
                report.problem(&place(), "it is no regular file".to_owned(), &[]);
            }
        }
    }
}

impl Report {
    fn problem(&mut self, place: &str, what: String, snapshots: &[Digest]) {
        self.problems.push(Problem { place: place.to_owned(), what, snapshots: snapshots.to_vec() });
    }

    fn note(&mut self, place: &str, error: &dyn std::error::Error, snapshots: &[Digest]) {
        self.problem(place, crate::chain(error), snapshots);
    }
}
