//! HTTP with ranges, redirects, time limits and bounded retries.

use std::{
    fmt,
    io::{self, Read},
    ops::Range,
    sync::Arc,
    time::Duration,
};

use tracing::{debug, warn};
use ureq::{
    Agent, Body,
    config::RedirectAuthHeaders,
    http::{Response, StatusCode, header},
};

use crate::{SourceError, SourceOptions, admission::Admission, digest::Digest};

/// Most redirects that are followed.
const REDIRECTS: u32 = 10;
/// Largest small file (config, tokenizer, listing) that is read into memory.
const MAX_SMALL: u64 = 256 << 20;
/// Header by which an object store says where a bucket is that was looked for elsewhere.
const BUCKET_REGION: &str = "x-amz-bucket-region";
/// Longest answer of a service that hands out tokens.
const MAX_TOKEN: u64 = 1 << 20;
/// Bytes of a range that are handed on at a time.
const POURED: usize = 256 << 10;

/// Takes bytes of a range, and their place.
pub(crate) type Sink<'a> = dyn FnMut(u64, &[u8]) -> Result<(), SourceError> + 'a;

/// A client that tries again.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    agent: Agent,
    retries: u32,
    backoff: Duration,
}

impl Client {
    pub(crate) fn new(options: &SourceOptions) -> Self {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(REDIRECTS)
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .timeout_connect(Some(options.timeout))
            .timeout_recv_response(Some(options.timeout))
            .timeout_per_read(Some(options.timeout))
            .user_agent(concat!("skein/", env!("CARGO_PKG_VERSION")))
            .accept_encoding("identity")
            .build();
        Self { agent: config.into(), retries: options.retries, backoff: options.backoff }
    }

    /// Runs `attempt` until it succeeds, fails for good, or the retries are used up.
    fn retry<T>(&self, place: &str, mut attempt: impl FnMut() -> Result<T, Failure>) -> Result<T, SourceError> {
        for n in 0.. {
            let source = match attempt() {
                Ok(value) => return Ok(value),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Passing(error)) if n >= self.retries => error,
                Err(Failure::Passing(error)) => {
                    debug!(place, attempt = n + 1, error = %error, "request failed, trying again");
                    std::thread::sleep(self.backoff * 2u32.saturating_pow(n));
                    continue;
                }
            };
            return Err(SourceError::Unreachable { place: place.to_owned(), attempts: n + 1, source });
        }
        Err(SourceError::Unreachable { place: place.to_owned(), attempts: 0, source: io::ErrorKind::TimedOut.into() })
    }

    /// One GET, and another one where the first asks for something that there is; the status is one of success.
    fn get(&self, url: &str, admission: &Admission, range: Option<&str>) -> Result<Response<Body>, Failure> {
        let mut response = self.ask(url, admission, range)?;
        if response.status() == StatusCode::UNAUTHORIZED && admission.refused(self, &response)? {
            response = self.ask(url, admission, range)?;
        }
        let (place, status) = (url.to_owned(), response.status());
        match status {
            s if s.is_success() => Ok(response),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                Err(Failure::Final(SourceError::Unauthorized { place, status: status.as_u16() }))
            }
            StatusCode::NOT_FOUND | StatusCode::GONE => Err(Failure::Final(SourceError::NotFound { place })),
            StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT => Err(Failure::Passing(answered(status))),
            s if s.is_server_error() => Err(Failure::Passing(answered(status))),
            _ => Err(Failure::Final(match response.headers().get(BUCKET_REGION).and_then(|region| region.to_str().ok()) {
                Some(region) => {
                    let (expected, got) = (format!("AWS_REGION to be {region}"), format!("status {}", status.as_u16()));
                    SourceError::Protocol { place, expected, got }
                }
                None => SourceError::Status { place, status: status.as_u16() },
            })),
        }
    }

    /// One GET, whatever the status.
    fn ask(&self, url: &str, admission: &Admission, range: Option<&str>) -> Result<Response<Body>, Failure> {
        let (asked, headers) = admission.admit(url).map_err(Failure::Final)?;
        let mut request = self.agent.get(asked);
        if let Some(range) = range {
            request = request.header(header::RANGE, range);
        }
        for (name, value) in headers {
            request = request.header(name, value);
        }
        // What is asked may be signed: messages have the plain URL.
        request.call().map_err(|e| failure(url, e))
    }

    /// The token that a service of a registry hands out at `url`, as JSON.
    pub(crate) fn token(&self, url: &str, basic: &Admission) -> Result<Vec<u8>, Failure> {
        let response = self.get(url, basic, None)?;
        whole(url, response, MAX_TOKEN)
    }

    /// The whole of a small file, and the next page's URL when the server pages its answer.
    pub(crate) fn small(&self, url: &str, admission: &Admission) -> Result<(Vec<u8>, Option<String>), SourceError> {
        self.retry(url, || {
            let response = self.get(url, admission, None)?;
            let next = text(&response, header::LINK).and_then(next_link);
            Ok((whole(url, response, MAX_SMALL)?, next))
        })
    }

    /// A file that is looked for when it is needed.
    pub(crate) fn locator(&self, name: &str, url: &str, admission: &Admission) -> Locator {
        Locator { client: Arc::new(self.clone()), name: name.to_owned(), url: url.to_owned(), admission: admission.clone() }
    }
}

/// Where a file is.
#[derive(Clone)]
pub(crate) struct Locator {
    client: Arc<Client>,
    name: String,
    url: String,
    admission: Admission,
}

impl Locator {
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Finds out the file's length and whether the server sends ranges.
    pub(crate) fn probe(&self) -> Result<Remote, SourceError> {
        let url = self.url.as_str();
        self.client.retry(url, || {
            let response = self.client.get(url, &self.admission, Some("bytes=0-0"))?;
            let ranges = response.status() == StatusCode::PARTIAL_CONTENT;
            let bytes = if ranges {
                content_range(&response)
                    .map(|(_, total)| total)
                    .ok_or_else(|| Failure::Final(no_range(url, &response, "bytes 0-0/length")))?
            } else {
                None
            };
            let length = || text(&response, header::CONTENT_LENGTH).and_then(|l| l.parse().ok());
            Ok(Remote { locator: self.clone(), bytes: if ranges { bytes } else { length() }, mark: Mark::of(&response), ranges })
        })
    }
}

impl fmt::Debug for Locator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Locator").field("url", &self.url).finish_non_exhaustive()
    }
}

/// A file on a server.
#[derive(Clone, Debug)]
pub(crate) struct Remote {
    locator: Locator,
    bytes: Option<u64>,
    mark: Mark,
    ranges: bool,
}

impl Remote {
    pub(crate) fn name(&self) -> &str {
        &self.locator.name
    }

    pub(crate) fn place(&self) -> String {
        self.locator.url.clone()
    }

    pub(crate) fn locator(&self) -> &Locator {
        &self.locator
    }

    /// Whether the server calls this version of the file something, so that another one is told apart.
    pub(crate) fn is_marked(&self) -> bool {
        self.mark.etag.is_some() || self.mark.modified.is_some()
    }

    /// Whether the server's tag of the file is this digest, as hubs and stores of large files have it.
    pub(crate) fn vouches(&self, digest: &Digest) -> bool {
        self.mark.etag.as_deref().is_some_and(|tag| tag.trim_matches('"').trim_start_matches("sha256:") == digest.hex())
    }

    pub(crate) fn bytes(&self) -> Option<u64> {
        self.bytes
    }

    /// Whether ranges of it can be read.
    pub(crate) fn has_ranges(&self) -> bool {
        self.ranges && self.bytes.is_some()
    }

    /// What stands for this version of the file.
    pub(crate) fn identity(&self) -> String {
        format!("url {} {:?} {:?} {:?}", self.locator.url, self.mark.etag, self.mark.modified, self.bytes)
    }

    /// Opens the file from byte `from`; returns where the body really begins: `from`, or 0 when the server sends no ranges.
    pub(crate) fn open(&self, from: u64) -> Result<(u64, Box<dyn Read + Send>), SourceError> {
        self.locator.client.retry(&self.locator.url, || {
            let range = (from > 0 && self.ranges).then(|| format!("bytes={from}-"));
            let response = self.locator.client.get(&self.locator.url, &self.locator.admission, range.as_deref())?;
            self.unchanged(&response)?;
            let begin = if response.status() == StatusCode::PARTIAL_CONTENT { self.checked(&response, from)? } else { 0 };
            Ok((begin, Box::new(response.into_body().into_reader()) as Box<dyn Read + Send>))
        })
    }

    /// Reads a range whole.
    pub(crate) fn read(&self, range: &Range<u64>, into: &mut [u8]) -> Result<(), SourceError> {
        if into.is_empty() {
            return Ok(());
        }
        self.locator.client.retry(&self.locator.url, || self.body(range)?.read_exact(into).map_err(Failure::Passing))
    }

    /// Hands `sink` the bytes of a range as they come, with the place of each piece. What came is not asked for again.
    pub(crate) fn pour(&self, range: &Range<u64>, sink: &mut Sink<'_>) -> Result<(), SourceError> {
        let client = &self.locator.client;
        let mut piece = vec![0; POURED];
        let (mut at, mut attempt) = (range.start, 0);
        while at < range.end {
            let before = at;
            let mut body = client.retry(&self.locator.url, || self.body(&(at..range.end)))?;
            let lost = loop {
                match body.read(&mut piece) {
                    Ok(0) if at < range.end => break io::Error::new(io::ErrorKind::UnexpectedEof, "the connection closed early"),
                    Ok(0) => return Ok(()),
                    Ok(n) => {
                        sink(at, &piece[..n])?;
                        at += n as u64;
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => break error,
                }
            };
            // Bytes that arrived pay for the attempt: only a server that sends nothing uses up the retries.
            attempt = if at > before { 0 } else { attempt + 1 };
            if at < range.end && attempt > client.retries {
                return Err(SourceError::Unreachable { place: self.place(), attempts: attempt, source: lost });
            }
            warn!(file = self.name(), at, error = %lost, "connection lost, going on from there");
            std::thread::sleep(client.backoff * 2u32.saturating_pow(attempt));
        }
        Ok(())
    }

    /// The body of one answer to a range, and no byte more.
    fn body(&self, range: &Range<u64>) -> Result<impl Read + use<>, Failure> {
        let (locator, asked) = (&self.locator, format!("bytes={}-{}", range.start, range.end - 1));
        let response = locator.client.get(&locator.url, &locator.admission, Some(&asked))?;
        if response.status() != StatusCode::PARTIAL_CONTENT {
            return Err(Failure::Final(no_range(&locator.url, &response, &asked)));
        }
        self.unchanged(&response)?;
        self.checked(&response, range.start)?;
        Ok(response.into_body().into_reader().take(range.end - range.start))
    }

    /// Checks that an answer is of the version of the file that was found first.
    fn unchanged(&self, response: &Response<Body>) -> Result<(), Failure> {
        match self.mark.differs(&Mark::of(response)) {
            None => Ok(()),
            Some((before, now)) => {
                let (before, now) = (before.to_owned(), now.to_owned());
                Err(Failure::Final(SourceError::Changed { place: self.place(), before, now }))
            }
        }
    }

    /// Checks that a partial answer begins at `from` and is of a file of the same length as before.
    fn checked(&self, response: &Response<Body>, from: u64) -> Result<u64, Failure> {
        let expected = format!("bytes {from}-…/{}", self.bytes.map_or_else(|| "*".to_owned(), |b| b.to_string()));
        match content_range(response) {
            Some((begin, total)) if begin == from && (total.is_none() || self.bytes.is_none() || total == self.bytes) => Ok(begin),
            _ => Err(Failure::Final(no_range(&self.locator.url, response, &expected))),
        }
    }
}

/// What a server calls this version of a file.
#[derive(Clone, Debug, Default)]
struct Mark {
    etag: Option<String>,
    modified: Option<String>,
}

impl Mark {
    fn of(response: &Response<Body>) -> Self {
        let own = |name| text(response, name).map(str::to_owned);
        // A weak tag of the same bytes is as good here: only equality with the earlier answer counts.
        let etag = own(header::ETAG).map(|tag| tag.trim_start_matches("W/").to_owned());
        Self { etag, modified: own(header::LAST_MODIFIED) }
    }

    /// The two marks that differ, where both answers have one of the same kind.
    fn differs<'a>(&'a self, now: &'a Self) -> Option<(&'a str, &'a str)> {
        let pair = self.etag.as_deref().zip(now.etag.as_deref()).or_else(|| self.modified.as_deref().zip(now.modified.as_deref()));
        pair.filter(|(before, now)| before != now)
    }
}

/// Why an attempt failed.
pub(crate) enum Failure {
    /// Another attempt may succeed.
    Passing(io::Error),
    /// None will.
    Final(SourceError),
}

/// The whole of an answer, of at most `most` bytes.
fn whole(url: &str, response: Response<Body>, most: u64) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    response.into_body().into_reader().take(most + 1).read_to_end(&mut bytes).map_err(Failure::Passing)?;
    if bytes.len() as u64 > most {
        let (expected, got) = (format!("at most {most} bytes"), "more".to_owned());
        return Err(Failure::Final(SourceError::Protocol { place: url.to_owned(), expected, got }));
    }
    Ok(bytes)
}

fn answered(status: StatusCode) -> io::Error {
    io::Error::other(format!("the server answered {}", status.as_u16()))
}

fn failure(url: &str, error: ureq::Error) -> Failure {
    use ureq::Error as E;
    match error {
        E::Io(_) | E::Timeout(_) | E::ConnectionFailed | E::HostNotFound | E::BodyStalled | E::Protocol(_) => {
            Failure::Passing(error.into_io())
        }
        E::BadUri(problem) => Failure::Final(SourceError::Uri { uri: url.to_owned(), problem }),
        other => {
            let source = io::Error::other(other);
            Failure::Final(SourceError::Unreachable { place: url.to_owned(), attempts: 1, source })
        }
    }
}

fn text(response: &Response<Body>, name: header::HeaderName) -> Option<&str> {
    response.headers().get(name).and_then(|v| v.to_str().ok())
}

/// First byte and length of the whole file, from `Content-Range: bytes 0-9/100`.
fn content_range(response: &Response<Body>) -> Option<(u64, Option<u64>)> {
    let (range, total) = text(response, header::CONTENT_RANGE)?.strip_prefix("bytes ")?.split_once('/')?;
    let begin = range.split_once('-')?.0.parse().ok()?;
    Some((begin, if total == "*" { None } else { Some(total.parse().ok()?) }))
}

fn no_range(url: &str, response: &Response<Body>, expected: &str) -> SourceError {
    let range = text(response, header::CONTENT_RANGE).unwrap_or("no Content-Range");
    let got = format!("status {} with {range}", response.status().as_u16());
    SourceError::Protocol { place: url.to_owned(), expected: format!("status 206 for {expected}"), got }
}

/// The URL marked `rel="next"` in a `Link` header.
fn next_link(link: &str) -> Option<String> {
    let entry = link.split(',').find(|e| e.contains("rel=\"next\""))?;
    Some(entry.split_once('<')?.1.split_once('>')?.0.to_owned())
}
