//! Sessions of clients that showed a certificate end with it. rustls keeps the certificate in the session and does not look at it again; so what resumes a
//! session says here when that ends, and from then on the client is greeted anew, as whatever it has to show by then.

use std::cell::Cell;
use std::sync::Arc;

use rustls::client::danger::HandshakeSignatureValid;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ProducesTickets, StoresServerSessions};
use rustls::{DigitallySignedStruct, DistinguishedName, Error, SignatureScheme};

use super::believed::Held;
use super::facts::holds;
use crate::clock;

/// The end of a session whose client showed no certificate.
const NEVER: u64 = u64::MAX;

tokio::task_local! {
    /// When the session of the handshake under way ends at the latest, in seconds since the epoch.
    static END: Cell<u64>;
}

/// The handshake of a client that may be asked for a certificate: without this no session of such a listener is resumed.
pub async fn with_ends<T>(handshake: impl Future<Output = T>) -> T {
    END.scope(Cell::new(NEVER), handshake).await
}

/// Lets in who is signed, or held; notes when their certificates end.
#[derive(Debug)]
pub(super) struct NotesEnds {
    pub held: Held,
    pub signed: Arc<dyn ClientCertVerifier>,
}

/// Tickets of `0` that say when their session ends.
#[derive(Debug)]
pub(super) struct Tickets(pub Arc<dyn ProducesTickets>);

/// What `0` remembers, likewise.
#[derive(Debug)]
pub(super) struct Remembered(pub Arc<dyn StoresServerSessions>);

/// `session` behind its end.
fn with_end(session: &[u8]) -> Vec<u8> {
    let end = END.try_with(Cell::get).unwrap_or(0);
    [&end.to_be_bytes(), session].concat()
}

/// The session, unless it is over. One that goes on in new tickets has its end still.
fn unless_over(behind_end: &[u8]) -> Option<Vec<u8>> {
    let (end, session) = behind_end.split_first_chunk()?;
    let end = u64::from_be_bytes(*end);
    if end < clock::wall().as_secs() {
        return None;
    }
    END.try_with(|of_handshake| of_handshake.set(end)).ok()?;
    Some(session.to_vec())
}

impl ProducesTickets for Tickets {
    fn enabled(&self) -> bool {
        self.0.enabled()
    }

    fn lifetime(&self) -> u32 {
        self.0.lifetime()
    }

    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        self.0.encrypt(&with_end(plain))
    }

    fn decrypt(&self, cipher: &[u8]) -> Option<Vec<u8>> {
        unless_over(&self.0.decrypt(cipher)?)
    }
}

impl StoresServerSessions for Remembered {
    fn put(&self, key: Vec<u8>, value: Vec<u8>) -> bool {
        self.0.put(key, with_end(&value))
    }

    fn get(&self, key: &[u8]) -> Option<Vec<u8>> {
        unless_over(&self.0.get(key)?)
    }

    fn take(&self, key: &[u8]) -> Option<Vec<u8>> {
        unless_over(&self.0.take(key)?)
    }

    fn can_cache(&self) -> bool {
        self.0.can_cache()
    }
}

impl ClientCertVerifier for NotesEnds {
    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = match self.held.has(end_entity, now)? {
            true => ClientCertVerified::assertion(),
            false => {
                let by = &self.signed;
                by.verify_client_cert(end_entity, intermediates, now)?
            }
        };
        // Of what cannot be read here the end is not known: such a session is not resumed.
        let end = holds(end_entity).map_or(0, |holds| holds.end.as_secs());
        let _ = END.try_with(|of_handshake| of_handshake.set(end));
        Ok(verified)
    }

    fn offer_client_auth(&self) -> bool {
        self.signed.offer_client_auth()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.signed.client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.signed.root_hint_subjects()
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

    fn requires_raw_public_keys(&self) -> bool {
        self.signed.requires_raw_public_keys()
    }
}
