//! A connected socket, unix or TCP, with blocking reads and writes that have a deadline.

use std::{
    io::{self, ErrorKind, Read, Write},
    net::{Shutdown, TcpStream},
    os::unix::net::UnixStream,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

/// Longest sleep in a system call, so that deadlines are seen.
const SLICE: Duration = Duration::from_millis(100);

/// A connection between two ranks.
#[derive(Debug)]
pub(super) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
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
    /// Sets it up for exchanges.
    pub(super) fn prepare(&self) -> io::Result<()> {
        match self {
            Self::Tcp(s) => {
                s.set_nonblocking(false)?;
                s.set_nodelay(true)?;
                s.set_read_timeout(Some(SLICE))?;
                s.set_write_timeout(Some(SLICE))
            }
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
            Self::Unix(s) => s.shutdown(Shutdown::Both),
        };
    }

    /// Writes all of `bytes`.
    pub(super) fn send(&self, bytes: &[u8], limit: Duration, interrupted: &AtomicBool) -> Result<(), Broken> {
        let mut rest = bytes;
        moved(limit, interrupted, rest.is_empty(), || {
            let n = match self {
                Self::Tcp(s) => (&mut &*s).write(rest),
                Self::Unix(s) => (&mut &*s).write(rest),
            }?;
            rest = &rest[n..];
            Ok((n, rest.is_empty()))
        })
    }

    /// Fills `bytes`.
    pub(super) fn receive(&self, bytes: &mut [u8], limit: Duration, interrupted: &AtomicBool) -> Result<(), Broken> {
        let mut filled = 0;
        moved(limit, interrupted, bytes.is_empty(), || {
            let n = match self {
                Self::Tcp(s) => (&mut &*s).read(&mut bytes[filled..]),
                Self::Unix(s) => (&mut &*s).read(&mut bytes[filled..]),
            }?;
            filled += n;
            Ok((n, filled == bytes.len()))
        })
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
