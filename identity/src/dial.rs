//! Connections that this process opens.

use std::{
    future::Future,
    io,
    pin::Pin,
    task::{Context, Poll},
};

use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::transport::Uri;
use tower_service::Service;

use crate::{
    accept::Stream,
    material::{Identity, Protocol},
    name::Name,
};

/// Proves this process's name on a connection and has the other end prove that it is `expected`.
///
/// # Errors
/// When the other end breaks off, is another, or is not trusted.
pub async fn connect(identity: &Identity, expected: &Name, protocol: Protocol, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
    let material = identity.material();
    let config = identity.client(&material, protocol, expected.clone()).map_err(io::Error::other)?;
    // Names are in certificates, not in the DNS; the library wants one all the same, and neither sends nor checks it.
    let place = ServerName::IpAddress(stream.peer_addr()?.ip().into());
    TlsConnector::from(config).connect(place, stream).await
}

/// Opens connections for a gRPC channel; each is proven where there is an identity.
#[derive(Clone, Debug)]
pub struct Dialer(Option<(Identity, Name)>);

impl Dialer {
    /// Connects to processes called `expected`, as `identity`; without one, to anybody, over plain TCP.
    pub fn new(identity: Option<(Identity, Name)>) -> Self {
        Self(identity)
    }

    async fn dial(self, uri: Uri) -> io::Result<TokioIo<Stream>> {
        let place = || Some((uri.host()?.trim_start_matches('[').trim_end_matches(']'), uri.port_u16()?));
        let (host, port) = place().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, format!("{uri} names no host and port")))?;
        let stream = TcpStream::connect((host, port)).await?;
        stream.set_nodelay(true)?;
        Ok(TokioIo::new(match &self.0 {
            None => Stream::Plain(stream),
            Some((identity, expected)) => Stream::Client(Box::new(connect(identity, expected, Protocol::Grpc, stream).await?)),
        }))
    }
}

impl Service<Uri> for Dialer {
    type Response = TokioIo<Stream>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<TokioIo<Stream>>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        Box::pin(self.clone().dial(uri))
    }
}
