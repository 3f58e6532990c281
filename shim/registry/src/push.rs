//! Push of a snapshot from the store into a registry.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures_util::{StreamExt, TryStreamExt, stream};
use oci_client::RegistryOperation;
use reqwest::Method;
use reqwest::header::CONTENT_TYPE;
use snapshot::{Digest, Layer, Snapshot};

use crate::error::RegistryError;
use crate::progress::{Meter, Share};
use crate::pull::MANIFEST_TYPE;
use crate::session::{Failure, Options, Session};
use crate::target::Target;
use crate::upload::upload;

/// Failure of a push. Blobs that arrived stay in the registry and are not sent again.
#[derive(Debug, thiserror::Error)]
pub enum PushError {
    /// The registry or the connection failed.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The target names the digest of another snapshot.
    #[error("{target} cannot become the snapshot {digest}: push to a tag")]
    Pinned {
        /// The target.
        target: String,
        /// The snapshot to push.
        digest: Digest,
    },
}

/// Pushes a snapshot: sends the missing blobs, several at a time. The manifest goes last: the
/// registry has a whole snapshot or none.
///
/// # Errors
/// See [`PushError`].
pub async fn push(
    snapshot: &Snapshot,
    target: &Target,
    options: &Options,
    meter: &Arc<Meter>,
) -> Result<(), PushError> {
    let manifest = snapshot.manifest();
    let digest = manifest.digest();
    if target.digest().is_some_and(|pinned| pinned != digest.to_string()) {
        return Err(PushError::Pinned { target: target.to_string(), digest });
    }
    let session = Session::open(target, RegistryOperation::Push, &options.patience, meter).await?;
    meter.set_total(manifest.size() - manifest.bytes().len() as u64);
    let blobs: BTreeMap<Digest, &Layer> = manifest.blobs().map(|blob| (blob.digest, blob)).collect();
    let sent = stream::iter(blobs.into_values())
        .map(async |blob| {
            let open = || {
                let path = || snapshot.path(&blob.digest);
                snapshot.open(blob).map_err(|error| RegistryError::File {
                    action: error.action,
                    path: path(),
                    source: error.source,
                })
            };
            upload(&session, blob, open, &Arc::new(Share::new(meter))).await.map(drop)
        })
        .buffer_unordered(options.jobs.max(1));
    sent.try_collect::<()>().await?;
    session.persist(async || put_manifest(&session, manifest.bytes(), digest).await).await?;
    Ok(())
}

async fn put_manifest(session: &Session, bytes: &[u8], digest: Digest) -> Result<(), Failure> {
    let version = session.target.version();
    let what = format!("manifest {}:{version}", session.target.repository());
    let (request, used) = session.request(Method::PUT, session.url(&format!("manifests/{version}"))?);
    let request = request.header(CONTENT_TYPE, MANIFEST_TYPE).body(bytes.to_vec());
    let response = session.send(&what, (request, used)).await?;
    let said = response.headers().get("docker-content-digest").and_then(|value| value.to_str().ok());
    if said.is_some_and(|said| said.starts_with("sha256:") && said != digest.to_string()) {
        return Err(session.wrong(&what, "it was stored under another digest").into());
    }
    Ok(())
}
