//! A certificate that a file of authorities holds itself is believed as if one of them had signed it, by its bytes: one that has signed
//! itself may not sign others (RFC 5280 section 4.2.1.9), and is then no authority to webpki. Its dates and, of a server, its name still count.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WebPkiServerVerifier, verify_server_name};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, Error, SignatureScheme};

use super::facts::holds;
use super::{Authorities, TlsError, provider};

/// Whom `rest` believes, and those themselves whom the file holds.
#[derive(Debug)]
pub(super) struct Believed<V: ?Sized> {
    held: Vec<CertificateDer<'static>>,
    rest: Arc<V>,
}

impl<V: ?Sized> Believed<V> {
    pub(super) fn new(held: Vec<CertificateDer<'static>>, rest: Arc<V>) -> Believed<V> {
        Believed { held, rest }
    }

    /// Whether the file holds this one; an error where it does not hold now.
    fn has(&self, certificate: &CertificateDer<'_>, now: UnixTime) -> Result<bool, Error> {
        if !self.held.contains(certificate) {
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

/// Of servers, by the file of authorities.
pub(super) fn servers(
    Authorities { roots, held }: Authorities,
) -> Result<Arc<dyn ServerCertVerifier>, TlsError> {
    let rest = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider()).build();
    let rest = rest.map_err(|error| TlsError::Certificates(error.to_string()))?;
    Ok(Arc::new(Believed::new(held, rest)))
}

impl ServerCertVerifier for Believed<WebPkiServerVerifier> {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if !self.has(end_entity, now)? {
            let by = &self.rest;
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
        self.rest.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.rest.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.rest.supported_verify_schemes()
    }
}

impl ClientCertVerifier for Believed<dyn ClientCertVerifier> {
    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        match self.has(end_entity, now)? {
            true => Ok(ClientCertVerified::assertion()),
            false => self.rest.verify_client_cert(end_entity, intermediates, now),
        }
    }

    fn offer_client_auth(&self) -> bool {
        self.rest.offer_client_auth()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.rest.client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.rest.root_hint_subjects()
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.rest.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.rest.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.rest.supported_verify_schemes()
    }
}
