//! TLS: who is believed, what is shown, and what is known of a connection once both ends agree.

/// What both ends have agreed to speak (ALPN, RFC 7301).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    Http1,
    Http2,
}

/// What TLS tells of the client at the other end.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ClientFacts {
    /// The name that the client asked for.
    pub sni: Option<String>,
    pub certificate: Option<ClientCertificate>,
}

/// A client's certificate, which an authority that weir believes has signed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientCertificate {
    /// As RFC 4514 writes it.
    pub subject: String,
    pub uris: Vec<String>,
    pub dns_names: Vec<String>,
    /// The SHA-256 of the certificate, in hexadecimal digits.
    pub hash: String,
}
