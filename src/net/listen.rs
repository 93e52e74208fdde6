//! Sockets that clients connect to, which all lanes share: ports and files. Must not know what is said.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, fchmod};
use rustix::io::Errno;
use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, Type};

use super::{descriptors, stream};
use crate::config::listeners::Address;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 1024;

/// Where this machine listens for `address`: `[::]` is all addresses, and where the kernel has no IPv6 those are `0.0.0.0`.
pub fn here(address: SocketAddr) -> SocketAddr {
    within(address, has_ipv6)
}

fn within(address: SocketAddr, has_ipv6: impl FnOnce() -> bool) -> SocketAddr {
    match is_all(address) && !has_ipv6() {
        true => SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), address.port()),
        false => address,
    }
}

/// Whether it is `[::]`.
fn is_all(address: SocketAddr) -> bool {
    address.is_ipv6() && address.ip().is_unspecified()
}

/// A socket at [`here`], at a port that nobody shares.
pub fn alone(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = tcp(here(address), Port::Alone)?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// A socket for one lane.
#[derive(Debug)]
pub enum Bound {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// The same, within a lane's runtime.
#[derive(Debug)]
pub enum Accepting {
    Tcp(tokio::net::TcpListener),
    Unix(tokio::net::UnixListener),
}

impl Bound {
    /// A socket that listens at `address`, made with `mode` where it is a file. A TCP one, which must be [`here`], shares its port with those
    /// of other lanes (SO_REUSEPORT).
    pub fn new(address: &Address, mode: u32) -> io::Result<Bound> {
        let bound = match address {
            Address::Tcp(address) => Bound::Tcp(tcp(*address, Port::Shared)?.into()),
            Address::Unix(path) => return unix(path, mode).map(Bound::Unix),
        };
        bound.listen()?;
        Ok(bound)
    }

    /// Another one at the same place, for another lane: of a port each lane has a queue of its own, which gets no connections until it
    /// [listens](Bound::listen); of a file all have one.
    pub fn again(&self) -> io::Result<Bound> {
        match self {
            Bound::Tcp(listener) => {
                let socket = tcp(listener.local_addr()?, Port::Shared)?;
                Ok(Bound::Tcp(socket.into()))
            }
            Bound::Unix(listener) => listener.try_clone().map(Bound::Unix),
        }
    }

    /// Where it is, with the port that it was given.
    pub fn address(&self) -> io::Result<Address> {
        match self {
            Bound::Tcp(listener) => listener.local_addr().map(Address::Tcp),
            Bound::Unix(listener) => {
                let address = listener.local_addr()?;
                let path = address.as_pathname().map(Path::to_owned);
                Ok(Address::Unix(path.unwrap_or_default()))
            }
        }
    }

    /// Has connections wait here to be accepted.
    pub fn listen(&self) -> io::Result<()> {
        match self {
            Bound::Tcp(listener) => SockRef::from(listener).listen(BACKLOG),
            Bound::Unix(_) => Ok(()),
        }
    }

    /// To be called within a runtime. From then on it listens.
    pub fn accepting(self) -> io::Result<Accepting> {
        self.listen()?;
        Ok(match self {
            Bound::Tcp(listener) => Accepting::Tcp(tokio::net::TcpListener::from_std(listener)?),
            Bound::Unix(listener) => Accepting::Unix(tokio::net::UnixListener::from_std(listener)?),
        })
    }
}

impl AsFd for Bound {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Bound::Tcp(listener) => listener.as_fd(),
            Bound::Unix(listener) => listener.as_fd(),
        }
    }
}

impl Accepting {
    /// The next connection, and who is at its other end; a Unix socket does not tell. One that would take a descriptor which is
    /// [left to others](descriptors) is closed, and an error.
    pub async fn accept(&self) -> io::Result<(stream::Socket, Option<SocketAddr>)> {
        let (socket, peer) = match self {
            Accepting::Tcp(listener) => {
                let (tcp, peer) = listener.accept().await?;
                (stream::Socket::from(tcp), Some(peer))
            }
            Accepting::Unix(listener) => {
                let (unix, _) = listener.accept().await?;
                (stream::Socket::from(unix), None)
            }
        };
        descriptors::spare(&socket)?;
        Ok((socket, peer))
    }
}

/// The files of Unix sockets, removed when this is dropped, unless others have taken their place or another process listens there still: in a
/// take-over the file is of two.
#[derive(Debug, Default)]
pub struct SocketFiles(Vec<(PathBuf, u64)>);

impl SocketFiles {
    /// Those of these sockets.
    pub fn of<'s>(sockets: impl Iterator<Item = &'s Bound>) -> SocketFiles {
        let file = |socket: &Bound| match socket.address().ok()? {
            Address::Tcp(_) => None,
            Address::Unix(path) => {
                let inode = fs::symlink_metadata(&path).ok()?.ino();
                Some((path, inode))
            }
        };
        SocketFiles(sockets.filter_map(file).collect())
    }
}

impl Drop for SocketFiles {
    fn drop(&mut self) {
        for (path, inode) in &self.0 {
            let is_ours = fs::symlink_metadata(path).is_ok_and(|file| file.ino() == *inode);
            if is_ours && is_left_behind(path).is_ok_and(|left| left) {
                let _ = fs::remove_file(path);
            }
        }
    }
}

/// Gives the file of a Unix socket that another process made this mode; there is nothing to give to a port.
pub fn set_mode(address: &Address, mode: u32) -> io::Result<()> {
    match address {
        Address::Tcp(_) => Ok(()),
        Address::Unix(path) => fs::set_permissions(path, fs::Permissions::from_mode(mode)),
    }
}

/// A kernel that was built or started without IPv6 makes no such socket. One whose interfaces have it switched off does, and takes IPv4 by it.
fn has_ipv6() -> bool {
    match Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP)) {
        Ok(_) => true,
        Err(error) => error.raw_os_error() != Some(Errno::AFNOSUPPORT.raw_os_error()),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Port {
    Shared,
    Alone,
}

/// A socket that does not listen yet.
fn tcp(address: SocketAddr, port: Port) -> io::Result<Socket> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(port == Port::Shared)?;
    if is_all(address) {
        // IPv4 as well, whatever net.ipv6.bindv6only says.
        socket.set_only_v6(false)?;
    }
    // What is accepted has it from here, at no cost of its own.
    socket.set_tcp_keepalive(&stream::keepalive())?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

fn unix(path: &Path, mode: u32) -> io::Result<UnixListener> {
    make_way(path)?;
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    // The file takes over the socket's own mode but for the umask's part: so that there is no moment in which others reach it.
    fchmod(&socket, Mode::from_raw_mode(mode))?;
    socket.bind(&SockAddr::unix(path)?)?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Removes the socket that a process which has ended left behind; an error for one that someone listens on, or what is no socket.
fn make_way(path: &Path) -> io::Result<()> {
    let taken = |why: &str| Err(io::Error::new(io::ErrorKind::AddrInUse, why));
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
        Ok(file) if !file.file_type().is_socket() => taken("there is a file that is no socket"),
        Ok(_) if is_left_behind(path)? => fs::remove_file(path),
        Ok(_) => taken("another process listens there"),
    }
}

/// Whether no one listens at the socket any more.
fn is_left_behind(path: &Path) -> io::Result<bool> {
    let caller = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // One that stands still may have as many callers as wait at most.
    caller.set_nonblocking(true)?;
    let called = caller.connect(&SockAddr::unix(path)?);
    Ok(called.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused))
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;
    use std::net::TcpStream;

    use super::*;

    #[test]
    fn a_socket_whose_process_stands_still_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let stands_still = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        let address = SockAddr::unix(&path).unwrap();
        stands_still.bind(&address).unwrap();
        stands_still.listen(0).unwrap();
        let callers: Vec<_> = (0..3)
            .map(|_| {
                let caller = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
                caller.set_nonblocking(true).unwrap();
                let _ = caller.connect(&address);
                caller
            })
            .collect();
        let taken = unix(&path, 0o600).unwrap_err();
        assert_eq!(taken.kind(), ErrorKind::AddrInUse);
        drop(callers);
    }

    #[test]
    fn what_listens_on_all_addresses_takes_ipv4_and_ipv6() {
        let listener = alone("[::]:0".parse().unwrap()).unwrap();
        listener.set_nonblocking(false).unwrap();
        let port = listener.local_addr().unwrap().port();
        let socket = SockRef::from(&listener);
        assert!(!socket.only_v6().unwrap() && !socket.reuse_port().unwrap());
        for client in ["127.0.0.1", "::1"] {
            let _client = TcpStream::connect((client, port)).unwrap();
            listener.accept().unwrap();
        }
    }

    #[test]
    fn without_ipv6_all_addresses_are_those_of_ipv4() {
        for (address, expected) in [
            ("[::]:80", "0.0.0.0:80"),
            ("[::1]:80", "[::1]:80"),
            ("0.0.0.0:80", "0.0.0.0:80"),
        ] {
            let address = address.parse().unwrap();
            assert_eq!(within(address, || false).to_string(), expected);
            assert_eq!(within(address, || true), address);
        }
    }

    #[test]
    fn the_file_of_a_socket_goes_with_the_last_who_listens_at_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let old = Bound::new(&Address::Unix(path.clone()), 0o600).unwrap();
        let new = old.again().unwrap();
        let files = SocketFiles::of([&old].into_iter());
        drop(old);
        drop(files);
        assert!(path.exists());
        let files = SocketFiles::of([&new].into_iter());
        drop(new);
        drop(files);
        assert!(!path.exists());
    }

    #[test]
    fn the_more_specific_of_two_listeners_gets_the_connections() {
        let bound = |address: &str| {
            let socket = tcp(address.parse().unwrap(), Port::Shared).unwrap();
            socket.listen(BACKLOG).unwrap();
            TcpListener::from(socket)
        };
        let all = bound("0.0.0.0:0");
        let port = all.local_addr().unwrap().port();
        let one = bound(&format!("127.0.0.1:{port}"));
        for _ in 0..20 {
            let _client = TcpStream::connect(("127.0.0.1", port)).unwrap();
            assert!(one.accept().is_ok());
            assert_eq!(all.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
        }
    }
}
