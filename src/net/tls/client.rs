//! TLS towards servers: upstreams, and those that keep state. Set up once for a client, which then reads no files and parses no
//! certificates however often it connects.

use rustls::{ClientConfig, RootCertStore};

use super::{TlsError, authorities, certificates, private_key, provider, unusable};
use crate::config::tls::Tls;

/// Reads the files of `tls`; the public authorities of the system only where it names none.
pub fn client_config(tls: &Tls) -> Result<ClientConfig, TlsError> {
    let roots = roots(tls)?;
    if roots.is_empty() {
        return Err(TlsError::NoAuthority);
    }
    with_roots(tls, roots)
}

/// As [`client_config`], for a server that may do without TLS: without an authority to believe there is no error until one
/// shows a certificate.
pub fn client_config_if_needed(tls: &Tls) -> Result<ClientConfig, TlsError> {
    with_roots(tls, roots(tls)?)
}

fn roots(tls: &Tls) -> Result<RootCertStore, TlsError> {
    match &tls.ca {
        Some(path) => authorities(path),
        // Those that cannot be read are left out: the system has more than anyone needs.
        None => {
            let mut roots = RootCertStore::empty();
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            Ok(roots)
        }
    }
}

fn with_roots(tls: &Tls, roots: RootCertStore) -> Result<ClientConfig, TlsError> {
    let builder = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(unusable)?
        .with_root_certificates(roots);
    match &tls.certificate {
        Some(ours) => {
            let (key, chain) = (private_key(&ours.key)?, certificates(&ours.cert)?);
            builder.with_client_auth_cert(chain, key).map_err(unusable)
        }
        None => Ok(builder.with_no_client_auth()),
    }
}
