//! The manifest of a snapshot: an OCI image manifest that lists the layers.

use std::collections::{BTreeMap, HashMap};

use oci_spec::image::{Descriptor, ImageManifest, ImageManifestBuilder, MediaType, SCHEMA_VERSION};

use crate::{ARTIFACT_TYPE, CONFIG_TYPE, Digest};

/// Most bytes of a manifest, a config or an index; a larger document is refused unread. A manifest
/// of a terabyte in packs has about 1 MiB.
pub const DOCUMENT_LIMIT: usize = 4 << 20;

/// A layer: a blob with a media type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    /// Kind of content.
    pub media_type: String,
    /// Digest of the bytes.
    pub digest: Digest,
    /// Size in bytes.
    pub size: u64,
    /// Further annotations.
    pub annotations: BTreeMap<String, String>,
}

/// The manifest of a snapshot, as bytes and parsed.
#[derive(Clone, Debug)]
pub struct Manifest {
    bytes: Vec<u8>,
    digest: Digest,
    config: Layer,
    layers: Vec<Layer>,
    subject: Option<Descriptor>,
    annotations: BTreeMap<String, String>,
}

/// Failure to read a manifest.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// The manifest is larger than any real one.
    #[error("the manifest is larger than {DOCUMENT_LIMIT} bytes")]
    TooLarge,
    /// The manifest is not JSON, or a field is missing or of a wrong type.
    #[error("the manifest is not valid")]
    Json(#[source] serde_json::Error),
    /// The manifest is of another version of the image specification.
    #[error("the manifest is of schema version {found}, where {SCHEMA_VERSION} is known")]
    Schema {
        /// The manifest's version.
        found: u32,
    },
    /// The manifest belongs to another image or artifact, or to a later version of gpusnap.
    #[error("the manifest is of {found:?}, and not of a snapshot that this gpusnap knows ({ARTIFACT_TYPE})")]
    Foreign {
        /// The artifact type found, at most 100 characters.
        found: String,
    },
    /// A blob's digest is not SHA-256.
    #[error("the manifest names a blob that cannot be checked")]
    Digest(#[from] crate::DigestError),
    /// The sizes of the blobs overflow.
    #[error("the sizes in the manifest overflow")]
    Sizes,
    /// Two sizes are given for one blob.
    #[error("the manifest gives {digest} two sizes")]
    Contradiction {
        /// The blob.
        digest: Digest,
    },
}

impl Manifest {
    /// Reads a manifest.
    ///
    /// # Errors
    /// Anything but the manifest of a snapshot.
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        if bytes.len() > DOCUMENT_LIMIT {
            return Err(ManifestError::TooLarge);
        }
        let manifest: ImageManifest = serde_json::from_slice(bytes).map_err(ManifestError::Json)?;
        if manifest.schema_version() != SCHEMA_VERSION {
            return Err(ManifestError::Schema { found: manifest.schema_version() });
        }
        let foreign = |found: &str| ManifestError::Foreign { found: found.chars().take(100).collect() };
        let artifact = manifest.artifact_type().as_ref().map_or("no artifact type", AsRef::as_ref);
        if artifact != ARTIFACT_TYPE {
            return Err(foreign(artifact));
        }
        if manifest.config().media_type().as_ref() != CONFIG_TYPE {
            return Err(foreign(manifest.config().media_type().as_ref()));
        }
        let read = Self {
            digest: Digest::of(bytes),
            bytes: bytes.to_vec(),
            config: Layer::read(manifest.config())?,
            layers: manifest.layers().iter().map(Layer::read).collect::<Result<_, _>>()?,
            subject: manifest.subject().clone(),
            annotations: sorted(manifest.annotations().as_ref()),
        };
        read.check_sizes()?;
        Ok(read)
    }

    /// Checks that each blob has one size, and that the sum of all sizes does not overflow.
    fn check_sizes(&self) -> Result<(), ManifestError> {
        let mut sizes = BTreeMap::new();
        let mut total = self.bytes.len() as u64;
        for layer in self.blobs() {
            if *sizes.entry(layer.digest).or_insert(layer.size) != layer.size {
                return Err(ManifestError::Contradiction { digest: layer.digest });
            }
            total = total.checked_add(layer.size).ok_or(ManifestError::Sizes)?;
        }
        Ok(())
    }

    /// The manifest of these parts. Equal parts give equal bytes.
    pub(crate) fn build(
        config: &Layer,
        layers: &[Layer],
        subject: Option<Descriptor>,
        annotations: &BTreeMap<String, String>,
    ) -> Result<Self, ManifestError> {
        let mut builder = ImageManifestBuilder::default()
            .schema_version(SCHEMA_VERSION)
            .media_type(MediaType::ImageManifest)
            .artifact_type(MediaType::from(ARTIFACT_TYPE))
            .config(config.write())
            .layers(layers.iter().map(Layer::write).collect::<Vec<_>>());
        if let Some(subject) = subject {
            builder = builder.subject(subject);
        }
        if !annotations.is_empty() {
            builder = builder.annotations(unsorted(annotations));
        }
        let manifest = builder.build().expect("every required field is set above");
        Self::parse(&to_bytes(&manifest).map_err(ManifestError::Json)?)
    }

    /// The manifest's bytes; their digest is the snapshot's.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The snapshot's digest.
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// The config's blob.
    #[must_use]
    pub fn config(&self) -> &Layer {
        &self.config
    }

    /// The layers, in the order of publication.
    #[must_use]
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// The image or artifact to which the snapshot belongs, as a rule the application's image.
    #[must_use]
    pub fn subject(&self) -> Option<&Descriptor> {
        self.subject.as_ref()
    }

    /// Further annotations.
    #[must_use]
    pub fn annotations(&self) -> &BTreeMap<String, String> {
        &self.annotations
    }

    /// The config and the layers. A blob may occur twice.
    pub fn blobs(&self) -> impl Iterator<Item = &Layer> {
        std::iter::once(&self.config).chain(&self.layers)
    }

    /// Size of the manifest and of all blobs, each counted once, in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        let blobs: BTreeMap<Digest, u64> = self.blobs().map(|blob| (blob.digest, blob.size)).collect();
        blobs.values().sum::<u64>() + self.bytes.len() as u64
    }
}

impl Layer {
    fn read(descriptor: &Descriptor) -> Result<Self, ManifestError> {
        Ok(Self {
            media_type: descriptor.media_type().as_ref().to_owned(),
            digest: descriptor.digest().try_into()?,
            size: descriptor.size(),
            annotations: sorted(descriptor.annotations().as_ref()),
        })
    }

    fn write(&self) -> Descriptor {
        let mut descriptor = Descriptor::new(MediaType::from(self.media_type.as_str()), self.size, self.digest);
        if !self.annotations.is_empty() {
            descriptor.set_annotations(Some(unsorted(&self.annotations)));
        }
        descriptor
    }
}

fn sorted(annotations: Option<&HashMap<String, String>>) -> BTreeMap<String, String> {
    annotations.into_iter().flatten().map(|(key, value)| (key.clone(), value.clone())).collect()
}

pub(crate) fn unsorted(annotations: &BTreeMap<String, String>) -> HashMap<String, String> {
    annotations.clone().into_iter().collect()
}

/// JSON with sorted keys: the annotations of `oci-spec` are unsorted.
pub(crate) fn to_bytes(document: &impl serde::Serialize) -> Result<Vec<u8>, serde_json::Error> {
    let mut value = serde_json::to_value(document)?;
    value.sort_all_objects();
    serde_json::to_vec(&value)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOLDEN: &[u8] = include_bytes!("testdata/manifest.json");

    #[test]
    fn the_golden_file_is_what_is_written() {
        let read = Manifest::parse(GOLDEN).unwrap();
        assert_eq!(read.layers()[1].media_type, crate::GPU_MEMORY_TYPE);
        assert_eq!(read.layers()[1].annotations["dev.gpusnap.pid"], "1");
        assert_eq!(read.size(), 700 + 300 + 12 + GOLDEN.len() as u64, "a layer that comes twice counts once");
        let again = Manifest::build(read.config(), read.layers(), read.subject().cloned(), read.annotations()).unwrap();
        assert_eq!(String::from_utf8_lossy(again.bytes()), String::from_utf8_lossy(GOLDEN));
        assert_eq!(again.digest(), Digest::of(GOLDEN));
    }

    #[test]
    fn what_is_no_snapshot_is_refused_and_says_what_it_is() {
        let golden = |from: &str, to: &str| {
            let text = std::str::from_utf8(GOLDEN).unwrap();
            assert!(text.contains(from), "{from}");
            Manifest::parse(text.replacen(from, to, 1).as_bytes()).unwrap_err()
        };
        let later = golden("gpusnap.snapshot.v1+json", "gpusnap.snapshot.v2+json");
        assert!(later.to_string().contains("snapshot.v2+json"), "{later}");
        golden(CONFIG_TYPE, "application/vnd.oci.image.config.v1+json");
        assert!(matches!(golden("\"schemaVersion\":2", "\"schemaVersion\":3"), ManifestError::Schema { found: 3 }));
        assert!(matches!(golden("\"size\":12}", "\"size\":13}"), ManifestError::Contradiction { .. }));
        assert!(matches!(golden("\"size\":300", "\"size\":18446744073709551615"), ManifestError::Sizes));
        assert!(matches!(golden("sha256:", "xxhash:"), ManifestError::Digest(_)));
        assert!(matches!(golden("\"size\":300", "\"size\":-1"), ManifestError::Json(_)));
        assert!(matches!(Manifest::parse(b""), Err(ManifestError::Json(_))));
        assert!(matches!(Manifest::parse(&vec![b' '; DOCUMENT_LIMIT + 1]), Err(ManifestError::TooLarge)));
    }
}
