//! A certificate that a file of authorities holds itself is believed, by its bytes. webpki believes what an authority has signed alone, and no
//! server or client by one that may sign others (RFC 5280 section 4.2.1.9), as openssl makes those that sign themselves. Its dates and, of a
//! server, its name still count.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WebPkiServerVerifier, verify_server_name};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, DigitallySignedStruct, Error, SignatureScheme};

use super::facts::holds;
use super::{Authorities, TlsError, provider};

/// The certificates that the file holds.
#[derive(Debug)]
pub(super) struct Held(pub Vec<CertificateDer<'static>>);

impl Held {
    /// Whether the file holds this one; an error where it does not hold now.
    pub(super) fn has(
        &self,
        certificate: &CertificateDer<'_>,
        now: UnixTime,
    ) -> Result<bool, Error> {
        if !self.0.contains(certificate) {
            return Ok(false);
        }
        let holds = holds(certificate).ok_or(CertificateError::BadEncoding)?;
        match now.as_secs() {
            now if now < holds.start.as_secs() => Err(CertificateError::NotValidYet.into()),
            now if now > holds.end.as_secs() => Err(CertificateError::Expired.into()),
            _ => Ok(true),
        }
    }
}

/// Which servers are believed, by the file of authorities.
#[derive(Debug)]
struct Servers {
    held: Held,
    signed: Arc<WebPkiServerVerifier>,
}

pub(super) fn servers(
    Authorities { roots, held }: Authorities,
) -> Result<Arc<dyn ServerCertVerifier>, TlsError> {
    let signed = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider()).build();
    let signed = signed.map_err(|error| TlsError::Certificates(error.to_string()))?;
    Ok(Arc::new(Servers { held, signed }))
}

impl ServerCertVerifier for Servers {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if !self.held.has(end_entity, now)? {
            let by = &self.signed;
            return by.verify_server_cert(
                end_entity,
                intermediates,
                server_name,
                ocsp_response,
                now,
            );
        }
        verify_server_name(&ParsedCertificate::try_from(end_entity)?, server_name)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signed.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signed.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.signed.supported_verify_schemes()
    }
}
