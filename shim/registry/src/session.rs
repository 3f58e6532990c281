//! Session with one registry: authorization, bounded answers, bounded retries.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use oci_client::RegistryOperation;
use oci_client::client::{ClientConfig, ClientProtocol};
use oci_client::errors::OciDistributionError;
use oci_client::secrets::RegistryAuth;
use reqwest::header::{HeaderValue, RETRY_AFTER};
use reqwest::{Method, RequestBuilder, Response, StatusCode, Url};
use serde::Deserialize;

use crate::credentials::credentials;
use crate::error::RegistryError;
use crate::progress::Meter;
use crate::target::Target;

/// Most bytes read of an answer with an error.
const ERROR_BODY: usize = 16 << 10;
/// Most characters shown of such an answer.
const ERROR_SHOWN: usize = 200;
/// Longest pause between two attempts, unless the registry requests more.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// Options of a transfer.
#[derive(Clone, Debug)]
pub struct Options {
    /// Blobs moved at a time.
    pub jobs: usize,
    /// Limits of waits and attempts.
    pub patience: Patience,
}

impl Default for Options {
    fn default() -> Self {
        Self { jobs: 6, patience: Patience::default() }
    }
}

/// Limits after which a transfer gives up on a registry.
#[derive(Clone, Debug)]
pub struct Patience {
    /// Limit for establishing a connection.
    pub connect: Duration,
    /// Limit without a moved byte, or for the answer to a sent request.
    pub stall: Duration,
    /// Attempts at one request without progress.
    pub attempts: u32,
    /// Pause after the first attempt, doubled after each further one.
    pub pause: Duration,
    /// Longest wait that a registry may request (`Retry-After`).
    pub longest_wait: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            stall: Duration::from_secs(60),
            attempts: 5,
            pause: Duration::from_millis(300),
            longest_wait: Duration::from_secs(120),
        }
    }
}

/// Failure of one attempt, and whether a retry makes sense.
pub(crate) enum Failure {
    Again {
        error: RegistryError,
        /// Wait requested by the registry.
        wait: Option<Duration>,
        /// True if the attempt made progress.
        further: bool,
    },
    LoggedOut {
        error: RegistryError,
        used: Arc<Authorization>,
    },
    Final(RegistryError),
}

impl From<RegistryError> for Failure {
    fn from(error: RegistryError) -> Self {
        Self::Final(error)
    }
}

impl Failure {
    pub(crate) fn again(error: RegistryError) -> Self {
        Self::Again { error, wait: None, further: false }
    }

    pub(crate) fn got_further(self, further: bool) -> Self {
        match self {
            Self::Again { error, wait, .. } => Self::Again { error, wait, further },
            other => other,
        }
    }
}

pub(crate) enum Authorization {
    None,
    Basic(String, String),
    Bearer(String),
}

/// An answer in the error format of the distribution specification.
#[derive(Deserialize)]
struct Envelope {
    errors: Vec<EnvelopeError>,
}

#[derive(Deserialize)]
struct EnvelopeError {
    code: String,
    #[serde(default)]
    message: String,
}

pub(crate) struct Session {
    http: reqwest::Client,
    login: oci_client::Client,
    pub(crate) target: Target,
    base: Url,
    credentials: RegistryAuth,
    operation: RegistryOperation,
    authorization: Mutex<Arc<Authorization>>,
    /// Lock that allows one renewal at a time.
    renewal: tokio::sync::Mutex<()>,
    pub(crate) patience: Patience,
    meter: Arc<Meter>,
}

impl Session {
    /// Opens a session for `operation`, and logs in if the registry requires that.
    pub(crate) async fn open(
        target: &Target,
        operation: RegistryOperation,
        patience: &Patience,
        meter: &Arc<Meter>,
    ) -> Result<Self, RegistryError> {
        let registry = target.registry();
        // Fails if a provider is installed already; that one serves as well.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = |source| RegistryError::Client { registry: registry.to_owned(), source };
        // No read timeout: reqwest's also runs while a request is sent, and would end every slow
        // upload.
        let mut http = reqwest::Client::builder()
            .connect_timeout(patience.connect)
            .https_only(!target.plain_http)
            .user_agent(concat!("gpusnap/", env!("CARGO_PKG_VERSION")));
        if target.is_loopback() {
            http = http.no_proxy();
        }
        let scheme = if target.plain_http { "http" } else { "https" };
        let base = Url::parse(&format!("{scheme}://{registry}/v2/{}/", target.reference.repository()));
        let base = base.map_err(|error| wrong(registry, "its name", &error.to_string()))?;
        // A made-up proxy, for an unused scheme and no host, is the only way to disable proxies.
        let no_proxy = target.is_loopback();
        let login = oci_client::Client::try_from(ClientConfig {
            https_proxy: no_proxy.then(|| "http://localhost".to_owned()),
            no_proxy: no_proxy.then(|| "*".to_owned()),
            protocol: if target.plain_http { ClientProtocol::Http } else { ClientProtocol::Https },
            connect_timeout: Some(patience.connect),
            read_timeout: Some(patience.stall),
            ..ClientConfig::default()
        });
        let login = login.map_err(|error| wrong(registry, "its name", &error.to_string()))?;
        let session = Self {
            http: http.build().map_err(client)?,
            login,
            base,
            credentials: credentials(registry)?,
            operation,
            authorization: Mutex::new(Arc::new(Authorization::None)),
            renewal: tokio::sync::Mutex::new(()),
            patience: patience.clone(),
            target: target.clone(),
            meter: Arc::clone(meter),
        };
        session.persist(async || session.log_in().await).await?;
        Ok(session)
    }

    async fn log_in(&self) -> Result<(), Failure> {
        let asked = self.login.auth(&self.target.reference, &self.credentials, self.operation);
        let token = match tokio::time::timeout(self.patience.stall, asked).await {
            Err(_) => return Err(Failure::again(self.stalled("the login"))),
            Ok(Ok(token)) => token,
            Ok(Err(OciDistributionError::RequestError(source))) => {
                return Err(self.connection_failed("the login", source));
            }
            Ok(Err(OciDistributionError::AuthenticationFailure(message))) => {
                let message = said(message.as_bytes()).unwrap_or_else(|| "no reason given".to_owned());
                return Err(RegistryError::Login { registry: self.registry(), message }.into());
            }
            Ok(Err(error)) => return Err(self.wrong("an answer to the login", &error.to_string()).into()),
        };
        let authorization = match (token, &self.credentials) {
            (Some(token), _) => Authorization::Bearer(token),
            (None, RegistryAuth::Basic(user, password)) => Authorization::Basic(user.clone(), password.clone()),
            (None, _) => Authorization::None,
        };
        *self.authorization.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(authorization);
        Ok(())
    }

    fn authorization(&self) -> Arc<Authorization> {
        Arc::clone(&self.authorization.lock().unwrap_or_else(PoisonError::into_inner))
    }

    async fn renew(&self, used: &Arc<Authorization>) -> Result<(), Failure> {
        let _one = self.renewal.lock().await;
        if !Arc::ptr_eq(used, &self.authorization()) {
            return Ok(());
        }
        match self.log_in().await {
            // The credentials were valid when the session began.
            Err(Failure::Final(error @ RegistryError::Login { .. })) => Err(Failure::again(error)),
            other => other,
        }
    }

    /// Repeats `attempt` within the limits of [`Patience`].
    pub(crate) async fn persist<T>(
        &self,
        mut attempt: impl AsyncFnMut() -> Result<T, Failure>,
    ) -> Result<T, RegistryError> {
        let mut number = 1;
        let mut renewed = false;
        loop {
            let failure = match attempt().await {
                Err(Failure::LoggedOut { error, used }) if !renewed => {
                    renewed = true;
                    match self.renew(&used).await {
                        // Without a login there is nothing to renew.
                        Ok(()) if matches!(*self.authorization(), Authorization::None) => Failure::Final(error),
                        Ok(()) => continue,
                        Err(failure) => failure,
                    }
                }
                Err(failure) => failure,
                Ok(value) => return Ok(value),
            };
            let (error, wait, further) = match failure {
                Failure::Final(error) | Failure::LoggedOut { error, .. } => return Err(error.after(number)),
                Failure::Again { error, wait, further } => (error, wait, further),
            };
            if further {
                number = 1;
                renewed = false;
            }
            if number >= self.patience.attempts || wait.is_some_and(|wait| wait > self.patience.longest_wait) {
                return Err(error.after(number));
            }
            let pause = self.patience.pause.saturating_mul(1 << (number - 1).min(16)).min(LONGEST_PAUSE);
            let pause = wait.unwrap_or(pause);
            self.meter.set_trouble(error.to_string());
            tokio::time::sleep(pause).await;
            number += 1;
        }
    }

    /// A URL below the repository's: `manifests/TAG`, `blobs/DIGEST`.
    pub(crate) fn url(&self, path: &str) -> Result<Url, Failure> {
        self.base.join(path).map_err(|error| self.wrong(path, &error.to_string()).into())
    }

    /// The URL of a `Location` header, relative to the request's.
    pub(crate) fn location(&self, what: &str, response: &Response) -> Result<Url, Failure> {
        let header = response.headers().get(reqwest::header::LOCATION).and_then(|value| value.to_str().ok());
        let url = header.and_then(|text| response.url().join(text).ok());
        url.ok_or_else(|| self.wrong(what, "no Location header").into())
    }

    /// A request, with authorization if sent to the registry itself. Other hosts, as of signed
    /// links to a cloud's storage, must not see the authorization.
    pub(crate) fn request(&self, method: Method, url: Url) -> (RequestBuilder, Arc<Authorization>) {
        let authorization = self.authorization();
        let ours = url.origin() == self.base.origin();
        let request = self.http.request(method, url);
        let request = match &*authorization {
            Authorization::Basic(user, password) if ours => request.basic_auth(user, Some(password)),
            Authorization::Bearer(token) if ours => request.bearer_auth(token),
            _ => request,
        };
        (request, authorization)
    }

    /// Sends a request without a large body, and classifies the answer.
    pub(crate) async fn send(
        &self,
        what: &str,
        (request, used): (RequestBuilder, Arc<Authorization>),
    ) -> Result<Response, Failure> {
        match tokio::time::timeout(self.patience.stall, request.send()).await {
            Err(_) => Err(Failure::again(self.stalled(what))),
            Ok(Err(source)) => Err(self.connection_failed(what, source)),
            Ok(Ok(response)) => self.sorted(what, response, used).await,
        }
    }

    /// Returns a successful answer; classifies any other as a failure.
    pub(crate) async fn sorted(
        &self,
        what: &str,
        response: Response,
        used: Arc<Authorization>,
    ) -> Result<Response, Failure> {
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let wait = response.headers().get(RETRY_AFTER).and_then(seconds);
        let body = self.body(what, response, ERROR_BODY).await.unwrap_or_default();
        let (registry, what) = (self.registry(), what.to_owned());
        let mut message = said(&body).map(|said| format!(" ({said})")).unwrap_or_default();
        if let Some(wait) = wait {
            message += &format!(", and asks for a pause of {} s", wait.as_secs());
        }
        Err(match status {
            StatusCode::UNAUTHORIZED => {
                Failure::LoggedOut { error: RegistryError::Refused { registry, what, message }, used }
            }
            StatusCode::FORBIDDEN => RegistryError::Refused { registry, what, message }.into(),
            StatusCode::NOT_FOUND => RegistryError::NotFound { registry, what, message }.into(),
            _ => {
                let error = RegistryError::Status { registry, what, status: status.as_u16(), message, attempts: 1 };
                match status {
                    StatusCode::REQUEST_TIMEOUT
                    | StatusCode::TOO_MANY_REQUESTS
                    | StatusCode::INTERNAL_SERVER_ERROR
                    | StatusCode::BAD_GATEWAY
                    | StatusCode::SERVICE_UNAVAILABLE
                    | StatusCode::GATEWAY_TIMEOUT => Failure::Again { error, wait, further: false },
                    _ => error.into(),
                }
            }
        })
    }

    /// A body of at most `cap` bytes; a longer one is refused before it takes memory.
    pub(crate) async fn body(&self, what: &str, mut response: Response, cap: usize) -> Result<Vec<u8>, Failure> {
        let too_large = || Failure::from(self.wrong(what, &format!("more than {cap} bytes")));
        if response.content_length().is_some_and(|length| usize::try_from(length).is_ok_and(|length| length > cap)) {
            return Err(too_large());
        }
        let read = async {
            let mut body = Vec::new();
            while let Some(piece) = response.chunk().await.map_err(|source| self.connection_failed(what, source))? {
                if body.len() + piece.len() > cap {
                    return Err(too_large());
                }
                body.extend_from_slice(&piece);
            }
            Ok(body)
        };
        let read = tokio::time::timeout(self.patience.stall, read).await;
        read.unwrap_or_else(|_| Err(Failure::again(self.stalled(what))))
    }

    pub(crate) fn registry(&self) -> String {
        self.target.registry().to_owned()
    }

    pub(crate) fn connection_failed(&self, what: &str, source: reqwest::Error) -> Failure {
        let again = !(source.is_builder() || source.is_redirect());
        // The error's URL may carry the signature of a link to a cloud's storage.
        let source = source.without_url();
        if is_about_certificate(&source) {
            return RegistryError::Certificate { registry: self.registry(), source }.into();
        }
        let error = RegistryError::Connection { registry: self.registry(), what: what.to_owned(), attempts: 1, source };
        if again { Failure::again(error) } else { error.into() }
    }

    pub(crate) fn stalled(&self, what: &str) -> RegistryError {
        let seconds = self.patience.stall.as_secs();
        RegistryError::Stalled { registry: self.registry(), what: what.to_owned(), seconds, attempts: 1 }
    }

    pub(crate) fn wrong(&self, what: &str, reason: &str) -> RegistryError {
        wrong(self.target.registry(), what, reason)
    }
}

/// Returns whether a certificate is at fault; retries cannot help.
fn is_about_certificate(error: &(dyn std::error::Error + 'static)) -> bool {
    if matches!(error.downcast_ref(), Some(rustls::Error::InvalidCertificate(_))) {
        return true;
    }
    // The wrapped error of an input error is not its source.
    let wrapped = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
    wrapped.is_some_and(|wrapped| is_about_certificate(wrapped)) || error.source().is_some_and(is_about_certificate)
}

fn wrong(registry: &str, what: &str, reason: &str) -> RegistryError {
    RegistryError::Wrong { registry: registry.to_owned(), what: what.to_owned(), reason: one_line(reason) }
}

/// Parses `Retry-After` in seconds; the other form, a date, is for caches.
pub(crate) fn seconds(value: &HeaderValue) -> Option<Duration> {
    value.to_str().ok()?.trim().parse().ok().map(Duration::from_secs)
}

/// The message in an error's body, fit for display.
pub(crate) fn said(body: &[u8]) -> Option<String> {
    let text = match serde_json::from_slice::<Envelope>(body) {
        Ok(Envelope { errors }) => {
            let error = errors.into_iter().next()?;
            if error.message.is_empty() { error.code } else { error.message }
        }
        Err(_) => String::from_utf8_lossy(body).into_owned(),
    };
    // A page for browsers is of no use on a terminal.
    let text = one_line(&text);
    (!text.is_empty() && !text.starts_with('<')).then_some(text)
}

/// Foreign text on one line, shortened, without control characters.
pub(crate) fn one_line(text: &str) -> String {
    let mut line = String::new();
    for word in text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|word| !word.is_empty()) {
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
        if let Some((end, _)) = line.char_indices().nth(ERROR_SHOWN) {
            line.truncate(end);
            line.push('…');
            break;
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_registry_says_cannot_steer_a_terminal() {
        assert_eq!(one_line("a\x1b[2Jb\n\n c\u{9b}1m"), "a [2Jb c 1m");
        let long = one_line(&"x".repeat(100_000));
        assert_eq!(long.chars().count(), ERROR_SHOWN + 1);
    }

    #[test]
    fn the_message_of_an_error_is_found_in_its_envelope() {
        let body = br#"{"errors":[{"code":"DENIED","message":"quota exceeded","detail":null}]}"#;
        assert_eq!(said(body).as_deref(), Some("quota exceeded"));
        assert_eq!(said(br#"{"errors":[{"code":"DENIED"}]}"#).as_deref(), Some("DENIED"));
        assert_eq!(said(br#"{"errors":[]}"#), None);
        assert_eq!(said(b"<html>oops</html>"), None);
        assert_eq!(said(b"no such thing\n").as_deref(), Some("no such thing"));
    }
}
