//! A mirror of a model hub inside a cluster's namespace: the files of a folder, by the hub's paths, with ranges.
//!
//! `FOLDER/ORG/NAME/PATH` is served as `/ORG/NAME/resolve/REVISION/PATH` for any revision, and listed by `/api/models/ORG/NAME/tree/REVISION`.
//! A file that is a link to a blob in Skein's cache is listed with the digest that is the blob's name, as the hub lists large files.
//!
//! For tests: `/sent/ORG/NAME` lists what of a repository's files was asked for and by whom. In a repository, the file `.authorization` holds
//! the header without which nothing is sent, `.pace` the bytes that each connection gets in a second.

use std::{
    collections::HashMap,
    fs::{self, Metadata},
    io,
    net::{IpAddr, SocketAddr},
    ops::Range,
    os::unix::fs::symlink,
    path::{Component, Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, UNIX_EPOCH},
};

use anyhow::{Context, Result};
use axum::{
    Json, Router,
    body::Body,
    extract::{ConnectInfo, Path as UrlPath, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use clap::Args;
use futures_util::StreamExt;
use serde_json::{Value, json};
use tokio::{
    fs::File,
    io::{AsyncReadExt, AsyncSeekExt, SeekFrom},
    net::TcpListener,
};
use tokio_util::io::ReaderStream;

use super::{folder::Cluster, network::NODE, processes::Program};
use crate::{model, paths};

/// Port on the node's address.
const PORT: u16 = 8080;
const FOLDER: &str = "hub";
/// Bytes that are sent at a time.
const PIECE: usize = 256 << 10;

/// Options of the mirror's own process.
#[derive(Args)]
pub(crate) struct Options {
    /// Folder of repositories.
    #[arg(long)]
    folder: PathBuf,
    /// Where to listen.
    #[arg(long)]
    listen: SocketAddr,
}

/// The mirror as a process of the cluster: this program again.
///
/// # Errors
/// If this program's own path cannot be found.
pub(crate) fn program(cluster: &Cluster) -> Result<Program> {
    let own = std::env::current_exe().context("failed to find the path of xtask itself")?;
    let folder = cluster.make(FOLDER)?;
    let listen = SocketAddr::new(IpAddr::V4(NODE), PORT);
    // A copy: the next build replaces the program that this one was started from.
    let copy = cluster.path("mirror");
    fs::copy(&own, &copy).with_context(|| format!("failed to copy {}", own.display()))?;
    let args = ["cluster".to_owned(), "mirror".to_owned(), format!("--folder={}", folder.display()), format!("--listen={listen}")];
    Ok(Program::new("mirror", &copy, args))
}

/// What pods reach it by; the operator's setting `sources.hf.endpoint`.
pub(crate) fn endpoint() -> String {
    format!("http://{NODE}:{PORT}")
}

/// Puts the reference model into the mirror when it is in Skein's cache.
///
/// # Errors
/// If the link cannot be made.
pub(crate) fn add_reference_model(cluster: &Cluster) -> Result<()> {
    let blob = paths::cache()?.join("blobs").join("sha256").join(model::SHA256);
    let link = cluster.make(&format!("{FOLDER}/{}", model::HUB_REPOSITORY))?.join(model::HUB_FILE);
    if !blob.exists() || link.exists() {
        return Ok(());
    }
    symlink(&blob, &link).with_context(|| format!("failed to link {}", link.display()))
}

/// Serves until it is killed.
///
/// # Errors
/// If it cannot listen.
pub(crate) fn serve(options: Options) -> Result<()> {
    let mirror = Arc::new(Mirror { folder: options.folder.clone(), sent: Mutex::default() });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("failed to start a runtime")?;
    runtime.block_on(async {
        let listener = TcpListener::bind(options.listen).await.with_context(|| format!("failed to listen at {}", options.listen))?;
        println!("serving {} at {}", options.folder.display(), options.listen);
        let service = routes(mirror).into_make_service_with_connect_info::<SocketAddr>();
        axum::serve(listener, service).await.context("the mirror stopped")
    })
}

/// The folder, and what of it was asked for.
struct Mirror {
    folder: PathBuf,
    /// By repository: a test looks at its own.
    sent: Mutex<HashMap<String, Vec<Value>>>,
}

fn routes(mirror: Arc<Mirror>) -> Router {
    Router::new()
        .route("/sent/{org}/{name}", get(sent))
        .route("/api/models/{org}/{name}/tree/{revision}", get(top))
        .route("/api/models/{org}/{name}/tree/{revision}/{*path}", get(subfolder))
        .route("/{org}/{name}/resolve/{revision}/{*path}", get(file))
        .with_state(mirror)
}

/// Why a request has no answer.
enum Refusal {
    NotFound,
    Unauthorized,
    BadRange(u64),
    Failed(io::Error),
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::NotFound { Self::NotFound } else { Self::Failed(error) }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        match self {
            Self::NotFound => (StatusCode::NOT_FOUND, "not in this mirror\n").into_response(),
            Self::Unauthorized => StatusCode::UNAUTHORIZED.into_response(),
            Self::BadRange(bytes) => {
                (StatusCode::RANGE_NOT_SATISFIABLE, [(header::CONTENT_RANGE, format!("bytes */{bytes}"))]).into_response()
            }
            Self::Failed(error) => {
                eprintln!("{error}");
                StatusCode::INTERNAL_SERVER_ERROR.into_response()
            }
        }
    }
}

impl Mirror {
    /// A repository, for those whom it lets in.
    fn repository(&self, org: &str, name: &str, headers: &HeaderMap) -> Result<PathBuf, Refusal> {
        let repository = inside(&self.folder, &format!("{org}/{name}")).ok_or(Refusal::NotFound)?;
        match fs::read_to_string(repository.join(".authorization")) {
            Ok(wanted) if headers.get(header::AUTHORIZATION).is_none_or(|shown| shown != wanted.trim()) => Err(Refusal::Unauthorized),
            _ => Ok(repository),
        }
    }
}

/// What was asked for of a repository: file, first byte and the one after the last, and the address of whoever asked.
async fn sent(State(mirror): State<Arc<Mirror>>, UrlPath((org, name)): UrlPath<(String, String)>) -> Json<Value> {
    let sent = mirror.sent.lock().unwrap_or_else(PoisonError::into_inner);
    Json(Value::Array(sent.get(&format!("{org}/{name}")).cloned().unwrap_or_default()))
}

async fn top(
    mirror: State<Arc<Mirror>>,
    UrlPath((org, name, revision)): UrlPath<(String, String, String)>,
    headers: HeaderMap,
) -> Result<Json<Value>, Refusal> {
    subfolder(mirror, UrlPath((org, name, revision, String::new())), headers).await
}

async fn subfolder(
    State(mirror): State<Arc<Mirror>>,
    UrlPath((org, name, _, path)): UrlPath<(String, String, String, String)>,
    headers: HeaderMap,
) -> Result<Json<Value>, Refusal> {
    let repository = mirror.repository(&org, &name, &headers)?;
    let listed = inside(&repository, &path).ok_or(Refusal::NotFound)?;
    let mut entries = Vec::new();
    for entry in fs::read_dir(&listed)? {
        let place = entry?.path();
        if is_hidden(&place) {
            continue;
        }
        let shown = place.strip_prefix(&repository).unwrap_or(&place).to_string_lossy().into_owned();
        let (kind, digest) = (fs::metadata(&place)?, blob_name(&place));
        entries.push(match (kind.is_dir(), digest) {
            (true, _) => json!({"type": "directory", "path": shown}),
            (false, Some(digest)) => json!({"type": "file", "path": shown, "size": kind.len(), "lfs": {"oid": digest, "size": kind.len()}}),
            (false, None) => json!({"type": "file", "path": shown, "size": kind.len()}),
        });
    }
    Ok(Json(Value::Array(entries)))
}

async fn file(
    State(mirror): State<Arc<Mirror>>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    UrlPath((org, name, _, path)): UrlPath<(String, String, String, String)>,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    let repository = mirror.repository(&org, &name, &headers)?;
    let place = inside(&repository, &path).filter(|place| !is_hidden(place)).ok_or(Refusal::NotFound)?;
    let mut file = File::open(&place).await?;
    let metadata = file.metadata().await?;
    if !metadata.is_file() {
        return Err(Refusal::NotFound);
    }
    let bytes = metadata.len();
    let asked = headers.get(header::RANGE).and_then(|r| r.to_str().ok()).map(|text| range(text, bytes));
    let (status, part) = match asked {
        None | Some(Asked::Whole) => (StatusCode::OK, 0..bytes),
        Some(Asked::Part(part)) => (StatusCode::PARTIAL_CONTENT, part),
        Some(Asked::Nothing) => return Err(Refusal::BadRange(bytes)),
    };
    file.seek(SeekFrom::Start(part.start)).await?;
    let length = part.end - part.start;
    let noted = json!({"file": path, "from": part.start, "to": part.end, "peer": peer.ip()});
    mirror.sent.lock().unwrap_or_else(PoisonError::into_inner).entry(format!("{org}/{name}")).or_default().push(noted);
    let mut response = Response::builder()
        .status(status)
        .header(header::ACCEPT_RANGES, "bytes")
        .header(header::CONTENT_TYPE, "application/octet-stream")
        .header(header::CONTENT_LENGTH, length);
    if status == StatusCode::PARTIAL_CONTENT {
        response = response.header(header::CONTENT_RANGE, format!("bytes {}-{}/{bytes}", part.start, part.end.saturating_sub(1)));
    }
    // Those that are no blobs may be written anew.
    let mark = blob_name(&place).map_or_else(|| version(&metadata), Ok)?;
    response = response.header(header::ETAG, format!("\"{mark}\""));
    let pieces = ReaderStream::with_capacity(file.take(length), PIECE);
    let body = match fs::read_to_string(repository.join(".pace")).ok().and_then(|pace| pace.trim().parse::<f64>().ok()) {
        None => Body::from_stream(pieces),
        Some(pace) => {
            let pause = Duration::from_secs_f64(PIECE as f64 / pace.max(1.0));
            Body::from_stream(pieces.then(move |piece| async move {
                tokio::time::sleep(pause).await;
                piece
            }))
        }
    };
    response.body(body).map_err(|e| Refusal::Failed(io::Error::other(e)))
}

/// What a Range header asks of a file.
#[derive(Debug, PartialEq)]
enum Asked {
    /// A form that is not served in part; the whole is a right answer to it (RFC 9110, 14.2).
    Whole,
    Part(Range<u64>),
    /// No byte of the file is in the range.
    Nothing,
}

fn range(text: &str, bytes: u64) -> Asked {
    let Some((from, to)) = text.strip_prefix("bytes=").and_then(|r| r.split_once('-')) else { return Asked::Whole };
    let part = match (from.parse::<u64>(), to.parse::<u64>()) {
        (Ok(from), Ok(to)) if from <= to => from..bytes.min(to.saturating_add(1)),
        (Ok(from), _) if to.is_empty() => from..bytes,
        (_, Ok(last)) if from.is_empty() => bytes.saturating_sub(last)..bytes,
        _ => return Asked::Whole,
    };
    if part.is_empty() { Asked::Nothing } else { Asked::Part(part) }
}

/// What a version of a file is told by.
fn version(metadata: &Metadata) -> io::Result<String> {
    let modified = metadata.modified()?.duration_since(UNIX_EPOCH).map_err(io::Error::other)?;
    Ok(format!("{}-{}", metadata.len(), modified.as_nanos()))
}

/// Whether a file is for the mirror itself.
fn is_hidden(place: &Path) -> bool {
    place.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'))
}

/// `path` below `folder`, if it does not lead out of it.
fn inside(folder: &Path, path: &str) -> Option<PathBuf> {
    let path = Path::new(path);
    path.components().all(|c| matches!(c, Component::Normal(_))).then(|| folder.join(path))
}

/// The digest that names the blob to which `place` is a link.
fn blob_name(place: &Path) -> Option<String> {
    let name = fs::read_link(place).ok()?.file_name()?.to_string_lossy().into_owned();
    (name.len() == 64 && name.bytes().all(|b| b.is_ascii_hexdigit())).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_cut_to_the_file() {
        assert_eq!(range("bytes=0-0", 10), Asked::Part(0..1));
        assert_eq!(range("bytes=3-99", 10), Asked::Part(3..10));
        assert_eq!(range("bytes=3-", 10), Asked::Part(3..10));
        assert_eq!(range("bytes=-4", 10), Asked::Part(6..10));
        assert_eq!(range("bytes=10-", 10), Asked::Nothing);
        assert_eq!(range("bytes=0-1,4-5", 10), Asked::Whole);
        assert_eq!(range("lines=1-2", 10), Asked::Whole);
    }

    #[test]
    fn paths_stay_in_the_folder() {
        let folder = Path::new("/hub");
        assert_eq!(inside(folder, "a/b"), Some("/hub/a/b".into()));
        assert_eq!(inside(folder, ""), Some("/hub/".into()));
        assert_eq!(inside(folder, "../a"), None);
        assert_eq!(inside(folder, "a/../../b"), None);
        assert_eq!(inside(folder, "/etc/passwd"), None);
    }
}
