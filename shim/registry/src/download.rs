//! Download of one blob from a registry into a file, over several connections if necessary.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use reqwest::header::{CONTENT_RANGE, RANGE};
use reqwest::{Method, Response, StatusCode};
use sha2::{Digest as _, Sha256};
use snapshot::{Digest, Layer, Partial};
use tokio::sync::mpsc;

use crate::error::RegistryError;
use crate::progress::Share;
use crate::pull::PullError;
use crate::session::{Failure, Session};

/// Pieces between the connection and the disk: back-pressure on a fast registry.
const PIECES_IN_FLIGHT: usize = 16;
/// Bytes by which an attempt must exceed the best one to count as progress.
const FURTHER: u64 = 1 << 20;

/// The beginning of a blob, and its hash.
struct Content {
    file: File,
    /// Owner of the lock, kept while a thread still writes.
    partial: Partial,
    hasher: Sha256,
    length: u64,
}

impl Content {
    /// Continues with the bytes of an earlier attempt.
    fn take_up(file: File, partial: Partial) -> Result<Self, RegistryError> {
        let mut content = Self { file, partial, hasher: Sha256::new(), length: 0 };
        let mut buffer = vec![0; 1 << 20];
        loop {
            let read = content.file.read(&mut buffer).map_err(|source| content.failed("read", source))?;
            if read == 0 {
                return Ok(content);
            }
            content.hasher.update(&buffer[..read]);
            content.length += read as u64;
        }
    }

    fn append(&mut self, piece: &[u8]) -> Result<(), RegistryError> {
        self.file.write_all(piece).map_err(|source| self.failed("write", source))?;
        self.hasher.update(piece);
        self.length += piece.len() as u64;
        Ok(())
    }

    fn start_over(&mut self) -> Result<(), RegistryError> {
        let emptied = self.file.set_len(0).and_then(|()| self.file.seek(SeekFrom::Start(0)));
        emptied.map_err(|source| self.failed("empty", source))?;
        self.hasher = Sha256::new();
        self.length = 0;
        Ok(())
    }

    fn digest(&self) -> Digest {
        <[u8; 32]>::from(self.hasher.clone().finalize()).into()
    }

    fn failed(&self, action: &'static str, source: std::io::Error) -> RegistryError {
        RegistryError::File { action, path: self.partial.path().to_owned(), source }
    }
}

/// Completes a blob, and verifies it. After a failure the bytes stay for another attempt, unless
/// they are wrong.
pub(crate) async fn download(
    session: &Session,
    blob: &Layer,
    partial: Partial,
    share: &Arc<Share>,
) -> Result<(), PullError> {
    let file = partial.file()?;
    let content = blocking(move || Content::take_up(file, partial)).await?;
    let taken_up = content.length.min(blob.size);
    share.present(taken_up);
    let mut work = Download {
        session,
        blob,
        what: format!("blob {}", blob.digest.short()),
        content: Arc::new(Mutex::new(content)),
        share,
        best: taken_up,
        joined: taken_up > 0,
    };
    Ok(session.persist(async || work.attempt().await).await?)
}

struct Download<'a> {
    session: &'a Session,
    blob: &'a Layer,
    what: String,
    content: Arc<Mutex<Content>>,
    share: &'a Arc<Share>,
    /// The most bytes held so far: no progress if a registry breaks off and starts from the
    /// beginning.
    best: u64,
    /// True if the file consists of several answers, or of an earlier run's bytes and an answer.
    joined: bool,
}

impl Download<'_> {
    fn content(&self) -> MutexGuard<'_, Content> {
        self.content.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn length(&self) -> u64 {
        self.content().length
    }

    fn start_over(&mut self) -> Result<(), RegistryError> {
        self.joined = false;
        self.share.start_over();
        self.content().start_over()
    }

    async fn attempt(&mut self) -> Result<(), Failure> {
        if self.length() > self.blob.size {
            self.start_over()?;
        }
        if self.length() < self.blob.size {
            let received = self.receive().await;
            let length = self.length();
            let further = length >= self.best.saturating_add(FURTHER);
            self.best = self.best.max(length);
            received.map_err(|failure| failure.got_further(further))?;
        }
        if self.content().digest() == self.blob.digest {
            return Ok(());
        }
        let error = self.session.wrong(&self.what, "its content has another digest");
        let joined = self.joined;
        self.start_over()?;
        // The bytes of an earlier run may have been damaged on this machine.
        Err(if joined { Failure::again(error) } else { error.into() })
    }

    /// Requests the missing bytes and appends the answer.
    async fn receive(&mut self) -> Result<(), Failure> {
        let have = self.length();
        let url = self.session.url(&format!("blobs/{}", self.blob.digest))?;
        let (mut request, used) = self.session.request(Method::GET, url);
        if have > 0 {
            request = request.header(RANGE, format!("bytes={have}-"));
        }
        let response = match self.session.send(&self.what, (request, used)).await {
            Err(Failure::Final(error @ RegistryError::Status { status: 416, .. })) if have > 0 => {
                self.start_over()?;
                return Err(Failure::again(error));
            }
            other => other?,
        };
        if response.status() != StatusCode::PARTIAL_CONTENT && have > 0 {
            // A registry without ranges sends all bytes.
            self.start_over()?;
        }
        let start = self.length();
        if start > 0 && !continues(&response, start, self.blob.size) {
            return Err(self.session.wrong(&self.what, "another part than was asked for").into());
        }
        let left = self.blob.size - start;
        if let Some(length) = response.content_length().filter(|length| *length != left) {
            let reason = format!("{length} bytes where {left} should come");
            return Err(self.session.wrong(&self.what, &reason).into());
        }
        self.joined |= start > 0;
        self.stream(response, left).await?;
        match self.length() {
            length if length < self.blob.size => Err(Failure::again(RegistryError::Short {
                registry: self.session.registry(),
                what: self.what.clone(),
                got: length,
                size: self.blob.size,
                attempts: 1,
            })),
            _ => Ok(()),
        }
    }

    /// Receives an answer; a thread hashes and writes meanwhile.
    async fn stream(&self, mut response: Response, left: u64) -> Result<(), Failure> {
        let (pieces, mut queue) = mpsc::channel(PIECES_IN_FLIGHT);
        let (content, share) = (Arc::clone(&self.content), Arc::clone(self.share));
        let writer = blocking(move || -> Result<(), RegistryError> {
            let mut content = content.lock().unwrap_or_else(PoisonError::into_inner);
            while let Some(piece) = queue.blocking_recv() {
                let piece: &[u8] = AsRef::<[u8]>::as_ref(&piece);
                content.append(piece)?;
                share.moved(piece.len() as u64);
            }
            Ok(())
        });
        let receiver = async move {
            let mut got = 0;
            loop {
                let piece = match tokio::time::timeout(self.session.patience.stall, response.chunk()).await {
                    Err(_) => return Err(Failure::again(self.session.stalled(&self.what))),
                    Ok(Err(source)) => return Err(self.session.connection_failed(&self.what, source)),
                    Ok(Ok(None)) => return Ok(()),
                    Ok(Ok(Some(piece))) => piece,
                };
                got += piece.len() as u64;
                if got > left {
                    return Err(self.session.wrong(&self.what, "more bytes than it has").into());
                }
                if pieces.send(piece).await.is_err() {
                    // The writer has failed, and returns the error.
                    return Ok(());
                }
            }
        };
        let (received, written) = tokio::join!(receiver, writer);
        written?;
        received
    }
}

/// Returns whether the answer is the part from `start` to the end of `size` bytes.
fn continues(response: &Response, start: u64, size: u64) -> bool {
    let range = response.headers().get(CONTENT_RANGE).and_then(|value| value.to_str().ok());
    range.is_some_and(|range| {
        range == format!("bytes {start}-{}/{size}", size - 1) || range == format!("bytes {start}-{}/*", size - 1)
    })
}

/// Runs blocking work in a thread.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => value,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // Only a runtime that shuts down cancels a thread's work; nobody waits here then.
            Err(_) => std::future::pending().await,
        },
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::PathBuf;

    use oci_client::RegistryOperation;
    use snapshot::Store;

    use super::*;
    use crate::progress::{Meter, Totals};
    use crate::target::Target;
    use crate::testing::{Fake, Fault, patience};

    fn content() -> Vec<u8> {
        (0..3_000_000_u32).map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect()
    }

    fn layer(digest: Digest, size: usize) -> Layer {
        Layer { media_type: "x".into(), digest, size: size as u64, annotations: BTreeMap::new() }
    }

    struct Outcome {
        result: Result<(), PullError>,
        left: Vec<u8>,
        totals: Totals,
    }

    impl Outcome {
        fn error(self) -> String {
            crate::testing::chain(&self.result.unwrap_err())
        }
    }

    /// A store with an earlier process's part of a blob.
    struct Begun {
        store: Store,
        _root: tempfile::TempDir,
    }

    impl Begun {
        fn new() -> Self {
            let root = tempfile::tempdir().unwrap();
            Self { store: Store::open(root.path()).unwrap(), _root: root }
        }

        fn path(&self, blob: &Layer) -> PathBuf {
            self.store.root().join("partial").join(blob.digest.hex())
        }

        fn with(self, blob: &Layer, content: &[u8]) -> Self {
            std::fs::write(self.path(blob), content).unwrap();
            self
        }

        async fn download(&self, fake: &Fake, blob: &Layer) -> Outcome {
            let meter = Arc::new(Meter::default());
            let session = Session::open(&fake.target(), RegistryOperation::Pull, &patience(), &meter).await;
            let partial = self.store.partial(&blob.digest).unwrap().unwrap();
            let result = match session {
                Ok(session) => download(&session, blob, partial, &Arc::new(Share::new(&meter))).await,
                Err(error) => Err(error.into()),
            };
            Outcome { result, left: std::fs::read(self.path(blob)).unwrap(), totals: meter.read() }
        }
    }

    async fn download_anew(fake: &Fake, blob: &Layer) -> Outcome {
        Begun::new().download(fake, blob).await
    }

    #[tokio::test]
    async fn a_connection_cut_in_the_middle_goes_on_from_there() {
        let (fake, content) = (Fake::start(), content());
        let blob = layer(fake.put(&content), content.len());
        for after in [0, 1_200_000, 1, 500_000] {
            fake.fault("GET /v2/team/vit/blobs/", Fault::Cut(after));
        }
        let outcome = download_anew(&fake, &blob).await;
        outcome.result.unwrap();
        assert_eq!(outcome.left, content);
        assert_eq!(fake.sent(), blob.size, "no byte was asked for twice");
        assert_eq!(outcome.totals, Totals { moved: blob.size, ..Totals::default() });
    }

    #[tokio::test]
    async fn what_an_earlier_run_left_is_gone_on_from() {
        let (fake, content) = (Fake::start(), content());
        let blob = layer(fake.put(&content), content.len());
        let outcome = Begun::new().with(&blob, &content[..2_000_000]).download(&fake, &blob).await;
        outcome.result.unwrap();
        assert_eq!((outcome.left, fake.sent()), (content, 1_000_000));
        assert_eq!(outcome.totals.present, 2_000_000);
    }

    #[tokio::test]
    async fn what_an_earlier_run_left_is_thrown_away_if_it_is_damaged() {
        let (fake, content) = (Fake::start(), content());
        let blob = layer(fake.put(&content), content.len());
        for left in [vec![7; 2_000_000], vec![7; content.len()], vec![7; content.len() + 5]] {
            let outcome = Begun::new().with(&blob, &left).download(&fake, &blob).await;
            outcome.result.unwrap();
            assert_eq!(outcome.left, content);
        }
    }

    #[tokio::test]
    async fn a_registry_that_lies_about_content_is_believed_nothing() {
        let (fake, content) = (Fake::start(), content());
        let blob = layer(fake.put(&content), content.len());
        let mut other = content.clone();
        other[1_234_567] ^= 1;
        fake.fault("GET /v2/team/vit/blobs/", Fault::Lie(other));
        let outcome = download_anew(&fake, &blob).await;
        assert!(outcome.left.is_empty());
        let error = outcome.error();
        assert!(
            error.contains("its content has another digest") && error.contains("nothing of it was kept"),
            "{error}"
        );
        assert_eq!(fake.count("GET /v2/team/vit/blobs/"), 1, "a lie is not asked for again");
    }

    #[tokio::test]
    async fn a_registry_that_lies_about_sizes_is_found_out_before_a_byte_is_kept() {
        let (fake, content) = (Fake::start(), content());
        for size in [content.len() - 1, content.len() + 1, 0] {
            let outcome = download_anew(&fake, &layer(fake.put(&content), size)).await;
            assert!(outcome.left.is_empty());
            outcome.result.unwrap_err();
        }
        fake.fault("GET /v2/team/vit/blobs/", Fault::Endless);
        let outcome = download_anew(&fake, &layer(fake.put(&content), content.len())).await;
        assert!(outcome.left.len() <= content.len());
        let error = outcome.error();
        assert!(error.contains("more bytes than it has"), "{error}");
    }

    #[tokio::test]
    async fn a_registry_without_ranges_sends_all_again() {
        let (fake, content) = (Fake::start(), content());
        let blob = layer(fake.put(&content), content.len());
        fake.fault("GET /v2/team/vit/blobs/", Fault::Cut(1_500_000));
        fake.fault("GET /v2/team/vit/blobs/", Fault::IgnoreRange(usize::MAX));
        let outcome = download_anew(&fake, &blob).await;
        outcome.result.unwrap();
        assert_eq!(outcome.left, content);
        assert_eq!(outcome.totals, Totals { moved: blob.size, lost: 1_500_000, ..Totals::default() });
    }

    #[tokio::test]
    async fn a_registry_without_ranges_that_always_breaks_off_is_given_up_on() {
        let (fake, content) = (Fake::start(), content());
        let blob = layer(fake.put(&content), content.len());
        for _ in 0..100 {
            fake.fault("GET /v2/team/vit/blobs/", Fault::IgnoreRange(2_000_000));
        }
        let error = download_anew(&fake, &blob).await.error();
        assert!(error.contains("attempts"), "{error}");
        assert!(fake.count("GET /v2/team/vit/blobs/") <= 5);
    }

    #[tokio::test]
    async fn a_stall_ends_the_connection_and_not_the_download() {
        let (fake, content) = (Fake::start(), content());
        let blob = layer(fake.put(&content), content.len());
        fake.fault("GET /v2/team/vit/blobs/", Fault::Stall(1_100_000));
        let outcome = download_anew(&fake, &blob).await;
        outcome.result.unwrap();
        assert_eq!(outcome.left, content);
    }

    #[tokio::test]
    async fn a_registry_that_always_stalls_is_given_up_on_with_one_line() {
        let (fake, content) = (Fake::start(), content());
        let blob = layer(fake.put(&content), content.len());
        for _ in 0..4 {
            fake.fault("GET /v2/team/vit/blobs/", Fault::Stall(10));
        }
        let outcome = download_anew(&fake, &blob).await;
        assert_eq!(outcome.left, content[..40], "what came is kept for the next time");
        let error = outcome.error();
        assert!(error.contains("stalls: no byte of blob") && error.contains("(4 attempts)"), "{error}");
    }

    #[tokio::test]
    async fn a_registry_in_trouble_is_asked_again_and_one_that_refuses_is_not() {
        let (fake, content) = (Fake::start(), content());
        let blob = layer(fake.put(&content), content.len());
        for status in [500, 503, 429] {
            fake.status("GET /v2/team/vit/blobs/", status);
        }
        download_anew(&fake, &blob).await.result.unwrap();
        for (status, says) in [(403, "refuses access to blob"), (404, "has no blob"), (400, "answers 400 to blob")] {
            let before = fake.count("GET /v2/team/vit/blobs/");
            fake.status("GET /v2/team/vit/blobs/", status);
            let error = download_anew(&fake, &blob).await.error();
            assert!(error.contains(says), "{error}");
            assert_eq!(fake.count("GET /v2/team/vit/blobs/"), before + 1);
        }
        for _ in 0..4 {
            fake.status("GET /v2/team/vit/blobs/", 500);
        }
        let error = download_anew(&fake, &blob).await.error();
        assert!(error.contains("answers 500") && error.contains("(4 attempts)"), "{error}");
    }

    #[tokio::test]
    async fn a_registry_that_asks_for_patience_gets_it_within_reason() {
        let (fake, content) = (Fake::start(), content());
        let blob = layer(fake.put(&content), content.len());
        let wait = |seconds: u64| Fault::Status(429, format!("Retry-After: {seconds}"), "slow down\x1b[2J".into());
        fake.fault("GET /v2/team/vit/blobs/", wait(1));
        let begun = std::time::Instant::now();
        download_anew(&fake, &blob).await.result.unwrap();
        assert!(begun.elapsed() >= std::time::Duration::from_secs(1));
        fake.fault("GET /v2/team/vit/blobs/", wait(3600));
        let error = download_anew(&fake, &blob).await.error();
        assert!(error.contains("429") && error.contains("3600 s") && !error.contains('\x1b'), "{error}");
    }

    #[tokio::test]
    async fn a_token_that_expires_is_renewed() {
        let (fake, content) = (Fake::start(), content());
        fake.want_login();
        let blob = layer(fake.put(&content), content.len());
        download_anew(&fake, &blob).await.result.unwrap();
        let session =
            Session::open(&fake.target(), RegistryOperation::Pull, &patience(), &Arc::default()).await.unwrap();
        fake.expire();
        let begun = Begun::new();
        let partial = begun.store.partial(&blob.digest).unwrap().unwrap();
        let share = Arc::new(Share::new(&Arc::new(Meter::default())));
        download(&session, &blob, partial, &share).await.unwrap();
    }

    #[tokio::test]
    async fn who_is_not_let_in_is_told_how_to_log_in() {
        let (fake, content) = (Fake::start(), content());
        let blob = layer(fake.put(&content), content.len());
        for _ in 0..2 {
            fake.status("GET /v2/team/vit/blobs/", 401);
        }
        let error = download_anew(&fake, &blob).await.error();
        assert!(error.contains("refuses access") && error.contains("docker login 127.0.0.1"), "{error}");
        fake.want_login();
        fake.fault("GET /token", Fault::Status(401, String::new(), "wrong password".into()));
        let error = download_anew(&fake, &blob).await.error();
        assert!(error.contains("(wrong password)") && error.contains("docker login"), "{error}");
    }

    #[tokio::test]
    async fn nobody_at_the_other_end_is_one_line_too() {
        let fake = Fake::start();
        let blob = layer(Digest::of(b""), 0);
        let nobody = Target::parse("127.0.0.1:1/a", false).unwrap();
        let Err(error) = Session::open(&nobody, RegistryOperation::Pull, &patience(), &Arc::default()).await else {
            panic!()
        };
        let error = crate::testing::chain(&error);
        assert!(error.contains("no working connection to 127.0.0.1:1") && error.contains("refused"), "{error}");
        assert!(download_anew(&fake, &blob).await.result.is_ok(), "an empty blob needs no registry");
    }
}
