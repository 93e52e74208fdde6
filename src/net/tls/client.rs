//! TLS towards servers: upstreams, and those that keep state. Set up once for a client, which then reads no files and parses no
//! certificates however often it connects.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use sha2::{Digest, Sha256};
use tokio_rustls::TlsConnector;

use super::facts::holds;
use super::public::{Public, PublicOnce};
use super::{TlsError, authorities, believed, certificates, private_key, provider, read, unusable};
use crate::config::Protocol;
use crate::config::tls::{Tls, UpstreamTls};
use crate::net::stream::{Socket, Stream};

/// How a client speaks TLS.
#[derive(Debug)]
pub(super) struct Client {
    pub config: ClientConfig,
    /// The file of the certificate that it shows, and when that ends, since the epoch; `None` where it shows none, or one whose end
    /// cannot be read.
    pub holds: Option<(String, Range<Duration>)>,
    /// Where they are believed.
    pub public: Option<Arc<Public>>,
}

impl Client {
    /// Reads the files of `tls`; asks for the public authorities of the system only where it names none.
    pub(super) fn read(tls: &Tls, public: &PublicOnce) -> Result<Client, TlsError> {
        match &tls.ca {
            None if public.get().roots.is_empty() => Err(TlsError::NoAuthority),
            _ => Client::read_if_needed(tls, public),
        }
    }

    /// As [`Client::read`], for a server that may do without TLS: without an authority to believe there is no error until one shows
    /// a certificate.
    pub(super) fn read_if_needed(tls: &Tls, public: &PublicOnce) -> Result<Client, TlsError> {
        let builder = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(unusable)?;
        let builder = match &tls.ca {
            Some(ca) => {
                let verifier = believed::servers(authorities(ca)?)?;
                builder
                    .dangerous()
                    .with_custom_certificate_verifier(verifier)
            }
            None => builder.with_root_certificates(public.get().roots.clone()),
        };
        let public = tls.ca.is_none().then(|| public.get().clone());
        let Some(ours) = &tls.certificate else {
            return Ok(Client {
                config: builder.with_no_client_auth(),
                holds: None,
                public,
            });
        };
        let (key, chain) = (private_key(&ours.key)?, certificates(&ours.cert)?);
        let holds = holds(&chain[0]);
        let config = builder.with_client_auth_cert(chain, key);
        Ok(Client {
            config: config.map_err(unusable)?,
            holds: holds.map(|holds| (ours.cert.display().to_string(), holds)),
            public,
        })
    }
}

/// What the files hold, in short; the system's authorities too, where it names none of its own.
pub(super) fn digest(tls: &Tls, public: &PublicOnce) -> Result<[u8; 32], TlsError> {
    let mut digest = Sha256::new();
    let mut add = |bytes: &[u8]| {
        digest.update(bytes.len().to_be_bytes());
        digest.update(bytes);
    };
    for file in tls.files() {
        add(&read(file)?);
    }
    if tls.ca.is_none() {
        add(&public.get().digest);
    }
    Ok(digest.finalize().into())
}

/// TLS towards an upstream, as its files were when they were read.
#[derive(Debug)]
pub struct ClientTls {
    config: Arc<ClientConfig>,
    /// The same for HTTP/1.1 alone.
    http1: Arc<ClientConfig>,
    sni: Option<ServerName<'static>>,
    holds: Option<(String, Range<Duration>)>,
    /// Where they are believed.
    pub(super) public: Option<Arc<Public>>,
    /// Of what it was made from: what is made of the same is the same.
    source: Source,
}

/// What is offered to an upstream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Offer {
    /// All that it may speak.
    All,
    /// That alone in which connections can switch to another.
    Http1,
}

#[derive(Debug, PartialEq, Eq)]
struct Source {
    settings: UpstreamTls,
    protocol: Protocol,
    files: [u8; 32],
}

impl ClientTls {
    /// Reads the files of `settings`; `old` itself, if they say the same.
    pub(super) fn read(
        settings: &UpstreamTls,
        protocol: Protocol,
        public: &PublicOnce,
        old: Option<&Arc<ClientTls>>,
    ) -> Result<Arc<ClientTls>, TlsError> {
        let source = Source {
            settings: settings.clone(),
            protocol,
            files: digest(&settings.tls, public)?,
        };
        if let Some(old) = old.filter(|old| old.source == source) {
            return Ok(old.clone());
        }
        let Client {
            config,
            holds,
            public,
        } = Client::read(&settings.tls, public)?;
        let offering = |names: &[&[u8]]| {
            let mut config = config.clone();
            config.alpn_protocols = names.iter().map(|name| name.to_vec()).collect();
            Arc::new(config)
        };
        let http1 = offering(&[b"http/1.1"]);
        let config = match protocol {
            Protocol::Http1 => http1.clone(),
            Protocol::Http2 => offering(&[b"h2"]),
            Protocol::Auto => offering(&[b"h2", b"http/1.1"]),
        };
        let sni = settings.sni.clone().map(ServerName::try_from).transpose();
        let sni = sni.map_err(|error| TlsError::Certificates(format!("sni: {error}")))?;
        Ok(Arc::new(ClientTls {
            config,
            http1,
            sni,
            holds,
            public,
            source,
        }))
    }

    /// The file of the certificate that the upstream is shown, and when that ends, since the epoch.
    pub(super) fn holds(&self) -> Option<(String, Range<Duration>)> {
        self.holds.clone()
    }

    /// Whether it was made for these settings, whatever their files said.
    pub(super) fn is_of(&self, settings: &UpstreamTls, protocol: Protocol) -> bool {
        self.source.settings == *settings && self.source.protocol == protocol
    }

    /// The stream once both ends agree; the other's certificate must be for `name`, unless the file names another. Offers what the
    /// upstream is to speak, or HTTP/1.1 where that is `wanted` alone.
    pub async fn shake_hands(
        &self,
        socket: Socket,
        name: &str,
        wanted: Offer,
    ) -> io::Result<Stream> {
        let name = match &self.sni {
            Some(sni) => sni.clone(),
            None => ServerName::try_from(name.to_owned())
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?,
        };
        let config = match wanted {
            Offer::All => &self.config,
            Offer::Http1 => &self.http1,
        };
        let tls = TlsConnector::from(config.clone());
        let tls = tls.connect(name, socket).await?;
        let stream = Stream::Tls(Box::new(tls.into()));
        let must = wanted == Offer::All && self.source.protocol == Protocol::Http2;
        // HTTP/2 under TLS is never spoken unless both ends have said so (RFC 9113 section 3.2).
        if must && !stream.is_http2() {
            return Err(io::Error::other(rustls::Error::NoApplicationProtocol));
        }
        Ok(stream)
    }
}
