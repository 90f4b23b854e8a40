//! A file server on the loopback that sends ranges and counts what it sends; to clients of an object store it is one, of buckets that are folders.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Read, Seek, SeekFrom, Write},
    net::{TcpListener, TcpStream},
    ops::Range,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    thread,
};

/// A folder, served until the process ends.
#[derive(Debug)]
pub struct Mirror {
    /// `http://127.0.0.1:port/`.
    pub url: String,
    noted: Arc<Noted>,
}

/// What was asked.
#[derive(Debug, Default)]
struct Noted {
    sent: Mutex<Vec<Range<u64>>>,
    /// Whose keys signed each request; nothing where none did.
    signers: Mutex<Vec<Option<String>>>,
}

impl Mirror {
    /// Serves the files of `folder`.
    ///
    /// # Panics
    /// If it cannot listen.
    pub fn start(folder: &Path) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let url = format!("http://{}/", listener.local_addr().expect("an address"));
        let mirror = Self { url, noted: Arc::default() };
        let (folder, noted) = (folder.to_owned(), mirror.noted.clone());
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (folder, noted) = (folder.clone(), noted.clone());
                // A client that goes away early is the client's business.
                thread::spawn(move || drop(answer(&stream, &folder, &noted)));
            }
        });
        mirror
    }

    /// Whose keys signed each request so far.
    ///
    /// # Panics
    /// If a thread of the server panicked.
    pub fn signers(&self) -> Vec<Option<String>> {
        self.noted.signers.lock().unwrap().clone()
    }

    /// Ranges that were asked for and sent, of any file; whole files are not among them.
    ///
    /// # Panics
    /// If a thread of the server panicked.
    pub fn sent(&self) -> Vec<Range<u64>> {
        self.noted.sent.lock().unwrap().clone()
    }
}

fn answer(mut stream: &TcpStream, folder: &Path, noted: &Noted) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream).lines();
    let request = lines.next().unwrap_or(Ok(String::new()))?;
    let target = request.split(' ').nth(1).unwrap_or_default();
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let path: PathBuf = folder.join(path.trim_start_matches('/'));
    let parameter = |name: &str| query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='));
    let signer = parameter("X-Amz-Credential").and_then(|scope| scope.split('%').next());
    noted.signers.lock().unwrap().push(signer.map(str::to_owned));
    let mut asked = None;
    for line in lines.map_while(Result::ok).take_while(|line| !line.is_empty()) {
        if let Some((name, value)) = line.split_once(": ")
            && name.eq_ignore_ascii_case("range")
        {
            asked = value.strip_prefix("bytes=").and_then(|r| r.split_once('-')).map(|(from, to)| (from.parse::<u64>(), to.parse::<u64>()));
        }
    }
    if parameter("list-type").is_some() {
        let prefix = parameter("prefix").unwrap_or_default().replace("%2F", "/");
        let listing = listing(&path, &prefix)?;
        return write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{listing}", listing.len());
    }
    let Some(mut file) = File::open(&path).ok().filter(|f| f.metadata().is_ok_and(|m| m.is_file())) else {
        return write!(stream, "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
    };
    let bytes = file.metadata()?.len();
    let range = match asked {
        Some((Ok(from), to)) => Some(from..bytes.min(to.map_or(bytes, |to| to + 1))),
        _ => None,
    };
    let (status, extra) = match &range {
        Some(range) => ("206 Partial Content", format!("content-range: bytes {}-{}/{bytes}\r\n", range.start, range.end - 1)),
        None => ("200 OK", String::new()),
    };
    let body = range.clone().unwrap_or(0..bytes);
    let length = body.end - body.start;
    write!(stream, "HTTP/1.1 {status}\r\n{extra}content-length: {length}\r\netag: \"{bytes}\"\r\nconnection: close\r\n\r\n")?;
    file.seek(SeekFrom::Start(body.start))?;
    std::io::copy(&mut file.take(length), &mut stream)?;
    noted.sent.lock().unwrap().extend(range);
    Ok(())
}

/// The files of a bucket below `prefix`, which ends with a slash or is empty; names here need no encoding.
fn listing(bucket: &Path, prefix: &str) -> std::io::Result<String> {
    let mut keys = String::new();
    for entry in fs::read_dir(bucket.join(prefix))? {
        let entry = entry?;
        if entry.path().is_file() {
            keys += &format!("<Contents><Key>{prefix}{}</Key></Contents>", entry.file_name().to_string_lossy());
        }
    }
    Ok(format!(
        "<ListBucketResult xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><IsTruncated>false</IsTruncated>{keys}</ListBucketResult>"
    ))
}
