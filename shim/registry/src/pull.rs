//! A snapshot out of a registry into the store.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt, stream};
use oci_client::RegistryOperation;
use reqwest::Method;
use reqwest::header::ACCEPT;
use snapshot::{
    Config, ConfigError, DOCUMENT_LIMIT, Digest, Draft, FileError, IfTaken, Layer, Manifest, ManifestError, Name,
    Partial, PublishError, Received, Snapshot, Store,
};

use crate::download::{blocking, download};
use crate::error::RegistryError;
use crate::progress::{Meter, Share};
use crate::session::{Failure, Options, Session};
use crate::target::Target;

pub(crate) const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
/// How often a blob that another process receives is looked for.
const LOOK_AGAIN: Duration = Duration::from_millis(200);
/// What layers of a container's root are called.
const IMAGE_LAYER: &str = "application/vnd.oci.image.layer.";
const LAYERS: [&str; 5] = [
    snapshot::CRIU_TYPE,
    snapshot::GPU_MEMORY_TYPE,
    snapshot::HOST_MEMORY_TYPE,
    snapshot::SEGMENTS_TYPE,
    snapshot::SHM_TYPE,
];

/// What to pull, and what it is called here.
#[derive(Clone, Debug)]
pub struct Pull {
    /// Where it is.
    pub target: Target,
    /// Its name in the store.
    pub name: Option<Name>,
    /// What if the name is taken.
    pub if_taken: IfTaken,
    /// The most that all of the store may take, in bytes.
    pub quota: Option<u64>,
}

/// Why nothing was pulled. What came is kept for the next attempt, unless it was wrong.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// The registry, or the way there.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The manifest is of something else, or of a later version.
    #[error("{target} is no snapshot that can be used")]
    Manifest {
        /// Where it was found.
        target: String,
        /// Why not.
        #[source]
        source: ManifestError,
    },
    /// The config is damaged or of a later version.
    #[error("{target} is no snapshot that can be used")]
    Config {
        /// Where it was found.
        target: String,
        /// Why not.
        #[source]
        source: ConfigError,
    },
    /// A layer that this version would not know what to do with.
    #[error("{target} has a layer of {media_type:?}, which this gpusnap does not know: use a newer one")]
    Layer {
        /// Where it was found.
        target: String,
        /// What it says it is, shortened.
        media_type: String,
    },
    /// The file system has no room.
    #[error("{target} needs {needed} bytes more and {} has {free} free: make room, with `gpusnap rm` or `gpusnap prune`", store.display())]
    Space {
        /// Where it was found.
        target: String,
        /// Bytes still to be received.
        needed: u64,
        /// Bytes free.
        free: u64,
        /// The store.
        store: PathBuf,
    },
    /// The snapshot alone is more than the store may take.
    #[error("{target} has {size} bytes and the quota of the store is {quota}")]
    Quota {
        /// Where it was found.
        target: String,
        /// Bytes of the snapshot.
        size: u64,
        /// Bytes that the store may take.
        quota: u64,
    },
    /// The store.
    #[error(transparent)]
    File(#[from] FileError),
    /// It was received, and could not be published.
    #[error(transparent)]
    Publish(#[from] PublishError),
}

/// Pulls a snapshot: what the store lacks is received, several blobs at a time, and verified; then it is published at once.
///
/// # Errors
/// What [`PullError`] says; the store is as it was, and a repetition goes on from what had come.
pub async fn pull(store: &Store, pull: Pull, options: &Options, meter: &Arc<Meter>) -> Result<Snapshot, PullError> {
    let session = Session::open(&pull.target, RegistryOperation::Pull, &options.patience).await?;
    let target = pull.target.to_string();
    let bytes = session.persist(async || manifest(&session).await).await?;
    let manifest = Manifest::parse(&bytes).map_err(|source| PullError::Manifest { target: target.clone(), source })?;
    if let Some(layer) = manifest.layers().iter().find(|layer| !is_known(&layer.media_type)) {
        let media_type = crate::session::one_line(&layer.media_type);
        return Err(PullError::Layer { target, media_type });
    }
    if manifest.config().size > DOCUMENT_LIMIT as u64 {
        return Err(PullError::Config { target, source: ConfigError::TooLarge });
    }
    meter.set_total(manifest.size() - manifest.bytes().len() as u64);
    let draft = store.draft()?;
    let incoming = Incoming { session: &session, store, draft: &draft, meter, jobs: options.jobs.max(1) };

    // The config says whether the rest is of any use.
    incoming.receive([manifest.config().clone()]).await?;
    let path = incoming.take(manifest.config()).await?;
    let config = read(&draft.folder().join(&path))?;
    Config::parse(&config).map_err(|source| PullError::Config { target: target.clone(), source })?;
    let mut blobs = BTreeMap::from([(manifest.config().digest, path)]);

    let layers = manifest.layers().iter().filter(|layer| layer.digest != manifest.config().digest);
    let layers: BTreeMap<Digest, Layer> = layers.map(|layer| (layer.digest, layer.clone())).collect();
    check_room(store, &target, &manifest, &layers, pull.quota)?;
    incoming.receive(layers.values().cloned()).await?;
    for layer in layers.values() {
        blobs.insert(layer.digest, incoming.take(layer).await?);
    }
    let published = blocking(move || {
        draft.publish_received(Received { name: pull.name, if_taken: pull.if_taken, manifest, blobs })
    });
    Ok(published.await?)
}

fn read(path: &Path) -> Result<Vec<u8>, RegistryError> {
    std::fs::read(path).map_err(|source| RegistryError::File { action: "read", path: path.to_owned(), source })
}

fn is_known(media_type: &str) -> bool {
    LAYERS.contains(&media_type) || media_type.starts_with(IMAGE_LAYER)
}

/// The manifest's bytes, which have the digest that was asked for and the one that the registry says.
async fn manifest(session: &Session) -> Result<Vec<u8>, Failure> {
    let version = session.target.version();
    let what = format!("manifest {}:{version}", session.target.repository());
    let (request, used) = session.request(Method::GET, session.url(&format!("manifests/{version}"))?);
    let response = session.send(&what, (request.header(ACCEPT, MANIFEST_TYPE), used)).await?;
    let said = response.headers().get("docker-content-digest").and_then(|value| value.to_str().ok().map(str::to_owned));
    let bytes = session.body(&what, response, DOCUMENT_LIMIT).await?;
    let digest = Digest::of(&bytes).to_string();
    // Digests of other kinds than ours say nothing that could be checked.
    let said = said.filter(|said| said.starts_with("sha256:"));
    let pinned = session.target.digest().map(str::to_owned);
    if said.into_iter().chain(pinned).any(|expected| expected != digest) {
        return Err(session.wrong(&what, "its content has another digest").into());
    }
    Ok(bytes)
}

/// Before the first byte of memory is received: there is room for all of it.
fn check_room(
    store: &Store,
    target: &str,
    manifest: &Manifest,
    layers: &BTreeMap<Digest, Layer>,
    quota: Option<u64>,
) -> Result<(), PullError> {
    let size = manifest.size();
    if let Some(quota) = quota.filter(|quota| size > *quota) {
        return Err(PullError::Quota { target: target.to_owned(), size, quota });
    }
    let mut needed = 0_u64;
    for layer in layers.values() {
        if store.blob_size(&layer.digest)? != Some(layer.size) {
            needed += layer.size - store.partial_size(&layer.digest)?.min(layer.size);
        }
    }
    let free = store.free_space()?;
    if needed > free {
        return Err(PullError::Space { target: target.to_owned(), needed, free, store: store.root().to_owned() });
    }
    Ok(())
}

struct Incoming<'a> {
    session: &'a Session,
    store: &'a Store,
    draft: &'a Draft,
    meter: &'a Arc<Meter>,
    jobs: usize,
}

impl Incoming<'_> {
    /// Receives what is not in the store. It is left where the next process finds it if this one does not get to the end.
    async fn receive(&self, blobs: impl IntoIterator<Item = Layer>) -> Result<(), PullError> {
        stream::iter(blobs)
            .map(async |blob| self.receive_one(&blob, &Arc::new(Share::new(self.meter))).await)
            .buffer_unordered(self.jobs)
            .try_collect()
            .await
    }

    async fn receive_one(&self, blob: &Layer, share: &Arc<Share>) -> Result<(), PullError> {
        if self.draft.reuse(&blob.digest, blob.size)? {
            share.present(blob.size);
            return Ok(());
        }
        let partial = self.partial(blob).await?;
        Ok(download(self.session, blob, partial.file()?, partial.path().to_owned(), share).await?)
    }

    /// What there is of a blob. Waits for another process that receives it.
    async fn partial(&self, blob: &Layer) -> Result<Partial, PullError> {
        loop {
            match self.store.partial(&blob.digest)? {
                Some(partial) => return Ok(partial),
                None => tokio::time::sleep(LOOK_AGAIN).await,
            }
        }
    }

    /// Puts a blob that was received into the draft. Locks are held while receiving only, lest two processes that want the
    /// same blobs wait for each other; so another one may have published it since.
    async fn take(&self, blob: &Layer) -> Result<PathBuf, PullError> {
        loop {
            if self.draft.reuse(&blob.digest, blob.size)? {
                return Ok(blob.digest.hex().into());
            }
            let partial = self.partial(blob).await?;
            // Whoever completed it has verified it.
            if partial.len()? == blob.size {
                return Ok(self.draft.take(partial)?);
            }
            drop(partial);
            self.receive_one(blob, &Arc::new(Share::new(&Arc::default()))).await?;
        }
    }
}
