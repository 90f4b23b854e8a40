//! A file server on the loopback that sends ranges and counts what it sends.

use std::{
    fs::File,
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
    sent: Arc<Mutex<Vec<Range<u64>>>>,
}

impl Mirror {
    /// Serves the files of `folder`.
    ///
    /// # Panics
    /// If it cannot listen.
    pub fn start(folder: &Path) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let url = format!("http://{}/", listener.local_addr().expect("an address"));
        let sent = Arc::new(Mutex::new(Vec::new()));
        let (folder, noted) = (folder.to_owned(), sent.clone());
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (folder, noted) = (folder.clone(), noted.clone());
                // A client that goes away early is the client's business.
                thread::spawn(move || drop(answer(&stream, &folder, &noted)));
            }
        });
        Self { url, sent }
    }

    /// Ranges that were asked for and sent, of any file; whole files are not among them.
    ///
    /// # Panics
    /// If a thread of the server panicked.
    pub fn sent(&self) -> Vec<Range<u64>> {
        self.sent.lock().unwrap().clone()
    }
}

fn answer(mut stream: &TcpStream, folder: &Path, sent: &Mutex<Vec<Range<u64>>>) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream).lines();
    let request = lines.next().unwrap_or(Ok(String::new()))?;
    let path: PathBuf = folder.join(request.split(' ').nth(1).unwrap_or_default().trim_start_matches('/'));
    let mut asked = None;
    for line in lines.map_while(Result::ok).take_while(|line| !line.is_empty()) {
        if let Some((name, value)) = line.split_once(": ")
            && name.eq_ignore_ascii_case("range")
        {
            asked = value.strip_prefix("bytes=").and_then(|r| r.split_once('-')).map(|(from, to)| (from.parse::<u64>(), to.parse::<u64>()));
        }
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
    sent.lock().unwrap().extend(range);
    Ok(())
}
