//! Connections that others open.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::Stream as Items;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc},
    time::{sleep, timeout},
};
use tokio_rustls::{TlsAcceptor, client, server};
use tokio_util::task::AbortOnDropHandle;
use tonic::transport::server::Connected;
use tracing::{debug, warn};

use crate::{
    material::{Identity, Protocol, name_of},
    name::Name,
};

/// Longest that a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// Handshakes under way at once; further connections wait to be taken.
const HANDSHAKES: usize = 64;
/// Pause after a connection could not be taken: out of file descriptors, say.
const PAUSE: Duration = Duration::from_millis(10);

/// Who is at the other end of a connection; `None` where names are not proven (plain TCP).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer(pub Option<Name>);

/// A connection, plain or proven.
#[derive(Debug)]
pub enum Stream {
    /// Nothing is proven.
    Plain(TcpStream),
    /// The other end opened it.
    Server(Box<server::TlsStream<TcpStream>>),
    /// This end opened it.
    Client(Box<client::TlsStream<TcpStream>>),
}

/// A connection that another process opened.
#[derive(Debug)]
pub struct Accepted {
    /// The connection.
    pub stream: Stream,
    /// Who opened it.
    pub peer: Peer,
}

/// Takes connections. Ends when dropped.
#[derive(Debug)]
pub struct Incoming {
    accepted: mpsc::Receiver<io::Result<Accepted>>,
    _task: AbortOnDropHandle<()>,
}

impl Incoming {
    /// Takes the connections of `listener`. With an identity, each must prove a name that this process admits; others are closed. Must be
    /// called in a tokio runtime.
    pub fn new(listener: TcpListener, identity: Option<Identity>, protocol: Protocol) -> Self {
        // Whoever serves takes them as they come; what waits here holds a permit no longer.
        let (sender, accepted) = mpsc::channel(16);
        let _task = AbortOnDropHandle::new(tokio::spawn(take(listener, identity, protocol, sender)));
        Self { accepted, _task }
    }
}

impl Items for Incoming {
    type Item = io::Result<Accepted>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.accepted.poll_recv(context)
    }
}

async fn take(listener: TcpListener, identity: Option<Identity>, protocol: Protocol, sender: mpsc::Sender<io::Result<Accepted>>) {
    let permits = Arc::new(Semaphore::new(HANDSHAKES));
    loop {
        let Ok(permit) = permits.clone().acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                warn!(%error, "failed to take a connection");
                sleep(PAUSE).await;
                continue;
            }
        };
        if let Err(error) = stream.set_nodelay(true) {
            debug!(%error, "a connection broke at once");
            continue;
        }
        let (identity, sender) = (identity.clone(), sender.clone());
        if sender.is_closed() {
            return;
        }
        tokio::spawn(async move {
            let accepted = match identity {
                None => Ok(Accepted { stream: Stream::Plain(stream), peer: Peer(None) }),
                Some(identity) => match timeout(HANDSHAKE, introduced(&identity, protocol, stream)).await {
                    Ok(Ok(None)) => return debug!("a connection was closed without a word: a probe of the port, say"),
                    Ok(Ok(Some((stream, name)))) => Ok(Accepted { stream: Stream::Server(Box::new(stream)), peer: Peer(Some(name)) }),
                    Ok(Err(reason)) => Err(reason),
                    Err(_) => Err("it did not prove its name in time".to_owned()),
                },
            };
            drop(permit);
            match accepted {
                // Closed when whoever served has stopped.
                Ok(accepted) => drop(sender.send(Ok(accepted)).await),
                Err(reason) => warn!(reason, "a connection was refused"),
            }
        });
    }
}

/// As [`accept`]; `None` where the other end says nothing.
async fn introduced(
    identity: &Identity,
    protocol: Protocol,
    stream: TcpStream,
) -> Result<Option<(server::TlsStream<TcpStream>, Name)>, String> {
    match stream.peek(&mut [0]).await {
        Ok(0) => Ok(None),
        Ok(_) => accept(identity, protocol, stream).await.map(Some),
        Err(error) => Err(error.to_string()),
    }
}

/// Has the other end of a connection prove its name, which must be one that this process admits.
///
/// # Errors
/// Why it is refused.
pub async fn accept(identity: &Identity, protocol: Protocol, stream: TcpStream) -> Result<(server::TlsStream<TcpStream>, Name), String> {
    let material = identity.material();
    let config = identity.server(&material, protocol).map_err(|error| error.to_string())?;
    let stream = TlsAcceptor::from(config).accept(stream).await.map_err(|error| error.to_string())?;
    let certificates = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let name = certificates.first().ok_or_else(|| "it has no certificate".to_owned()).and_then(name_of)?;
    if !material.name.admits(&name) {
        return Err(format!("{name} called {}, which has nothing to say to it", material.name));
    }
    Ok((stream, name))
}

impl Connected for Accepted {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Accepted {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Accepted {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, context: &mut Context<'_>, slices: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(s) => Pin::new(s).poll_read(context, buffer),
            Self::Server(s) => Pin::new(s).poll_read(context, buffer),
            Self::Client(s) => Pin::new(s).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(s) => Pin::new(s).poll_write(context, bytes),
            Self::Server(s) => Pin::new(s).poll_write(context, bytes),
            Self::Client(s) => Pin::new(s).poll_write(context, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(s) => Pin::new(s).poll_flush(context),
            Self::Server(s) => Pin::new(s).poll_flush(context),
            Self::Client(s) => Pin::new(s).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(s) => Pin::new(s).poll_shutdown(context),
            Self::Server(s) => Pin::new(s).poll_shutdown(context),
            Self::Client(s) => Pin::new(s).poll_shutdown(context),
        }
    }

    fn poll_write_vectored(self: Pin<&mut Self>, context: &mut Context<'_>, slices: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(s) => Pin::new(s).poll_write_vectored(context, slices),
            Self::Server(s) => Pin::new(s).poll_write_vectored(context, slices),
            Self::Client(s) => Pin::new(s).poll_write_vectored(context, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(s) => s.is_write_vectored(),
            Self::Server(s) => s.is_write_vectored(),
            Self::Client(s) => s.is_write_vectored(),
        }
    }
}
