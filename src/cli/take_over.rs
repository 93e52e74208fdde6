//! How a new process takes over the ports of the one that it replaces: it gets the very sockets that the old one listens on (SCM_RIGHTS),
//! with whatever waits in their queues, and tells it once it serves. Both meet at a socket in the abstract namespace, which is that of
//! the network, as ports are; it is named after the admin address. Owns who is given what; must not know what is served.

use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net as unix;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use rustix::cmsg_space;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use socket2::Socket;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, Interest};
use tokio::net::{TcpStream, UnixListener, UnixStream};
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use crate::clock;
use crate::config::listeners::Address;
use crate::net::listen::Bound;
use crate::telemetry::log::LogRateLimit;

/// What processes of any version begin with.
const VERSION: u8 = b'1';
/// Comes with a socket.
const SOCKET: u8 = b'S';
/// Behind the last socket.
const NO_MORE: u8 = b'E';
/// The new process serves.
const SERVES: u8 = b'R';
/// The old one offers nothing any more.
const FAREWELL: u8 = b'B';
/// For what neither side has to wait for.
const WITHIN: Duration = Duration::from_secs(5);

/// Between two who fail to take over, and two times that one asks.
const PAUSE: Duration = Duration::from_millis(100);

/// How often one asks who comes while another takes over.
const ASKS: u32 = 20;

/// What was taken over. Dropped before [`Taken::say_serving`], it is as if nobody had asked.
#[derive(Debug, Default)]
pub(super) struct Taken {
    sockets: Vec<Socket>,
    from: Option<UnixStream>,
}

impl Taken {
    /// Asks the process whose admin port is at `admin`, or the one that takes over from that meanwhile. Where there is none that offers,
    /// nothing is taken.
    pub(super) async fn from(admin: SocketAddr) -> anyhow::Result<Taken> {
        let mut again = 1..ASKS;
        loop {
            // Between a process that leaves and the one that has taken over nobody offers, though the port is served; and whoever waited
            // for his turn at the first is left without a word.
            let between = match ask(admin).await? {
                Answer::Given(taken) => {
                    info!(%admin, sockets = taken.sockets.len(), "taking over");
                    return Ok(taken);
                }
                Answer::Left => true,
                Answer::Nobody => is_served(admin).await,
            };
            if !between || again.next().is_none() {
                info!(%admin, "nobody to take over from");
                return Ok(Taken::default());
            }
            sleep(PAUSE).await;
        }
    }

    /// Whether there is a process that is taken over from.
    pub(super) fn is_some(&self) -> bool {
        self.from.is_some()
    }

    /// Whether there is a socket left that listens there.
    pub(super) fn has(&self, address: &Address) -> bool {
        self.sockets.iter().any(|socket| is_at(socket, address))
    }

    /// One of the sockets that listen there.
    pub(super) fn listener(&mut self, address: &Address) -> Option<Bound> {
        let socket = self.take(address)?;
        Some(match address {
            Address::Tcp(_) => Bound::Tcp(socket.into()),
            Address::Unix(_) => Bound::Unix(socket.into()),
        })
    }

    /// Likewise, at a port.
    pub(super) fn port(&mut self, address: SocketAddr) -> Option<TcpListener> {
        self.take(&Address::Tcp(address)).map(TcpListener::from)
    }

    fn take(&mut self, address: &Address) -> Option<Socket> {
        let mut sockets = self.sockets.iter();
        let at = sockets.position(|socket| is_at(socket, address))?;
        Some(self.sockets.swap_remove(at))
    }

    /// Tells the process that was taken over from that this one serves, so that it drains; sockets that are not used are let go of.
    /// Returns once that offers nothing any more.
    pub(super) async fn say_serving(self) {
        let Some(mut from) = self.from else { return };
        let farewell = async {
            from.write_u8(SERVES).await?;
            from.read_u8().await
        };
        match timeout(WITHIN, farewell).await {
            Ok(Ok(FAREWELL)) => {}
            // It is gone, which is all the same; or it does not drain, and someone must end it.
            Ok(Ok(_) | Err(_)) | Err(_) => {
                warn!("the process that was taken over from does not say that it drains");
            }
        }
    }
}

/// What another process may take over.
#[derive(Debug)]
pub(super) struct Offer {
    at: UnixListener,
    sockets: Vec<OwnedFd>,
}

impl Offer {
    /// Offers `sockets`, whose first is the admin port's, to whoever is to replace this process.
    pub(super) fn new(admin: SocketAddr, sockets: Vec<OwnedFd>) -> anyhow::Result<Offer> {
        let at = unix::UnixListener::bind_addr(&unix::SocketAddr::from_abstract_name(name(admin))?)
            .with_context(|| format!("cannot offer the ports of the weir at {admin}"))?;
        at.set_nonblocking(true)?;
        Ok(Offer {
            at: UnixListener::from_std(at)?,
            sockets,
        })
    }

    /// Returns once another process serves at these sockets.
    async fn taken(self) {
        // One who asks while nobody can be let in is met with each pause.
        let mut lines = LogRateLimit::new(5);
        let stream = loop {
            match self.give().await {
                Ok(stream) => break stream,
                Err(error) => {
                    if let Some(left_out) = lines.next(clock::mono()) {
                        let error = format!("{error:#}");
                        let left_out = (left_out > 0).then_some(left_out);
                        warn!(error, left_out, "not taken over, and so going on");
                    }
                    sleep(PAUSE).await;
                }
            }
        };
        // The other one offers them from now on, under this name.
        drop(self);
        let mut stream = stream;
        let _ = timeout(WITHIN, stream.write_u8(FAREWELL)).await;
    }

    /// Serves one who asks, until it says that it serves.
    async fn give(&self) -> anyhow::Result<UnixStream> {
        let (mut stream, _) = self.at.accept().await?;
        is_trusted(&stream)?;
        let sent = timeout(WITHIN, send(&mut stream, &self.sockets)).await;
        sent.context("it does not take the ports")??;
        info!("another process is taking over");
        match stream.read_u8().await {
            Ok(SERVES) => Ok(stream),
            Ok(_) | Err(_) => bail!("the process that was to take over ended before it served"),
        }
    }
}

/// Returns once what is offered was taken; never, where nothing is. Dropped, it closes the sockets that are offered.
pub(super) async fn taken(offer: Option<Offer>) {
    match offer {
        Some(offer) => offer.taken().await,
        None => std::future::pending().await,
    }
}

/// What comes of asking once.
enum Answer {
    Given(Taken),
    /// The process that was asked offers nothing any more: another has taken over, or it is gone.
    Left,
    Nobody,
}

async fn ask(admin: SocketAddr) -> anyhow::Result<Answer> {
    // It never waits: a process that stands still may have the name, with as many callers as wait for it at most.
    let mut stream = match UnixStream::connect(format!("\0{}", name(admin))).await {
        Ok(stream) => stream,
        Err(error) => match error.kind() {
            ErrorKind::ConnectionRefused => return Ok(Answer::Nobody),
            ErrorKind::ConnectionReset => return Ok(Answer::Left),
            ErrorKind::WouldBlock => bail!(STANDS_STILL),
            _ => return Err(error).context("cannot ask for the ports"),
        },
    };
    // Whoever is first may have the name: sockets of another user's are not to be served.
    is_trusted(&stream).context("cannot take over")?;
    let received = timeout(WITHIN, receive(&mut stream)).await;
    let received = received.unwrap_or_else(|_| bail!(STANDS_STILL));
    let Some(sockets) = received.context("cannot take over")? else {
        return Ok(Answer::Left);
    };
    Ok(Answer::Given(Taken {
        sockets,
        from: Some(stream),
    }))
}

const STANDS_STILL: &str = "the process that runs does not hand over its ports";

/// Whether someone listens there. To listen oneself would tell, too, and be in the way of who is about to.
async fn is_served(admin: SocketAddr) -> bool {
    let connected = timeout(PAUSE, TcpStream::connect(admin)).await;
    connected.is_ok_and(|connected| connected.is_ok())
}

fn name(admin: SocketAddr) -> String {
    format!("weir/take-over/{admin}")
}

/// The other end is of this process's user. Another's sockets are not served, root's neither: ports and files that both use are one user's.
fn is_trusted(stream: &UnixStream) -> anyhow::Result<()> {
    let other = stream.peer_cred()?.uid();
    // The other end of a pair is one's own.
    let own = UnixStream::pair()?.0.peer_cred()?.uid();
    ensure!(
        other == own,
        "the other process is of user {other}, and this one of {own}: start both as one user"
    );
    Ok(())
}

fn is_at(socket: &Socket, address: &Address) -> bool {
    let at = socket.local_addr().ok();
    match address {
        Address::Tcp(address) => at.and_then(|at| at.as_socket()) == Some(*address),
        Address::Unix(path) => at.is_some_and(|at| at.as_pathname() == Some(path)),
    }
}

async fn send(stream: &mut UnixStream, sockets: &[OwnedFd]) -> io::Result<()> {
    stream.write_u8(VERSION).await?;
    for socket in sockets {
        let fds = [socket.as_fd()];
        let one = || {
            let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
            let mut rights = SendAncillaryBuffer::new(&mut space);
            rights.push(SendAncillaryMessage::ScmRights(&fds));
            let flags = SendFlags::NOSIGNAL;
            Ok(sendmsg(
                &*stream,
                &[IoSlice::new(&[SOCKET])],
                &mut rights,
                flags,
            )?)
        };
        stream.async_io(Interest::WRITABLE, one).await?;
    }
    stream.write_u8(NO_MORE).await
}

/// `None` where the other end leaves before it says anything.
async fn receive(stream: &mut UnixStream) -> anyhow::Result<Option<Vec<Socket>>> {
    let Ok(version) = stream.read_u8().await else {
        return Ok(None);
    };
    ensure!(
        version == VERSION,
        "the process that runs is of a version that hands over in another way: stop it first"
    );
    let mut sockets = Vec::new();
    loop {
        let one = || {
            let mut byte = [0];
            let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
            let mut rights = RecvAncillaryBuffer::new(&mut space);
            let into = &mut [IoSliceMut::new(&mut byte)];
            let received = recvmsg(&*stream, into, &mut rights, RecvFlags::CMSG_CLOEXEC)?;
            let mut fds = rights.drain().filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
                _ => None,
            });
            Ok((byte[0], received.bytes, fds.next()))
        };
        match stream.async_io(Interest::READABLE, one).await? {
            (SOCKET, 1, Some(fd)) => sockets.push(Socket::from(fd)),
            (SOCKET, 1, None) => bail!("no more files can be opened: raise the limit (ulimit -n)"),
            (NO_MORE, 1, None) => return Ok(Some(sockets)),
            (_, _, _) => bail!("the process that runs broke off"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn offered() -> (SocketAddr, TcpListener, Offer) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let offer = Offer::new(address, vec![listener.try_clone().unwrap().into()]).unwrap();
        (address, listener, offer)
    }

    #[tokio::test]
    async fn what_is_taken_is_the_same_socket_and_the_offer_ends_once_it_serves() {
        let (address, listener, offer) = offered().await;
        let waits = std::net::TcpStream::connect(address).unwrap();
        let giving = tokio::spawn(taken(Some(offer)));
        let mut got = Taken::from(address).await.unwrap();
        let at = Address::Tcp(address);
        assert!(got.has(&at));
        let same = got.port(address).unwrap();
        assert!(!got.has(&at) && got.listener(&at).is_none());
        drop(listener);
        got.say_serving().await;
        giving.await.unwrap();
        let (_, peer) = same.accept().unwrap();
        assert_eq!(peer, waits.local_addr().unwrap());
        // The name is free for the next.
        Offer::new(address, Vec::new()).unwrap();
    }

    #[tokio::test]
    async fn one_that_ends_before_it_serves_takes_nothing() {
        let (address, _listener, offer) = offered().await;
        let giving = tokio::spawn(taken(Some(offer)));
        for _ in 0..3 {
            drop(Taken::from(address).await.unwrap());
        }
        assert!(!giving.is_finished());
        Taken::from(address).await.unwrap().say_serving().await;
        giving.await.unwrap();
    }

    /// So that what can be done at once is done.
    async fn others_go_on() {
        for _ in 0..1_000 {
            tokio::task::yield_now().await;
        }
    }

    /// As where two are started at once: the old process ends while the second waits for its turn, and the first does not offer yet.
    #[tokio::test]
    async fn who_waits_behind_another_takes_over_from_that_one() {
        let (address, listener, offer) = offered().await;
        let giving = tokio::spawn(taken(Some(offer)));
        let first = Taken::from(address).await.unwrap();
        let second = tokio::spawn(Taken::from(address));
        others_go_on().await;
        first.say_serving().await;
        giving.await.unwrap();
        others_go_on().await;
        let offer = Offer::new(address, vec![listener.into()]).unwrap();
        let giving = tokio::spawn(taken(Some(offer)));
        let mut second = second.await.unwrap().unwrap();
        assert!(second.port(address).is_some());
        second.say_serving().await;
        giving.await.unwrap();
    }

    /// The port is served by one that has taken over, and is about to offer it.
    #[tokio::test]
    async fn who_asks_between_two_offers_waits_for_the_next() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let asking = tokio::spawn(Taken::from(address));
        others_go_on().await;
        let offer = Offer::new(address, vec![listener.into()]).unwrap();
        let giving = tokio::spawn(taken(Some(offer)));
        let mut got = asking.await.unwrap().unwrap();
        assert!(got.port(address).is_some());
        got.say_serving().await;
        giving.await.unwrap();
    }

    #[tokio::test]
    async fn nobody_is_no_mistake() {
        let address = "127.0.0.1:1".parse().unwrap();
        assert!(Taken::from(address).await.unwrap().sockets.is_empty());
    }
}
