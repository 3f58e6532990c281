//! Pull of a snapshot from a registry into the store.

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
    Partial, PublishError, Received, RemoveError, Snapshot, Store,
};

use crate::download::{blocking, download};
use crate::error::RegistryError;
use crate::progress::{Meter, Share};
use crate::session::{Failure, Options, Session};
use crate::target::Target;

pub(crate) const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
/// Pause between two looks for a blob that another process receives.
const LOOK_AGAIN: Duration = Duration::from_millis(200);
/// Prefix of the media types of a container's image layers.
const IMAGE_LAYER: &str = "application/vnd.oci.image.layer.";
const LAYERS: [&str; 5] = [
    snapshot::CRIU_TYPE,
    snapshot::GPU_MEMORY_TYPE,
    snapshot::HOST_MEMORY_TYPE,
    snapshot::SEGMENTS_TYPE,
    snapshot::SHM_TYPE,
];

/// A snapshot to pull, and its place in the store.
#[derive(Clone, Debug)]
pub struct Pull {
    /// The snapshot's location in a registry.
    pub target: Target,
    /// The name in the store.
    pub name: Option<Name>,
    /// Treatment of a name in use.
    pub if_taken: IfTaken,
    /// Most bytes of the whole store.
    pub quota: Option<u64>,
}

/// Failure of a pull. Received bytes are kept for the next attempt, unless they are wrong.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// The registry or the connection failed.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The manifest is not a snapshot's, or belongs to a later version.
    #[error("{target} is not a usable snapshot")]
    Manifest {
        /// The location in a registry.
        target: String,
        /// The cause.
        #[source]
        source: ManifestError,
    },
    /// The config is damaged or of a later version.
    #[error("{target} is not a usable snapshot")]
    Config {
        /// The location in a registry.
        target: String,
        /// The cause.
        #[source]
        source: ConfigError,
    },
    /// A layer's media type is unknown to this version.
    #[error("{target} has a layer of {media_type:?}, which this gpusnap does not know: use a newer one")]
    Layer {
        /// The location in a registry.
        target: String,
        /// The media type, shortened.
        media_type: String,
    },
    /// The file system has no room.
    #[error("{target} needs {needed} bytes more and {} has {free} free: make room, with `gpusnap rm` or `gpusnap prune`", store.display())]
    Space {
        /// The location in a registry.
        target: String,
        /// Bytes still to be received.
        needed: u64,
        /// Bytes free.
        free: u64,
        /// The store.
        store: PathBuf,
    },
    /// The snapshot and the store's used content exceed the quota.
    #[error(
        "{target} needs {missing} bytes more, the quota of the store is {quota}, and {used} of them cannot be freed"
    )]
    Quota {
        /// The location in a registry.
        target: String,
        /// Bytes missing from the store.
        missing: u64,
        /// Bytes that cannot be freed.
        used: u64,
        /// Most bytes of the store.
        quota: u64,
    },
    /// The store failed.
    #[error(transparent)]
    File(#[from] FileError),
    /// Making room failed.
    #[error(transparent)]
    Remove(#[from] RemoveError),
    /// The received snapshot could not be published.
    #[error(transparent)]
    Publish(#[from] PublishError),
}

/// Pulls a snapshot: receives and verifies the missing blobs, several at a time, then publishes the
/// snapshot as a whole.
///
/// # Errors
/// See [`PullError`]; the store is unchanged, and another pull continues from the received bytes.
pub async fn pull(store: &Store, pull: Pull, options: &Options, meter: &Arc<Meter>) -> Result<Snapshot, PullError> {
    let session = Session::open(&pull.target, RegistryOperation::Pull, &options.patience, meter).await?;
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

    // The config shows whether the rest can be used.
    incoming.receive([manifest.config().clone()]).await?;
    let path = incoming.take(manifest.config()).await?;
    let config = read(&draft.folder().join(&path))?;
    Config::parse(&config).map_err(|source| PullError::Config { target: target.clone(), source })?;
    let mut blobs = BTreeMap::from([(manifest.config().digest, path)]);

    let layers = manifest.layers().iter().filter(|layer| layer.digest != manifest.config().digest);
    let layers: BTreeMap<Digest, Layer> = layers.map(|layer| (layer.digest, layer.clone())).collect();
    incoming.keep(&layers)?;
    let (room, name) = ((store.clone(), layers.clone(), pull.quota), target);
    blocking(move || make_room(&room.0, &name, &room.1, room.2)).await?;
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

/// The manifest's bytes, checked against the requested and the announced digest.
async fn manifest(session: &Session) -> Result<Vec<u8>, Failure> {
    let version = session.target.version();
    let what = format!("manifest {}:{version}", session.target.repository());
    let (request, used) = session.request(Method::GET, session.url(&format!("manifests/{version}"))?);
    let response = session.send(&what, (request.header(ACCEPT, MANIFEST_TYPE), used)).await?;
    let said = response.headers().get("docker-content-digest").and_then(|value| value.to_str().ok().map(str::to_owned));
    let bytes = session.body(&what, response, DOCUMENT_LIMIT).await?;
    let digest = Digest::of(&bytes).to_string();
    // Digests of other kinds cannot be checked.
    let said = said.filter(|said| said.starts_with("sha256:"));
    let pinned = session.target.digest().map(str::to_owned);
    if said.into_iter().chain(pinned).any(|expected| expected != digest) {
        return Err(session.wrong(&what, "its content has another digest").into());
    }
    Ok(bytes)
}

/// Makes room for all memory before its first byte is received.
fn make_room(
    store: &Store,
    target: &str,
    layers: &BTreeMap<Digest, Layer>,
    quota: Option<u64>,
) -> Result<(), PullError> {
    // Snapshots removed to make room may share blobs with this one. The draft keeps such blobs, and
    // the store lacks them from then on.
    while let Some(quota) = quota {
        let missing = missing(store, layers)?;
        let over = |used| PullError::Quota { target: target.to_owned(), missing, used, quota };
        let left = quota.checked_sub(missing).ok_or_else(|| over(0))?;
        let used = store.enforce_quota(left)?.left;
        if self::missing(store, layers)? == missing {
            if used > left {
                return Err(over(used));
            }
            break;
        }
    }
    let mut needed = missing(store, layers)?;
    for layer in layers.values() {
        needed = needed.saturating_sub(store.partial_size(&layer.digest)?.min(layer.size));
    }
    let free = store.free_space()?;
    if needed > free {
        return Err(PullError::Space { target: target.to_owned(), needed, free, store: store.root().to_owned() });
    }
    Ok(())
}

/// Bytes of these layers missing from the store.
fn missing(store: &Store, layers: &BTreeMap<Digest, Layer>) -> Result<u64, FileError> {
    layers.values().try_fold(0, |sum, layer| {
        let there = store.blob_size(&layer.digest)? == Some(layer.size);
        Ok(if there { sum } else { sum + layer.size })
    })
}

struct Incoming<'a> {
    session: &'a Session,
    store: &'a Store,
    draft: &'a Draft,
    meter: &'a Arc<Meter>,
    jobs: usize,
}

impl Incoming<'_> {
    /// Receives the blobs missing from the store. An interrupted blob stays for the next process.
    async fn receive(&self, blobs: impl IntoIterator<Item = Layer>) -> Result<(), PullError> {
        stream::iter(blobs)
            .map(async |blob| self.receive_one(&blob, &Arc::new(Share::new(self.meter))).await)
            .buffer_unordered(self.jobs)
            .try_collect()
            .await
    }

    /// Keeps the store's blobs until the end of this pull.
    fn keep(&self, layers: &BTreeMap<Digest, Layer>) -> Result<(), PullError> {
        layers.values().try_for_each(|layer| Ok(self.draft.reuse(&layer.digest, layer.size).map(drop)?))
    }

    async fn receive_one(&self, blob: &Layer, share: &Arc<Share>) -> Result<(), PullError> {
        if self.draft.reuse(&blob.digest, blob.size)? {
            share.present(blob.size);
            return Ok(());
        }
        let partial = self.partial(blob).await?;
        download(self.session, blob, partial, share).await
    }

    /// The received part of a blob. Waits for another process that receives the same blob.
    async fn partial(&self, blob: &Layer) -> Result<Partial, PullError> {
        loop {
            match self.store.partial(&blob.digest)? {
                Some(partial) => return Ok(partial),
                None => tokio::time::sleep(LOOK_AGAIN).await,
            }
        }
    }

    /// Puts a received blob into the draft. Locks are held while receiving only, so that two
    /// processes never wait for each other. Another process may thus have published the blob.
    async fn take(&self, blob: &Layer) -> Result<PathBuf, PullError> {
        loop {
            if self.draft.reuse(&blob.digest, blob.size)? {
                return Ok(blob.digest.hex().into());
            }
            let partial = self.partial(blob).await?;
            // The process that completed the blob has verified it.
            if partial.received()? == blob.size {
                return Ok(self.draft.take(partial)?);
            }
            drop(partial);
            self.receive_one(blob, &Arc::new(Share::new(&Arc::default()))).await?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Totals;
    use crate::push::push;
    use crate::testing::{Fake, Fault, chain, patience, snapshot_of};

    const BLOBS: &str = "GET /v2/team/vit/blobs/";

    fn options() -> Options {
        Options { jobs: 3, patience: patience() }
    }

    /// A registry with a snapshot, and the store of the push.
    async fn registry_with(layers: &[&[u8]]) -> (Fake, tempfile::TempDir) {
        let (fake, root) = (Fake::start(), tempfile::tempdir().unwrap());
        let snapshot = snapshot_of(root.path(), "default/vit", layers);
        push(&snapshot, &fake.target(), &options(), &Arc::default()).await.unwrap();
        (fake, root)
    }

    async fn pull_into(store: &Store, fake: &Fake) -> (Result<Snapshot, PullError>, Totals) {
        let meter = Arc::default();
        let name = Some("default/again".parse().unwrap());
        let pulled = Pull { target: fake.target(), name, if_taken: IfTaken::Move, quota: None };
        let result = pull(store, pulled, &options(), &meter).await;
        (result, meter.read())
    }

    fn error((result, _): (Result<Snapshot, PullError>, Totals)) -> String {
        chain(&result.unwrap_err())
    }

    fn new_store() -> (tempfile::TempDir, Store) {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path()).unwrap();
        (root, store)
    }

    /// Replaces a text in the fake's manifest.
    fn change_manifest(fake: &Fake, from: &str, to: &str) {
        let manifest = String::from_utf8(fake.manifest("warm").unwrap()).unwrap();
        assert!(manifest.contains(from), "{manifest}");
        fake.put_manifest("warm", manifest.replace(from, to).as_bytes());
    }

    #[tokio::test]
    async fn what_was_pushed_is_pulled_bit_for_bit() {
        let packs = [b"images".to_vec(), vec![1; 3_000_000], vec![2; 2_000_000], vec![1; 3_000_000]];
        let packs: Vec<&[u8]> = packs.iter().map(Vec::as_slice).collect();
        let (fake, source) = registry_with(&packs).await;
        let (_root, store) = new_store();
        let (pulled, totals) = pull_into(&store, &fake).await;
        let (pulled, from) = (pulled.unwrap(), Store::open(source.path()).unwrap());
        let pushed = from.open_snapshot(&pulled.digest().into()).unwrap();
        assert_eq!(pulled.manifest().bytes(), pushed.manifest().bytes());
        for blob in pulled.manifest().blobs() {
            assert_eq!(
                std::fs::read(pulled.path(&blob.digest)).unwrap(),
                std::fs::read(pushed.path(&blob.digest)).unwrap()
            );
        }
        assert_eq!(totals.moved, totals.total);
        assert_eq!(pulled.names()[0].to_string(), "default/again");
        let (again, totals) = pull_into(&store, &fake).await;
        again.unwrap();
        assert_eq!((totals.moved, totals.present), (0, totals.total));
    }

    #[tokio::test]
    async fn of_a_second_snapshot_only_what_differs_moves() {
        let (pack, other) = (vec![1; 3_000_000], vec![2; 50_000]);
        let (fake, root) = registry_with(&[b"images", &pack]).await;
        let (_root, store) = new_store();
        pull_into(&store, &fake).await.0.unwrap();
        let second = snapshot_of(root.path(), "default/second", &[b"other images", &pack, &other]);
        let meter = Arc::default();
        push(&second, &fake.target(), &options(), &meter).await.unwrap();
        let fixed = second.manifest().config().size + 12;
        assert_eq!(meter.read().moved, 50_000 + fixed);
        let before = fake.sent();
        let (pulled, totals) = pull_into(&store, &fake).await;
        assert_eq!(pulled.unwrap().digest(), second.digest());
        assert_eq!((totals.moved, totals.present), (50_000 + fixed, 3_000_000));
        assert!(fake.sent() - before < 60_000);
    }

    #[tokio::test]
    async fn a_pull_that_failed_goes_on_where_it_was() {
        let packs: Vec<Vec<u8>> = (0..6_u8).map(|n| vec![n; 1_500_000]).collect();
        let packs: Vec<&[u8]> = packs.iter().map(Vec::as_slice).collect();
        let (fake, _source) = registry_with(&packs).await;
        let (_root, store) = new_store();
        let bad = Digest::of(packs[4]).to_string();
        let bad: &'static str = format!("GET /v2/team/vit/blobs/{bad}").leak();
        fake.fault(bad, Fault::Cut(1_100_000));
        fake.status(bad, 403);
        assert!(error(pull_into(&store, &fake).await).contains("refuses access"));
        let begun = fake.sent();
        let (pulled, totals) = pull_into(&store, &fake).await;
        pulled.unwrap();
        assert!(totals.present >= 1_100_000, "{totals:?}");
        assert_eq!(fake.sent() - begun, totals.moved + fake.manifest("warm").unwrap().len() as u64);
        assert!(std::fs::read_dir(store.root().join("partial")).unwrap().next().is_none());
    }

    #[tokio::test]
    async fn two_pulls_at_once_share_what_they_receive() {
        let packs: Vec<Vec<u8>> = (0..8_u8).map(|n| vec![n; 1_000_000]).collect();
        let packs: Vec<&[u8]> = packs.iter().map(Vec::as_slice).collect();
        let (fake, _source) = registry_with(&packs).await;
        let (root, store) = new_store();
        let other = Store::open(root.path()).unwrap();
        let (one, two) = tokio::join!(pull_into(&store, &fake), pull_into(&other, &fake));
        assert_eq!(one.0.unwrap().digest(), two.0.unwrap().digest());
    }

    #[tokio::test]
    async fn a_manifest_without_end_is_refused() {
        let (fake, _source) = registry_with(&[b"images"]).await;
        let (_root, store) = new_store();
        fake.fault("GET /v2/team/vit/manifests/", Fault::Endless);
        let error = error(pull_into(&store, &fake).await);
        assert!(error.contains("manifest team/vit:warm") && error.contains("more than 4194304 bytes"), "{error}");
    }

    #[tokio::test]
    async fn a_manifest_other_than_the_pinned_one_is_refused() {
        let (fake, _source) = registry_with(&[b"images"]).await;
        let (_root, store) = new_store();
        let pinned = Digest::of(&fake.manifest("warm").unwrap()).to_string();
        fake.put_manifest(&pinned, &[fake.manifest("warm").unwrap(), b" ".to_vec()].concat());
        let target = Target::parse(&format!("{}/team/vit@{pinned}", fake.target().registry()), false).unwrap();
        let pinned = Pull { target, name: None, if_taken: IfTaken::Move, quota: None };
        let error = chain(&pull(&store, pinned, &options(), &Arc::default()).await.unwrap_err());
        assert!(error.contains("another digest"), "{error}");
    }

    #[tokio::test]
    async fn what_this_version_would_not_understand_is_refused_before_its_memory_comes() {
        let (fake, _source) = registry_with(&[b"images", b"memory"]).await;
        let (_root, store) = new_store();
        let good = fake.manifest("warm").unwrap();
        let refused = async |from: &str, to: &str| {
            fake.put_manifest("warm", &good);
            change_manifest(&fake, from, to);
            let before = fake.count(BLOBS);
            let error = error(pull_into(&store, &fake).await);
            assert_eq!(fake.count(BLOBS), before, "{error}");
            error
        };
        let error = refused("gpu-memory.v1", "gpu-memory.v9\\u001b[2J").await;
        assert!(
            error.contains("gpu-memory.v9") && error.contains("use a newer one") && !error.contains('\x1b'),
            "{error}"
        );
        assert!(refused("vnd.gpusnap.snapshot.v1+json", "vnd.gpusnap.snapshot.v2+json").await.contains("v2"));
        refused("\"size\":6", "\"size\":-1").await;
        refused("sha256:", "sha512:").await;

        let later = br#"{"version":2}"#;
        let (config, later) = (Manifest::parse(&good).unwrap().config().clone(), (fake.put(later), later.len()));
        fake.put_manifest("warm", &good);
        change_manifest(&fake, &config.digest.to_string(), &later.0.to_string());
        change_manifest(&fake, &format!("\"size\":{}", config.size), &format!("\"size\":{}", later.1));
        let before = fake.count(BLOBS);
        let error = super::tests::error(pull_into(&store, &fake).await);
        assert!(error.contains("config is of version 2"), "{error}");
        assert_eq!(fake.count(BLOBS), before + 1);
    }

    #[tokio::test]
    async fn without_room_nothing_is_received() {
        let (fake, _source) = registry_with(&[b"images", b"memory..."]).await;
        let (_root, store) = new_store();
        let small = Pull { target: fake.target(), name: None, if_taken: IfTaken::Move, quota: Some(4) };
        let error = chain(&pull(&store, small, &options(), &Arc::default()).await.unwrap_err());
        assert!(error.contains("the quota of the store is 4"), "{error}");
        change_manifest(&fake, "\"size\":9", "\"size\":4611686018427387904");
        let error = super::tests::error(pull_into(&store, &fake).await);
        assert!(error.contains("needs 46116860184273879") && error.contains("gpusnap rm"), "{error}");
        assert_eq!(fake.count(BLOBS), 2, "the configs");
    }

    #[tokio::test]
    async fn a_quota_makes_room_by_what_was_not_used_for_long() {
        let (pack, other) = (vec![1; 200_000], vec![2; 300_000]);
        let (fake, _source) = registry_with(&[b"images", &pack, &other]).await;
        let (root, store) = new_store();
        drop(snapshot_of(root.path(), "default/old", &[b"old images", &pack, &vec![3; 400_000]]));
        let target = fake.target();
        let fitting = Pull { target, name: None, if_taken: IfTaken::Move, quota: Some(600_000) };
        let meter = Arc::default();
        pull(&store, fitting, &options(), &meter).await.unwrap();
        assert!(meter.read().present >= 200_000, "what both have in common stayed");
        assert_eq!(store.list().unwrap().len(), 1);
    }

    #[tokio::test]
    async fn a_push_that_failed_sends_the_rest_and_the_manifest_last() {
        let (fake, root) = (Fake::start(), tempfile::tempdir().unwrap());
        let packs: Vec<Vec<u8>> = (0..5_u8).map(|n| vec![n; 500_000]).collect();
        let packs: Vec<&[u8]> = packs.iter().map(Vec::as_slice).collect();
        let snapshot = snapshot_of(root.path(), "default/vit", &packs);
        fake.status("PUT /v2/team/vit/blobs/", 507);
        let failed = push(&snapshot, &fake.target(), &options(), &Arc::default()).await.unwrap_err();
        assert!(chain(&failed).contains("507"), "{failed}");
        assert!(fake.manifest("warm").is_none());
        let meter = Arc::default();
        push(&snapshot, &fake.target(), &options(), &meter).await.unwrap();
        assert_eq!(fake.manifest("warm").unwrap(), snapshot.manifest().bytes());
        let totals = meter.read();
        assert_eq!(totals.moved + totals.present, totals.total);
        assert!(fake.log().last().unwrap().contains("/manifests/"));
    }
}
