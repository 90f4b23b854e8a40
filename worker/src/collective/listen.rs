//! Where the other ranks of a stage connect.

use std::{io, net::IpAddr, sync::Arc, time::Duration};

use identity::{Identity, Protocol};
use plan::worker::{CollectiveKind, Epoch};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, UnixListener},
    task::JoinSet,
    time::timeout,
};
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::{
    Address, Lobby,
    frame::{HEADER, HELLO, Header, Hello, Kind},
    stream::Stream,
};

/// Connections that may be introducing themselves at once; more are closed. A rank has fewer peers, and each dials once an epoch.
const INTRODUCTIONS: usize = 256;

/// Whom connections are meant for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Who {
    /// Their stage.
    pub stage: usize,
    /// The rank that listens.
    pub rank: usize,
    /// Ranks of the stage.
    pub ranks: usize,
    /// The process that listens.
    pub incarnation: u64,
}

enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// A bound socket that takes the connections of other ranks.
pub struct Listener {
    socket: Socket,
    address: Address,
}

impl std::fmt::Debug for Listener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Listener({})", self.address)
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Address::Unix(path) = &self.address {
            // The folder for temporary files is cleaned by others too.
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Listener {
    /// Binds a socket of `kind`, at `ip` where it has one, or under a name with `unique` in it; none for shared memory.
    ///
    /// # Errors
    /// If the system refuses.
    pub async fn bind(kind: CollectiveKind, ip: IpAddr, unique: u64) -> io::Result<Option<Self>> {
        let (socket, address) = match kind {
            CollectiveKind::SharedMemory => return Ok(None),
            CollectiveKind::Tcp => {
                let socket = TcpListener::bind((ip, 0)).await?;
                let at = socket.local_addr()?;
                (Socket::Tcp(socket), Address::Tcp(at.ip().to_string(), at.port()))
            }
            CollectiveKind::Unix => {
                let (socket, address) = bind_unix(&format!("skein-{unique:016x}"))?;
                socket.set_nonblocking(true)?;
                (Socket::Unix(UnixListener::from_std(socket)?), address)
            }
        };
        Ok(Some(Self { socket, address }))
    }

    /// Where it is reached.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Takes connections until `stop`. Each must introduce itself within `limit`, and waits that long for its epoch to begin here. Over TCP it
    /// proves before that it is of the same stage, where there is an identity.
    pub async fn serve(self, lobby: Arc<Lobby>, who: Who, identity: Option<Identity>, limit: Duration, stop: CancellationToken) {
        let mut introductions = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                () = stop.cancelled() => return,
                Some(_) = introductions.join_next() => continue,
                accepted = self.accept() => accepted,
            };
            match accepted {
                Ok(_) if introductions.len() >= INTRODUCTIONS => warn!("too many ranks at the collective socket; one was turned away"),
                Ok(accepted) => {
                    let (lobby, identity) = (lobby.clone(), identity.clone());
                    introductions.spawn(async move {
                        if let Err(reason) = accepted.introduce(&lobby, who, identity, limit).await {
                            debug!(reason, "a rank was refused");
                        }
                    });
                }
                // Out of file descriptors, say: the ranks' own deadlines end what waits for this.
                Err(error) => {
                    warn!(%error, "failed to take a rank's connection");
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            }
        }
    }

    async fn accept(&self) -> io::Result<Accepted> {
        Ok(match &self.socket {
            Socket::Tcp(s) => Accepted::Tcp(s.accept().await?.0),
            Socket::Unix(s) => Accepted::Unix(s.accept().await?.0),
        })
    }
}

#[cfg(target_os = "linux")]
fn bind_unix(name: &str) -> io::Result<(std::os::unix::net::UnixListener, Address)> {
    use std::os::linux::net::SocketAddrExt;
    let address = std::os::unix::net::SocketAddr::from_abstract_name(name)?;
    Ok((std::os::unix::net::UnixListener::bind_addr(&address)?, Address::UnixAbstract(name.to_owned())))
}

#[cfg(not(target_os = "linux"))]
fn bind_unix(name: &str) -> io::Result<(std::os::unix::net::UnixListener, Address)> {
    let path = std::env::temp_dir().join(name).to_string_lossy().into_owned();
    Ok((std::os::unix::net::UnixListener::bind(&path)?, Address::Unix(path)))
}

enum Accepted {
    Tcp(tokio::net::TcpStream),
    Tls(Box<TlsStream<tokio::net::TcpStream>>),
    Unix(tokio::net::UnixStream),
}

impl Accepted {
    /// Has a TCP connection proven.
    async fn prove(self, identity: Option<Identity>, limit: Duration) -> Result<Self, String> {
        match (self, identity) {
            (Self::Tcp(s), Some(identity)) => {
                let proven = timeout(limit, identity::accept(&identity, Protocol::Collective, s)).await;
                let (s, name) = proven.map_err(|_| "it did not prove its name in time".to_owned())??;
                let own = identity.name();
                if name != own {
                    return Err(format!("{name} called a rank of {own}"));
                }
                Ok(Self::Tls(Box::new(s)))
            }
            (other, _) => Ok(other),
        }
    }

    async fn introduce(self, lobby: &Lobby, who: Who, identity: Option<Identity>, limit: Duration) -> Result<(), String> {
        let mut this = self.prove(identity, limit).await?;
        let admitted = match &mut this {
            Self::Tcp(s) => admit(s, lobby, who, limit).await,
            Self::Tls(s) => admit(s, lobby, who, limit).await,
            Self::Unix(s) => admit(s, lobby, who, limit).await,
        };
        let (epoch, rank) = match admitted {
            Ok(admitted) => admitted,
            Err(reason) => {
                let told = match &mut this {
                    Self::Tcp(s) => timeout(limit, refuse(s, who, &reason)).await,
                    Self::Tls(s) => timeout(limit, refuse(s, who, &reason)).await,
                    Self::Unix(s) => timeout(limit, refuse(s, who, &reason)).await,
                };
                return Err(match told {
                    Ok(Ok(())) => reason,
                    _ => format!("{reason}; it did not wait to hear that"),
                });
            }
        };
        let stream = match this {
            Self::Tcp(s) => s.into_std().map(Stream::Tcp),
            Self::Tls(s) => {
                let (s, connection) = s.into_inner();
                s.into_std().map(|s| Stream::tls(s, connection.into()))
            }
            Self::Unix(s) => s.into_std().map(Stream::Unix),
        };
        let stream = stream.and_then(|s| s.prepare().map(|()| s)).map_err(|e| e.to_string())?;
        lobby.deposit(epoch, rank, stream)
    }
}

/// Reads who it is, waits for its epoch, and lets it in: (epoch, rank).
async fn admit<S: AsyncRead + AsyncWrite + Unpin>(s: &mut S, lobby: &Lobby, who: Who, limit: Duration) -> Result<(Epoch, usize), String> {
    let mut bytes = [0; HEADER];
    let mut payload = [0; HELLO];
    let read = async {
        s.read_exact(&mut bytes).await?;
        s.read_exact(&mut payload).await
    };
    let read = timeout(limit, read).await.map_err(|_| "it did not introduce itself in time".to_owned())?;
    read.map_err(|e| e.to_string())?;
    let (header, mut sum, end) = Header::decode(&bytes)?;
    sum.add(&payload);
    let (hello, rank) = (Hello::decode(&payload), usize::from(header.rank));
    if header.kind != Kind::Hello || header.bytes as usize != HELLO || !sum.is(end) {
        return Err(format!("{header:?} came, expected a hello"));
    }
    if hello.stage as usize != who.stage || hello.to as usize != who.rank || rank <= who.rank || rank >= who.ranks {
        return Err(format!(
            "rank {rank} called rank {} of stage {}, expected a call of a higher rank to rank {} of stage {}",
            hello.to, hello.stage, who.rank, who.stage
        ));
    }
    if hello.to_incarnation != who.incarnation {
        return Err(format!("the call is for incarnation {:016x}, expected {:016x}", hello.to_incarnation, who.incarnation));
    }
    let epoch = Epoch { number: header.sequence, session: header.session };
    lobby.admit(epoch, limit).await?;
    let welcome = Header { kind: Kind::Welcome, rank: who.rank as u8, bytes: 0, ..header };
    let welcome = welcome.encode(&[]);
    let write = async {
        s.write_all(&welcome).await?;
        s.flush().await
    };
    timeout(limit, write).await.map_err(|_| "it took no answer".to_owned())?.map_err(|e| e.to_string())?;
    Ok((epoch, rank))
}

async fn refuse<S: AsyncWrite + Unpin>(s: &mut S, who: Who, reason: &str) -> io::Result<()> {
    let header = Header { kind: Kind::Refused, rank: who.rank as u8, session: 0, sequence: 0, bytes: reason.len() as u32 };
    s.write_all(&header.encode(reason.as_bytes())).await?;
    s.write_all(reason.as_bytes()).await?;
    s.flush().await
}
