//! TLS, checked: whom weir believes, and what it shows. All files are PEM; none is read here.

use std::path::PathBuf;

pub use super::raw::TlsVersion as Version;
use super::yaml::Position;

/// Of a client: who is believed, and what is shown.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tls {
    /// In place of the public authorities.
    pub ca: Option<PathBuf>,
    pub certificate: Option<Certificate>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Certificate {
    /// The chain, the server's or client's own first.
    pub cert: PathBuf,
    pub key: PathBuf,
}

/// Of an upstream.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UpstreamTls {
    /// In place of the endpoint's own name, for what is asked and for what its certificate must say.
    pub sni: Option<String>,
    pub tls: Tls,
}

/// Of a listener.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenerTls {
    /// At least one; the first where none has the name that the client asks for.
    pub certificates: Vec<Certificate>,
    pub client_auth: ClientAuth,
    pub min_version: Version,
}

/// Whether clients show a certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClientAuth {
    None,
    /// They may; one that these authorities have not signed ends the handshake.
    Optional(PathBuf),
    /// They must, signed by one of these authorities.
    Required(PathBuf),
}

/// A PEM file, and where the configuration names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PemFile {
    pub file: PathBuf,
    pub holds: Holds,
    pub place: Position,
}

/// What a PEM file is to hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Holds {
    Chain,
    Authorities,
    /// The key of the first certificate of this file.
    KeyOf(PathBuf),
}

impl ListenerTls {
    /// Every file that is read.
    pub fn files(&self) -> impl Iterator<Item = &PathBuf> {
        let ca = match &self.client_auth {
            ClientAuth::None => None,
            ClientAuth::Optional(ca) | ClientAuth::Required(ca) => Some(ca),
        };
        let pairs = self.certificates.iter().flat_map(Certificate::files);
        pairs.chain(ca)
    }
}

impl Tls {
    /// Every file that is read, but for the system's authorities.
    pub fn files(&self) -> impl Iterator<Item = &PathBuf> {
        let pair = self.certificate.iter().flat_map(Certificate::files);
        pair.chain(&self.ca)
    }
}

impl Certificate {
    fn files(&self) -> [&PathBuf; 2] {
        [&self.cert, &self.key]
    }
}
