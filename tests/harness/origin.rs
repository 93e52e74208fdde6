//! An upstream under TLS or not, by either version of HTTP, that says how it was asked.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{RecvStream, server};
use http::{Request, Response};
use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use super::runtime;
use super::tls::Authority;

/// What it answers begins with the version of HTTP by which it was asked.
pub struct Origin {
    pub port: u16,
    opened: Arc<AtomicUsize>,
}

impl Origin {
    /// Under TLS, with the certificate of this name, and ready to agree on these protocols (ALPN); on none, it does not know of that
    /// and speaks HTTP/1.1.
    pub fn secure(authority: &Authority, name: &str, protocols: &[&str]) -> Origin {
        let config = Origin::tls(authority, name, protocols);
        Origin::start(Some(TlsAcceptor::from(Arc::new(config))))
    }

    /// What TLS so is.
    pub fn tls(authority: &Authority, name: &str, protocols: &[&str]) -> ServerConfig {
        let chain = CertificateDer::pem_file_iter(authority.path(&format!("{name}.crt"))).unwrap();
        let chain = chain.map(Result::unwrap).collect();
        let key = PrivateKeyDer::from_pem_file(authority.path(&format!("{name}.key"))).unwrap();
        let mut config =
            ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
                .with_safe_default_protocol_versions()
                .unwrap()
                .with_no_client_auth()
                .with_single_cert(chain, key)
                .unwrap();
        let protocols = protocols.iter().map(|name| name.as_bytes().to_vec());
        config.alpn_protocols = protocols.collect();
        config
    }

    /// Without TLS, by HTTP/2 alone.
    pub fn by_http2() -> Origin {
        Origin::start(None)
    }

    /// Connections that came, ever.
    pub fn opened(&self) -> usize {
        self.opened.load(Ordering::Relaxed)
    }

    fn start(tls: Option<TlsAcceptor>) -> Origin {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let port = listener.local_addr().unwrap().port();
        let opened = Arc::<AtomicUsize>::default();
        let counted = opened.clone();
        thread::spawn(move || {
            runtime().block_on(async {
                let listener = TcpListener::from_std(listener).unwrap();
                while let Ok((tcp, _)) = listener.accept().await {
                    counted.fetch_add(1, Ordering::Relaxed);
                    let tls = tls.clone();
                    tokio::spawn(async move {
                        match tls {
                            None => by_http2(tcp).await,
                            Some(tls) => {
                                let Ok(stream) = tls.accept(tcp).await else {
                                    return;
                                };
                                match stream.get_ref().1.alpn_protocol() {
                                    Some(b"h2") => by_http2(stream).await,
                                    _ => drop(by_http1(BufReader::new(stream)).await),
                                }
                            }
                        }
                    });
                }
            });
        });
        Origin { port, opened }
    }
}

async fn by_http2(stream: impl AsyncRead + AsyncWrite + Unpin) {
    let Ok(mut requests) = server::handshake(stream).await else {
        return;
    };
    while let Some(Ok((request, respond))) = requests.accept().await {
        tokio::spawn(answer_http2(request, respond));
    }
}

async fn answer_http2(mut request: Request<RecvStream>, mut respond: SendResponse<Bytes>) {
    let mut length = 0;
    while let Some(Ok(data)) = request.body_mut().data().await {
        length += data.len();
        let _ = request
            .body_mut()
            .flow_control()
            .release_capacity(data.len());
    }
    let (method, uri) = (request.method(), request.uri());
    let body = format!("2 {method} {uri} {length}");
    let response = Response::builder().header("content-length", body.len());
    if let Ok(mut stream) = respond.send_response(response.body(()).unwrap(), false) {
        let _ = stream.send_data(body.into(), true);
    }
}

/// As long as requests come; one for a switch of protocols is granted, and all behind it sent back.
async fn by_http1(mut stream: impl AsyncBufReadExt + AsyncWrite + Unpin) -> std::io::Result<()> {
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if stream.read_line(&mut head).await? == 0 {
                return Ok(());
            }
        }
        let head = head.to_ascii_lowercase();
        if head.contains("\r\nupgrade: ") {
            let switched =
                "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n";
            stream.write_all(switched.as_bytes()).await?;
            stream.flush().await?;
            let mut piece = [0; 1024];
            loop {
                let some = stream.read(&mut piece).await?;
                if some == 0 {
                    return Ok(());
                }
                stream.write_all(&piece[..some]).await?;
                stream.flush().await?;
            }
        }
        let mut lines = head.lines();
        let length = lines.find_map(|line| line.strip_prefix("content-length: "));
        let length: usize = length.map_or(0, |length| length.parse().unwrap());
        let mut body = vec![0; length];
        stream.read_exact(&mut body).await?;
        let line = head.lines().next().unwrap_or_default();
        let body = format!("1 {line} {length}");
        let answer = format!(
            "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(answer.as_bytes()).await?;
        stream.flush().await?;
    }
}
