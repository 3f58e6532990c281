//! `index.json`: the snapshots of a store and their names.

use std::collections::HashMap;

use oci_spec::image::{Descriptor, ImageIndex, ImageIndexBuilder, MediaType, SCHEMA_VERSION};

use crate::manifest::{DOCUMENT_LIMIT, to_bytes};
use crate::{ARTIFACT_TYPE, Digest, Manifest, Name};

/// The annotation for names, from the image specification.
pub(crate) const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// Failure to read or to extend an index.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    /// The index is too large to be read back.
    #[error("the index is larger than {DOCUMENT_LIMIT} bytes")]
    TooLarge,
    /// The index is not JSON, or a field is missing or of a wrong type.
    #[error("the index is not valid")]
    Json(#[source] serde_json::Error),
    /// The index is of another version of the image specification.
    #[error("the index is of schema version {found}, where {SCHEMA_VERSION} is known")]
    Schema {
        /// The index's version.
        found: u32,
    },
}

/// An index. Entries of other tools are kept unchanged.
#[derive(Clone, Debug)]
pub struct Index(ImageIndex);

/// An entry of the index that may be a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The manifest's digest.
    pub digest: Digest,
    /// The manifest's size, in bytes.
    pub size: u64,
    /// The snapshot's name, if the annotation holds a valid one.
    pub name: Option<Name>,
    /// True if the entry has the artifact type of snapshots. Tools that copy images may drop the
    /// type.
    pub certain: bool,
}

impl Index {
    pub(crate) fn empty() -> Self {
        let index = ImageIndexBuilder::default()
            .schema_version(SCHEMA_VERSION)
            .media_type(MediaType::ImageIndex)
            .manifests(Vec::new());
        Self(index.build().expect("every required field is set above"))
    }

    /// Reads an index.
    ///
    /// # Errors
    /// An index that is too large, of another version, or not valid.
    pub fn parse(bytes: &[u8]) -> Result<Self, IndexError> {
        if bytes.len() > DOCUMENT_LIMIT {
            return Err(IndexError::TooLarge);
        }
        let index: ImageIndex = serde_json::from_slice(bytes).map_err(IndexError::Json)?;
        if index.schema_version() != SCHEMA_VERSION {
            return Err(IndexError::Schema { found: index.schema_version() });
        }
        Ok(Self(index))
    }

    /// The index as bytes for [`Index::parse`]. Equal indices give equal bytes.
    ///
    /// # Errors
    /// An index that is too large to be read back.
    pub fn to_bytes(&self) -> Result<Vec<u8>, IndexError> {
        let bytes = to_bytes(&self.0).map_err(IndexError::Json)?;
        if bytes.len() > DOCUMENT_LIMIT {
            return Err(IndexError::TooLarge);
        }
        Ok(bytes)
    }

    pub(crate) fn descriptors(&self) -> &[Descriptor] {
        self.0.manifests()
    }

    /// Entries that may be snapshots.
    pub fn entries(&self) -> impl Iterator<Item = Entry> {
        self.0.manifests().iter().filter_map(entry)
    }

    /// The digest of the snapshot with this name.
    pub(crate) fn named(&self, name: &Name) -> Option<Digest> {
        self.entries().find(|entry| entry.name.as_ref() == Some(name)).map(|entry| entry.digest)
    }

    pub(crate) fn contains(&self, digest: Digest) -> bool {
        self.entries().any(|entry| entry.digest == digest)
    }

    /// The name of a snapshot in the index, valid or not.
    pub(crate) fn raw_name(&self, digest: Digest) -> Option<&str> {
        let of_digest = |descriptor: &&Descriptor| entry(descriptor).is_some_and(|entry| entry.digest == digest);
        let mut annotations =
            self.0.manifests().iter().filter(of_digest).filter_map(|found| found.annotations().as_ref());
        annotations.find_map(|annotations| annotations.get(REF_NAME)).map(String::as_str)
    }

    pub(crate) fn names_of(&self, digest: Digest) -> Vec<Name> {
        self.entries().filter(|entry| entry.digest == digest).filter_map(|entry| entry.name).collect()
    }

    /// Adds a snapshot. Another snapshot with the same name loses the name, and stays without.
    pub(crate) fn add(&mut self, manifest: &Manifest, name: Option<&Name>) {
        if let Some(name) = name {
            self.take_name(name);
        }
        let digest = manifest.digest();
        // A snapshot without a name needs one entry; a snapshot with names needs none but theirs.
        self.retain(|entry| entry.digest != digest || entry.name.is_some());
        if name.is_none() && self.contains(digest) {
            return;
        }
        let mut descriptor = Descriptor::new(MediaType::ImageManifest, manifest.bytes().len() as u64, digest);
        descriptor.set_artifact_type(Some(MediaType::from(ARTIFACT_TYPE)));
        if let Some(name) = name {
            descriptor.set_annotations(Some(HashMap::from([(REF_NAME.to_owned(), name.to_string())])));
        }
        self.change(|descriptors| descriptors.push(descriptor));
    }

    fn change(&mut self, change: impl FnOnce(&mut Vec<Descriptor>)) {
        let mut descriptors = self.0.manifests().clone();
        change(&mut descriptors);
        self.0.set_manifests(descriptors);
    }

    /// Keeps the entries of other tools, and snapshots for which `keep` is true.
    fn retain(&mut self, keep: impl Fn(&Entry) -> bool) {
        self.change(|descriptors| descriptors.retain(|descriptor| entry(descriptor).is_none_or(|entry| keep(&entry))));
    }

    /// Removes a name; the snapshot stays, without a name unless it has others.
    pub(crate) fn take_name(&mut self, name: &Name) {
        let Some(digest) = self.named(name) else { return };
        if self.names_of(digest).len() > 1 {
            return self.retain(|entry| entry.name.as_ref() != Some(name));
        }
        let of_name = |descriptor: &Descriptor| entry(descriptor).and_then(|entry| entry.name).as_ref() == Some(name);
        self.change(|descriptors| {
            for descriptor in descriptors.iter_mut().filter(|descriptor| of_name(descriptor)) {
                let mut annotations = descriptor.annotations().clone().unwrap_or_default();
                annotations.remove(REF_NAME);
                descriptor.set_annotations((!annotations.is_empty()).then_some(annotations));
            }
        });
    }

    /// Removes a snapshot with all its names.
    pub(crate) fn remove(&mut self, digest: Digest) {
        self.retain(|entry| entry.digest != digest);
    }
}

fn entry(descriptor: &Descriptor) -> Option<Entry> {
    let artifact = descriptor.artifact_type().as_ref().map(AsRef::as_ref);
    if descriptor.media_type() != &MediaType::ImageManifest
        || artifact.is_some_and(|found: &str| found != ARTIFACT_TYPE)
    {
        return None;
    }
    let name = descriptor.annotations().as_ref().and_then(|annotations| annotations.get(REF_NAME));
    Some(Entry {
        digest: descriptor.digest().try_into().ok()?,
        size: descriptor.size(),
        name: name.and_then(|name| name.parse().ok()),
        certain: artifact.is_some(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(text: &str) -> Manifest {
        let golden = include_str!("testdata/manifest.json");
        Manifest::parse(golden.replace("\"a\":\"1\"", &format!("\"a\":\"{text}\"")).as_bytes()).unwrap()
    }

    fn name(name: &str) -> Name {
        name.parse().unwrap()
    }

    #[test]
    fn the_golden_file_is_what_is_written() {
        let golden = include_bytes!("testdata/index.json");
        let mut index = Index::empty();
        index.add(&manifest("1"), Some(&name("default/vit")));
        index.add(&manifest("2"), None);
        assert_eq!(String::from_utf8_lossy(&index.to_bytes().unwrap()), String::from_utf8_lossy(golden));
        assert_eq!(Index::parse(golden).unwrap().entries().collect::<Vec<_>>(), index.entries().collect::<Vec<_>>());
    }

    #[test]
    fn a_name_moves_to_the_new_snapshot_and_the_old_one_stays() {
        let (one, two) = (manifest("1"), manifest("2"));
        let mut index = Index::empty();
        index.add(&one, Some(&name("a/x")));
        index.add(&two, Some(&name("a/x")));
        assert_eq!(index.named(&name("a/x")), Some(two.digest()));
        assert!(index.contains(one.digest()) && index.names_of(one.digest()).is_empty());

        index.add(&one, Some(&name("a/y")));
        index.add(&one, Some(&name("a/z")));
        index.add(&one, None);
        assert_eq!(index.names_of(one.digest()), [name("a/y"), name("a/z")]);
        assert_eq!(index.entries().count(), 3);
        index.take_name(&name("a/y"));
        assert_eq!(index.names_of(one.digest()), [name("a/z")]);
        index.remove(one.digest());
        assert_eq!(index.entries().map(|entry| entry.digest).collect::<Vec<_>>(), [two.digest()]);
    }

    #[test]
    fn lines_of_others_are_kept_and_names_that_are_none_are_not_taken() {
        let text = include_str!("testdata/index.json").replace(
            "\"artifactType\":\"application/vnd.gpusnap.snapshot.v1+json\"",
            "\"artifactType\":\"else/where\"",
        );
        let mut index = Index::parse(text.as_bytes()).unwrap();
        assert_eq!(index.entries().count(), 0);
        index.add(&manifest("3"), Some(&name("default/vit")));
        index.remove(manifest("1").digest());
        assert_eq!(index.descriptors().len(), 3);
        let odd = include_str!("testdata/index.json").replace("default/vit", "../../etc");
        assert!(Index::parse(odd.as_bytes()).unwrap().entries().all(|entry| entry.name.is_none()));
    }

    #[test]
    fn what_is_no_index_is_refused() {
        assert!(matches!(Index::parse(b"{}"), Err(IndexError::Json(_))));
        let later = include_str!("testdata/index.json").replace("\"schemaVersion\":2", "\"schemaVersion\":9");
        assert!(matches!(Index::parse(later.as_bytes()), Err(IndexError::Schema { found: 9 })));
        assert!(matches!(Index::parse(&vec![b' '; DOCUMENT_LIMIT + 1]), Err(IndexError::TooLarge)));
    }
}
