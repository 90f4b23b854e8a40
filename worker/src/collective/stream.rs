//! A connected socket, unix or TCP, plain or encrypted, with blocking reads and writes that have a deadline.

use std::{
    io::{self, ErrorKind, Read, Write},
    net::{Shutdown, TcpStream},
    os::unix::net::UnixStream,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use rustls::Connection;

/// Longest sleep in a system call, so that deadlines are seen.
const SLICE: Duration = Duration::from_millis(100);

/// A connection between two ranks.
#[derive(Debug)]
pub(super) enum Stream {
    Tcp(TcpStream),
    Tls(Box<Tls>),
    Unix(UnixStream),
}

/// An encrypted connection. Its socket is apart, so that it can be shut down while somebody waits in it.
#[derive(Debug)]
pub(super) struct Tls {
    socket: TcpStream,
    /// Held by the one thread that exchanges.
    connection: Mutex<Connection>,
}

/// Why a transfer ended early.
#[derive(Debug)]
pub(super) enum Broken {
    /// Nothing moved for as long as the limit says.
    Deadline,
    /// This side was interrupted.
    Interrupted,
    /// The connection is gone.
    Gone(io::Error),
}

impl Stream {
    /// A connection after its handshake.
    pub(super) fn tls(socket: TcpStream, connection: Connection) -> Self {
        Self::Tls(Box::new(Tls { socket, connection: Mutex::new(connection) }))
    }

    /// Sets it up for exchanges.
    pub(super) fn prepare(&self) -> io::Result<()> {
        match self {
            Self::Tcp(s) => prepare(s),
            Self::Tls(tls) => prepare(&tls.socket),
            Self::Unix(s) => {
                s.set_nonblocking(false)?;
                s.set_read_timeout(Some(SLICE))?;
                s.set_write_timeout(Some(SLICE))
            }
        }
    }

    /// Ends both directions; whoever waits wakes.
    pub(super) fn close(&self) {
        // A connection that is gone already is as closed as it can be.
        let _ = match self {
            Self::Tcp(s) => s.shutdown(Shutdown::Both),
            Self::Tls(tls) => tls.socket.shutdown(Shutdown::Both),
            Self::Unix(s) => s.shutdown(Shutdown::Both),
        };
    }

    /// Writes all of `bytes`.
    pub(super) fn send(&self, bytes: &[u8], limit: Duration, interrupted: &AtomicBool) -> Result<(), Broken> {
        let mut rest = bytes;
        moved(limit, interrupted, rest.is_empty(), || match self {
            Self::Tcp(s) => write(s, &mut rest),
            Self::Tls(tls) => tls.write(&mut rest),
            Self::Unix(s) => write(s, &mut rest),
        })
    }

    /// Fills `bytes`.
    pub(super) fn receive(&self, bytes: &mut [u8], limit: Duration, interrupted: &AtomicBool) -> Result<(), Broken> {
        let mut rest = bytes;
        let done = rest.is_empty();
        moved(limit, interrupted, done, || match self {
            Self::Tcp(s) => read(s, &mut rest),
            Self::Tls(tls) => tls.read(&mut rest),
            Self::Unix(s) => read(s, &mut rest),
        })
    }
}

fn prepare(socket: &TcpStream) -> io::Result<()> {
    socket.set_nonblocking(false)?;
    socket.set_nodelay(true)?;
    socket.set_read_timeout(Some(SLICE))?;
    socket.set_write_timeout(Some(SLICE))
}

/// One write from the front of `rest`: bytes written, whether those were the last.
fn write(mut socket: impl Write, rest: &mut &[u8]) -> io::Result<(usize, bool)> {
    let n = socket.write(rest)?;
    *rest = &rest[n..];
    Ok((n, rest.is_empty()))
}

/// One read into the front of `rest`: bytes read, whether those were the last.
fn read(mut socket: impl Read, rest: &mut &mut [u8]) -> io::Result<(usize, bool)> {
    let n = socket.read(rest)?;
    *rest = &mut std::mem::take(rest)[n..];
    Ok((n, rest.is_empty()))
}

impl Tls {
    /// Encrypts from the front of `rest` and writes once: bytes on the wire, whether everything is there.
    fn write(&self, rest: &mut &[u8]) -> io::Result<(usize, bool)> {
        let mut connection = self.connection();
        // It takes as much as its buffer holds.
        let taken = connection.writer().write(rest)?;
        *rest = &rest[taken..];
        let n = connection.write_tls(&mut &self.socket)?;
        Ok((n, rest.is_empty() && !connection.wants_write()))
    }

    /// Takes what is decrypted already, or else reads once: bytes moved (0 when the other end has closed), whether `rest` is full.
    fn read(&self, rest: &mut &mut [u8]) -> io::Result<(usize, bool)> {
        let mut connection = self.connection();
        match read(connection.reader(), rest) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                let n = connection.read_tls(&mut &self.socket)?;
                connection.process_new_packets().map_err(io::Error::other)?;
                Ok((n, false))
            }
            taken => taken,
        }
    }

    /// Nothing panics while it is held.
    fn connection(&self) -> MutexGuard<'_, Connection> {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Repeats `transfer` (bytes moved, whether that was all) until it is done; the limit runs from the last byte that moved.
fn moved(
    limit: Duration,
    interrupted: &AtomicBool,
    done: bool,
    mut transfer: impl FnMut() -> io::Result<(usize, bool)>,
) -> Result<(), Broken> {
    if done {
        return Ok(());
    }
    // The clock is read only when a call did not finish the transfer at once.
    let mut last = None;
    loop {
        match transfer() {
            Ok((0, _)) => return Err(ended(interrupted, io::Error::new(ErrorKind::UnexpectedEof, "the connection was closed"))),
            Ok((_, true)) => return Ok(()),
            Ok((_, false)) => last = Some(Instant::now()),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                // The first call that timed out began a slice ago.
                let since = *last.get_or_insert_with(|| Instant::now().checked_sub(SLICE).unwrap_or_else(Instant::now));
                if interrupted.load(Ordering::Relaxed) {
                    return Err(Broken::Interrupted);
                }
                if since.elapsed() >= limit {
                    return Err(Broken::Deadline);
                }
            }
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(ended(interrupted, e)),
        }
    }
}

fn ended(interrupted: &AtomicBool, error: io::Error) -> Broken {
    if interrupted.load(Ordering::Relaxed) { Broken::Interrupted } else { Broken::Gone(error) }
}
