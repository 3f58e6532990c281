//! Upload of one blob from a file into a registry.

use std::fs::File;
use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures_util::stream;
use reqwest::header::{CONTENT_LENGTH, CONTENT_TYPE};
use reqwest::{Body, Method, StatusCode};
use sha2::{Digest as _, Sha256};
use snapshot::{Digest, Layer};
use tokio::sync::mpsc;

use crate::error::RegistryError;
use crate::progress::Share;
use crate::session::{Failure, Session};

/// Bytes read and handed to the connection at a time.
const PIECE: usize = 256 << 10;
const PIECES_IN_FLIGHT: usize = 8;

/// Returns whether the registry has this blob.
pub(crate) async fn exists(session: &Session, blob: &Layer) -> Result<bool, Failure> {
    let what = format!("blob {}", blob.digest.short());
    let request = session.request(Method::HEAD, session.url(&format!("blobs/{}", blob.digest))?);
    let response = match session.send(&what, request).await {
        Err(Failure::Final(RegistryError::NotFound { .. })) => return Ok(false),
        other => other?,
    };
    let length = response.headers().get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    match length {
        // Some registries answer 0 to a request without a body.
        Some(length) if length != blob.size && length != 0 => {
            let reason = format!("it has {length} bytes there and {} here", blob.size);
            Err(session.wrong(&what, &reason).into())
        }
        _ => Ok(true),
    }
}

/// Sends the file of `open`, unless the registry has the blob; returns whether it was sent. The
/// blob goes in one request: packs are small enough to be sent again after a broken connection, and
/// registries differ in the treatment of a broken upload.
pub(crate) async fn upload(
    session: &Session,
    blob: &Layer,
    open: impl Fn() -> Result<File, RegistryError>,
    share: &Arc<Share>,
) -> Result<bool, RegistryError> {
    session
        .persist(async || {
            share.start_over();
            if exists(session, blob).await? {
                share.present(blob.size);
                return Ok(false);
            }
            send(session, blob, open()?, share).await?;
            Ok(true)
        })
        .await
}

async fn send(session: &Session, blob: &Layer, file: File, share: &Arc<Share>) -> Result<(), Failure> {
    let what = format!("the upload of blob {}", blob.digest.short());
    let (request, used) = session.request(Method::POST, session.url("blobs/uploads/")?);
    let response = session.send(&what, (request.header(CONTENT_LENGTH, 0), used)).await?;
    if response.status() != StatusCode::ACCEPTED {
        return Err(session.wrong(&what, &format!("{} instead of 202", response.status())).into());
    }
    let mut location = session.location(&what, &response)?;
    location.query_pairs_mut().append_pair("digest", &blob.digest.to_string());
    drop(response);

    let damaged = Arc::new(AtomicBool::new(false));
    let (request, used) = session.request(Method::PUT, location);
    let sending = request
        .header(CONTENT_LENGTH, blob.size)
        .header(CONTENT_TYPE, "application/octet-stream")
        .body(body(file, blob, Arc::clone(share), Arc::clone(&damaged)))
        .send();
    let mut sending = std::pin::pin!(sending);
    let mut before = share.so_far();
    let sent = loop {
        if let Ok(sent) = tokio::time::timeout(session.patience.stall, &mut sending).await {
            break sent;
        }
        let now = share.so_far();
        if now == before {
            return Err(Failure::again(session.stalled(&what)));
        }
        before = now;
    };
    if damaged.load(Ordering::Acquire) {
        return Err(RegistryError::Damaged { digest: blob.digest.to_string() }.into());
    }
    let response = sent.map_err(|source| session.connection_failed(&what, source))?;
    let response = session.sorted(&what, response, used).await?;
    match response.status() {
        StatusCode::CREATED => Ok(()),
        status => Err(session.wrong(&what, &format!("{status} instead of 201")).into()),
    }
}

/// A file as the body of a request, read and hashed in a thread. The last piece is sent only if the
/// digest of all bytes matches.
fn body(mut file: File, blob: &Layer, share: Arc<Share>, damaged: Arc<AtomicBool>) -> Body {
    let (pieces, mut queue) = mpsc::channel::<std::io::Result<Vec<u8>>>(PIECES_IN_FLIGHT);
    let (digest, size) = (blob.digest, blob.size);
    let mut read = move || -> std::io::Result<()> {
        let mut hasher = Sha256::new();
        let mut left = size;
        loop {
            let mut piece = vec![0; PIECE.min(usize::try_from(left).unwrap_or(PIECE))];
            file.read_exact(&mut piece)?;
            hasher.update(&piece);
            left -= piece.len() as u64;
            if left == 0 {
                if Digest::from(<[u8; 32]>::from(hasher.finalize())) != digest {
                    return Err(std::io::ErrorKind::InvalidData.into());
                }
                let _ = pieces.blocking_send(Ok(piece));
                return Ok(());
            }
            if pieces.blocking_send(Ok(piece)).is_err() {
                // The request is over.
                return Ok(());
            }
        }
    };
    tokio::task::spawn_blocking(move || {
        let failed = read();
        if failed.is_err() {
            damaged.store(true, Ordering::Release);
        }
    });
    Body::wrap_stream(stream::poll_fn(move |context| {
        let piece = queue.poll_recv(context);
        if let std::task::Poll::Ready(Some(Ok(piece))) = &piece {
            share.moved(piece.len() as u64);
        }
        piece
    }))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::Write;

    use oci_client::RegistryOperation;

    use super::*;
    use crate::progress::{Meter, Totals};
    use crate::session::Patience;
    use crate::testing::{Fake, Fault, chain, patience};

    const PUT: &str = "PUT /v2/team/vit/blobs/uploads/";

    struct Outcome {
        result: Result<bool, RegistryError>,
        totals: Totals,
        digest: Digest,
    }

    async fn upload_of(fake: &Fake, content: &[u8], digest: Digest, patience: &Patience) -> Outcome {
        let mut source = tempfile::NamedTempFile::new().unwrap();
        source.write_all(content).unwrap();
        let meter = Arc::new(Meter::default());
        let blob = Layer { media_type: "x".into(), digest, size: content.len() as u64, annotations: BTreeMap::new() };
        let session = Session::open(&fake.target(), RegistryOperation::Push, patience, &meter).await.unwrap();
        let open = || Ok(File::open(source.path()).unwrap());
        let result = upload(&session, &blob, open, &Arc::new(Share::new(&meter))).await;
        Outcome { result, totals: meter.read(), digest }
    }

    async fn upload_content(fake: &Fake, content: &[u8]) -> Outcome {
        upload_of(fake, content, Digest::of(content), &patience()).await
    }

    #[tokio::test]
    async fn a_blob_arrives_whole_and_is_not_sent_twice() {
        let (fake, content) = (Fake::start(), vec![5; 2_000_000]);
        let sent = upload_content(&fake, &content).await;
        assert!(sent.result.unwrap());
        assert_eq!(sent.totals, Totals { moved: 2_000_000, ..Totals::default() });
        assert_eq!(fake.blob(sent.digest).unwrap(), content);
        let again = upload_content(&fake, &content).await;
        assert!(!again.result.unwrap());
        assert_eq!(again.totals, Totals { present: 2_000_000, ..Totals::default() });
        assert_eq!(fake.count(PUT), 1);
        assert!(upload_content(&fake, b"").await.result.unwrap(), "an empty blob is one as well");
    }

    #[tokio::test]
    async fn an_upload_that_breaks_off_is_sent_again() {
        let (fake, content) = (Fake::start(), vec![6; 10_000_000]);
        fake.fault(PUT, Fault::CutRequest(1_000_000));
        fake.status(PUT, 500);
        fake.status("POST /v2/team/vit/blobs/uploads/", 503);
        let sent = upload_content(&fake, &content).await;
        assert!(sent.result.unwrap());
        assert_eq!(fake.blob(sent.digest).unwrap(), content);
        assert_eq!(sent.totals.moved, 10_000_000);
        assert!(sent.totals.lost >= 10_000_000);
    }

    #[tokio::test]
    async fn a_registry_that_takes_nothing_is_given_up_on() {
        let (fake, content) = (Fake::start(), vec![7; 30_000_000]);
        for _ in 0..2 {
            fake.fault(PUT, Fault::StallRequest);
        }
        let patience = Patience { attempts: 2, ..patience() };
        let error = chain(&upload_of(&fake, &content, Digest::of(&content), &patience).await.result.unwrap_err());
        assert!(error.contains("stalls: no byte of the upload of blob") && error.contains("(2 attempts)"), "{error}");
    }

    #[tokio::test]
    async fn a_damaged_blob_does_not_leave_this_machine() {
        let fake = Fake::start();
        let outcome = upload_of(&fake, &vec![8; 1_000_000], Digest::of(b"something else"), &patience()).await;
        let error = chain(&outcome.result.unwrap_err());
        assert!(error.contains("is damaged and was not sent") && error.contains("gpusnap verify"), "{error}");
        assert!(fake.blob(outcome.digest).is_none());
        assert!(fake.count(PUT) <= 1);
    }

    #[tokio::test]
    async fn a_refusal_is_final() {
        let fake = Fake::start();
        let denied = r#"{"errors":[{"code":"DENIED","message":"quota exceeded"}]}"#;
        fake.fault("POST /v2/team/vit/blobs/uploads/", Fault::Status(403, String::new(), denied.into()));
        let error = chain(&upload_content(&fake, b"x").await.result.unwrap_err());
        assert!(error.contains("(quota exceeded)"), "{error}");
        fake.status(PUT, 413);
        let error = chain(&upload_content(&fake, b"x").await.result.unwrap_err());
        assert!(error.contains("answers 413 to the upload of blob"), "{error}");
        assert_eq!(fake.count(PUT), 1);
    }

    #[tokio::test]
    async fn a_token_that_expires_in_the_middle_is_renewed() {
        let fake = Fake::start();
        fake.want_login();
        fake.fault(PUT, Fault::Status(401, String::new(), String::new()));
        assert!(upload_content(&fake, b"secret").await.result.unwrap());
        assert_eq!(fake.count("GET /token"), 2);
    }
}
