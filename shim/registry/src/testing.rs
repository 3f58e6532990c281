//! A registry in this process with faults on demand.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use snapshot::Digest;

use crate::session::Patience;
use crate::target::Target;

/// A fault of one request.
#[derive(Clone)]
pub(crate) enum Fault {
    /// An answer with this status, these further header lines and this body.
    Status(u16, String, String),
    /// The connection ends after this many bytes of the body.
    Cut(usize),
    /// The body stalls after this many bytes.
    Stall(usize),
    /// Other content in the blob's place.
    Lie(Vec<u8>),
    /// The whole content in spite of a range, cut after this many bytes.
    IgnoreRange(usize),
    /// An endless body without a length.
    Endless,
    /// The connection ends after this many bytes of the request's body.
    CutRequest(usize),
    /// The request's body is never read.
    StallRequest,
}

#[derive(Default)]
struct State {
    blobs: Mutex<HashMap<String, Vec<u8>>>,
    manifests: Mutex<HashMap<String, Vec<u8>>>,
    faults: Mutex<Vec<(&'static str, Fault)>>,
    log: Mutex<Vec<String>>,
    /// User and password, and the tokens issued and still valid.
    login: Mutex<Option<(String, Vec<String>)>>,
    tokens: AtomicU64,
    sent: AtomicU64,
}

/// A fake registry, which serves until the test ends.
#[derive(Clone)]
pub(crate) struct Fake {
    address: String,
    state: Arc<State>,
}

struct Request {
    line: String,
    path: String,
    method: String,
    headers: HashMap<String, String>,
}

impl Fake {
    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let fake = Self { address: listener.local_addr().unwrap().to_string(), state: Arc::default() };
        let server = fake.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (server, stream) = (server.clone(), stream.unwrap());
                std::thread::spawn(move || server.answer(stream));
            }
        });
        fake
    }

    pub(crate) fn target(&self) -> Target {
        Target::parse(&format!("{}/team/vit:warm", self.address), false).unwrap()
    }

    /// Makes the next request whose line contains `request` fail, once per call.
    pub(crate) fn fault(&self, request: &'static str, fault: Fault) {
        self.state.faults.lock().unwrap().push((request, fault));
    }

    pub(crate) fn status(&self, request: &'static str, status: u16) {
        self.fault(request, Fault::Status(status, String::new(), String::new()));
    }

    pub(crate) fn put(&self, content: &[u8]) -> Digest {
        let digest = Digest::of(content);
        self.state.blobs.lock().unwrap().insert(digest.to_string(), content.to_vec());
        digest
    }

    pub(crate) fn blob(&self, digest: Digest) -> Option<Vec<u8>> {
        self.state.blobs.lock().unwrap().get(&digest.to_string()).cloned()
    }

    pub(crate) fn put_manifest(&self, tag: &str, content: &[u8]) {
        self.state.manifests.lock().unwrap().insert(tag.to_owned(), content.to_vec());
    }

    pub(crate) fn manifest(&self, tag: &str) -> Option<Vec<u8>> {
        self.state.manifests.lock().unwrap().get(tag).cloned()
    }

    /// Requires a token from now on.
    pub(crate) fn want_login(&self) {
        *self.state.login.lock().unwrap() = Some((String::new(), Vec::new()));
    }

    /// Revokes all tokens.
    pub(crate) fn expire(&self) {
        if let Some((_, tokens)) = &mut *self.state.login.lock().unwrap() {
            tokens.clear();
        }
    }

    /// Requests so far, as `METHOD PATH`, with the requested range.
    pub(crate) fn log(&self) -> Vec<String> {
        self.state.log.lock().unwrap().clone()
    }

    pub(crate) fn count(&self, request: &str) -> usize {
        self.log().iter().filter(|line| line.contains(request)).count()
    }

    /// Bytes of blobs sent so far.
    pub(crate) fn sent(&self) -> u64 {
        self.state.sent.load(Ordering::SeqCst)
    }

    fn answer(&self, stream: TcpStream) {
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        let Some(request) = read_request(&mut reader) else { return };
        let range = request.headers.get("range").map(|range| format!(" {range}")).unwrap_or_default();
        self.state.log.lock().unwrap().push(format!("{} {}{range}", request.method, request.path));
        let fault = {
            let mut faults = self.state.faults.lock().unwrap();
            let at = faults.iter().position(|(matches, _)| request.line.contains(matches));
            at.map(|at| faults.remove(at).1)
        };
        // A client that hangs up is no failure of the test.
        let _ = self.serve(&request, fault, reader, stream);
    }

    fn serve(
        &self,
        request: &Request,
        fault: Option<Fault>,
        mut reader: BufReader<TcpStream>,
        mut stream: TcpStream,
    ) -> std::io::Result<()> {
        let length = request.headers.get("content-length").map_or(0, |length| length.parse().unwrap());
        match &fault {
            Some(Fault::Status(status, headers, body)) => {
                let _ = std::io::copy(&mut reader.by_ref().take(length), &mut std::io::sink());
                return respond(&mut stream, *status, headers, body.as_bytes());
            }
            Some(Fault::CutRequest(after)) => {
                let mut read = vec![0; *after];
                return reader.read_exact(&mut read);
            }
            Some(Fault::StallRequest) => {
                std::thread::sleep(Duration::from_secs(600));
                return Ok(());
            }
            _ => {}
        }
        let mut body = vec![0; usize::try_from(length).unwrap()];
        reader.read_exact(&mut body)?;
        if request.path.starts_with("/token") {
            let token = format!("token-{}", self.state.tokens.fetch_add(1, Ordering::SeqCst));
            self.state.login.lock().unwrap().as_mut().unwrap().1.push(token.clone());
            return respond(&mut stream, 200, "", format!("{{\"token\":\"{token}\"}}").as_bytes());
        }
        if let Some((_, tokens)) = &*self.state.login.lock().unwrap() {
            let given = request.headers.get("authorization").and_then(|value| value.strip_prefix("Bearer "));
            if !given.is_some_and(|given| tokens.iter().any(|token| token == given)) {
                let realm =
                    format!("WWW-Authenticate: Bearer realm=\"http://{}/token\",service=\"fake\"", self.address);
                return respond(&mut stream, 401, &realm, b"");
            }
        }
        let (path, query) = request.path.split_once('?').unwrap_or((&request.path, ""));
        let digest = query.split('&').find_map(|pair| pair.strip_prefix("digest=")).map(|d| d.replace("%3A", ":"));
        let last = path.rsplit('/').next().unwrap_or_default();
        match request.method.as_str() {
            "GET" if path == "/v2/" => respond(&mut stream, 200, "", b"{}"),
            "GET" if path.contains("/manifests/") => match self.manifest(last) {
                Some(content) => self.content(&mut stream, &content, 0, fault),
                None => respond(&mut stream, 404, "", b""),
            },
            "PUT" if path.contains("/manifests/") => {
                self.put_manifest(last, &body);
                respond(&mut stream, 201, "Location: /here", b"")
            }
            "HEAD" | "GET" => {
                let content = self.state.blobs.lock().unwrap().get(last).cloned();
                let Some(content) = content else { return respond(&mut stream, 404, "", b"") };
                if request.method == "HEAD" {
                    return write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", content.len());
                }
                let range = request.headers.get("range");
                let start = range.map_or(0, |r| r["bytes=".len()..].trim_end_matches('-').parse().unwrap());
                self.content(&mut stream, &content, start, fault)
            }
            "POST" => respond(&mut stream, 202, "Location: /v2/team/vit/blobs/uploads/1?state=x%2By", b""),
            "PUT" => {
                assert!(query.starts_with("state=x%2By&"), "{query}");
                if Some(Digest::of(&body).to_string()) != digest {
                    let body = br#"{"errors":[{"code":"DIGEST_INVALID","message":"it did not match"}]}"#;
                    return respond(&mut stream, 400, "", body);
                }
                self.put(&body);
                respond(&mut stream, 201, "Location: /there", b"")
            }
            _ => respond(&mut stream, 405, "", b""),
        }
    }

    fn content(&self, out: &mut TcpStream, all: &[u8], start: usize, fault: Option<Fault>) -> std::io::Result<()> {
        let mut start = start;
        let mut content = all.to_vec();
        let mut end = None;
        match fault {
            Some(Fault::Lie(other)) => content = other,
            Some(Fault::Cut(after)) => end = Some((after, false)),
            Some(Fault::Stall(after)) => end = Some((after, true)),
            Some(Fault::IgnoreRange(after)) => (start, end) = (0, Some((after, false))),
            Some(Fault::Endless) => {
                write!(out, "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")?;
                loop {
                    out.write_all(&[b' '; 1 << 16])?;
                }
            }
            _ => {}
        }
        let part = &content[start.min(content.len())..];
        let (status, range) = match start {
            0 => ("200 OK", String::new()),
            _ => (
                "206 Partial Content",
                format!("Content-Range: bytes {start}-{}/{}\r\n", content.len() - 1, content.len()),
            ),
        };
        write!(out, "HTTP/1.1 {status}\r\nContent-Length: {}\r\n{range}Connection: close\r\n\r\n", part.len())?;
        let (sent, stall) = end.unwrap_or((part.len(), false));
        let sent = &part[..sent.min(part.len())];
        out.write_all(sent)?;
        self.state.sent.fetch_add(sent.len() as u64, Ordering::SeqCst);
        if stall {
            std::thread::sleep(Duration::from_secs(600));
        }
        Ok(())
    }
}

fn read_request(reader: &mut impl BufRead) -> Option<Request> {
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut words = line.split(' ');
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut headers = HashMap::new();
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).ok()?;
        let Some((name, value)) = header.trim_end().split_once(": ") else { break };
        headers.insert(name.to_ascii_lowercase(), value.to_owned());
    }
    Some(Request { line: line.trim_end().to_owned(), path, method, headers })
}

fn respond(out: &mut TcpStream, status: u16, headers: &str, body: &[u8]) -> std::io::Result<()> {
    let headers = if headers.is_empty() { String::new() } else { format!("{headers}\r\n") };
    let length = body.len();
    write!(out, "HTTP/1.1 {status} x\r\nContent-Length: {length}\r\n{headers}Connection: close\r\n\r\n")?;
    out.write_all(body)
}

/// Limits short enough for tests, and long enough for a busy machine to answer.
pub(crate) fn patience() -> Patience {
    Patience {
        connect: Duration::from_secs(5),
        stall: Duration::from_secs(2),
        attempts: 4,
        pause: Duration::from_millis(5),
        longest_wait: Duration::from_secs(2),
    }
}

pub(crate) use phase::chain;

/// A snapshot of these layers of memory, in a new store.
pub(crate) fn snapshot_of(root: &std::path::Path, name: &str, layers: &[&[u8]]) -> snapshot::Snapshot {
    let store = snapshot::Store::open(root).unwrap();
    let draft = store.draft().unwrap();
    let layers = layers.iter().enumerate().map(|(n, content)| {
        let path = draft.folder().join(format!("layer-{n}"));
        std::fs::write(&path, content).unwrap();
        let media_type = if n == 0 { snapshot::CRIU_TYPE } else { snapshot::GPU_MEMORY_TYPE };
        snapshot::NewLayer {
            media_type: media_type.into(),
            path: path.strip_prefix(draft.folder()).unwrap().into(),
            digest: None,
            annotations: std::collections::BTreeMap::new(),
        }
    });
    let new = snapshot::NewSnapshot {
        name: Some(name.parse().unwrap()),
        if_taken: snapshot::IfTaken::Move,
        config: snapshot::Config::new(1_795_000_000, name, "libcontainer", snapshot::Host::default()),
        layers: layers.collect(),
        subject: None,
        annotations: std::collections::BTreeMap::new(),
    };
    draft.publish(new, &|_| ()).unwrap()
}
