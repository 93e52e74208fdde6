//! What certificates say: a client's, for requests, and weir's own. Must not judge whether one is believed.

use std::fmt::Write as _;
use std::ops::Range;
use std::time::Duration;

use rustls::pki_types::CertificateDer;
use sha2::{Digest, Sha256};
use x509_cert::Certificate;
use x509_cert::der::Decode;
use x509_cert::ext::pkix::SubjectAltName;
use x509_cert::ext::pkix::name::GeneralName;
use x509_cert::time::Validity;

/// What TLS tells of the client at the other end.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ClientFacts {
    /// The name that the client asked for.
    pub sni: Option<String>,
    /// Signed by an authority that weir believes.
    pub certificate: Option<ClientCertificate>,
}

/// A client's certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientCertificate {
    /// As RFC 4514 writes it; not empty.
    pub subject: Option<String>,
    /// The first URI that it names, or else the first DNS name.
    pub san: Option<String>,
    /// An element of X-Forwarded-Client-Cert, as Envoy writes it.
    pub element: String,
    /// Until when it holds, since the epoch; `None` where it cannot be read.
    pub end: Option<Duration>,
}

/// What a certificate of ours says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct OwnFacts {
    /// In lower case; wildcards too.
    pub dns_names: Vec<String>,
    pub uri: Option<String>,
    /// Since the epoch.
    pub holds: Range<Duration>,
}

impl ClientCertificate {
    /// `by`: the URI of the certificate that it was shown to, if that has one.
    pub(super) fn new(der: &CertificateDer<'_>, by: Option<&str>) -> ClientCertificate {
        let mut element = String::new();
        if let Some(by) = by {
            let _ = write!(element, "By={};", escaped(by));
        }
        element.push_str("Hash=");
        for byte in Sha256::digest(der) {
            let _ = write!(element, "{byte:02x}");
        }
        // Whoever checked its signature could read it; what has another opinion shall not end the connection.
        let Ok(certificate) = Certificate::from_der(der) else {
            return ClientCertificate {
                subject: None,
                san: None,
                element,
                end: None,
            };
        };
        let subject = certificate.tbs_certificate.subject.to_string();
        // A quote in it is escaped already, by RFC 4514.
        let _ = write!(element, ";Subject=\"{subject}\"");
        let names = Names::of(&certificate);
        for uri in &names.uris {
            let _ = write!(element, ";URI={}", escaped(uri));
        }
        for name in &names.dns {
            let _ = write!(element, ";DNS={}", escaped(name));
        }
        let mut sans = names.uris.into_iter().chain(names.dns);
        ClientCertificate {
            subject: Some(subject).filter(|subject| !subject.is_empty()),
            san: sans.next(),
            element,
            end: Some(range(&certificate.tbs_certificate.validity).end),
        }
    }
}

/// From when till when it holds, since the epoch; `None` where it cannot be read.
pub(super) fn holds(der: &CertificateDer<'_>) -> Option<Range<Duration>> {
    let certificate = Certificate::from_der(der).ok()?;
    Some(range(&certificate.tbs_certificate.validity))
}

fn range(validity: &Validity) -> Range<Duration> {
    validity.not_before.to_unix_duration()..validity.not_after.to_unix_duration()
}

impl OwnFacts {
    /// An error where it is not a certificate.
    pub(super) fn of(der: &CertificateDer<'_>) -> Result<OwnFacts, String> {
        let certificate = Certificate::from_der(der).map_err(|error| error.to_string())?;
        let names = Names::of(&certificate);
        Ok(OwnFacts {
            dns_names: names
                .dns
                .iter()
                .map(|name| name.to_ascii_lowercase())
                .collect(),
            uri: names.uris.into_iter().next(),
            holds: range(&certificate.tbs_certificate.validity),
        })
    }
}

/// The names that a certificate is for.
#[derive(Default)]
struct Names {
    uris: Vec<String>,
    dns: Vec<String>,
}

impl Names {
    fn of(certificate: &Certificate) -> Names {
        let mut names = Names::default();
        let Ok(Some((_, SubjectAltName(all)))) = certificate.tbs_certificate.get() else {
            return names;
        };
        for name in all {
            let (text, list) = match &name {
                GeneralName::UniformResourceIdentifier(uri) => (uri.as_str(), &mut names.uris),
                GeneralName::DnsName(name) => (name.as_str(), &mut names.dns),
                _ => continue,
            };
            // What is no name must not come to stand in a header.
            if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic()) {
                list.push(text.to_owned());
            }
        }
        names
    }
}

/// Without what would end the value where it is not quoted.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            ',' | ';' | '"' => {
                let _ = write!(out, "%{:02X}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use base64::prelude::{BASE64_STANDARD, Engine as _};
    use proptest::prelude::*;

    use super::*;

    /// Of `O=a "b", CN=c`, `URI:spiffe://a/b` and `DNS:a.test`.
    const CERTIFICATE: &str = "MIIBajCCARygAwIBAgIUVjdMk4YMScmjRfkBsBPUbm8hwuQwBQYDK2VwMBwxDjAMBgNVBAoMBWEgImIiMQowCAYDVQQDDAFjMCAXDTI2MTEyNz\
        A4MjYxMloYDzIxMjYxMTAzMDgyNjEyWjAcMQ4wDAYDVQQKDAVhICJiIjEKMAgGA1UEAwwBYzAqMAUGAytlcAMhALeTR2jfzBECuZX70XEgroz1\
        EQt1oyAT/dTpefibbw/zo24wbDAdBgNVHQ4EFgQUYuk2AQNeVPEDNgYxjMo8WS7rd1owHwYDVR0jBBgwFoAUYuk2AQNeVPEDNgYxjMo8WS7rd1\
        owHwYDVR0RBBgwFoYMc3BpZmZlOi8vYS9iggZhLnRlc3QwCQYDVR0TBAIwADAFBgMrZXADQQCct7CtzIEOIJ4E5Abqwg0ToQZlSqvkG38D7DyY\
        svhUO/HjWkg+/TnxX3s0M2oSXsHVL9elRc0acoX8bUuvAtkD";

    #[test]
    fn what_a_certificate_says_is_told() {
        let der = BASE64_STANDARD.decode(CERTIFICATE).unwrap();
        let told = ClientCertificate::new(&CertificateDer::from(der), Some("a;b"));
        assert_eq!(told.subject.as_deref(), Some(r#"CN=c,O=a \"b\""#));
        assert_eq!(told.san.as_deref(), Some("spiffe://a/b"));
        assert_eq!(told.end, Some(Duration::from_secs(4_949_367_972)));
        let rest = r#";Subject="CN=c,O=a \"b\"";URI=spiffe://a/b;DNS=a.test"#;
        assert!(
            told.element.starts_with("By=a%3Bb;Hash=") && told.element.ends_with(rest),
            "{told:?}"
        );
    }

    proptest! {
        #[test]
        fn whatever_it_says_is_one_element_of_a_field(
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
            random in prop::collection::vec(any::<u8>(), 0..64),
        ) {
            let mut der = BASE64_STANDARD.decode(CERTIFICATE).unwrap();
            for (at, byte) in changes {
                let at = at.index(der.len());
                der[at] = byte;
            }
            for der in [der, random] {
                let der = CertificateDer::from(der);
                let told = ClientCertificate::new(&der, None);
                prop_assert!(!told.element.bytes().any(|byte| byte.is_ascii_control()), "{:?}", told);
                prop_assert!(told.san.is_none_or(|san| san.bytes().all(|byte| byte.is_ascii_graphic())));
                prop_assert_eq!(OwnFacts::of(&der).is_ok(), holds(&der).is_some());
            }
        }
    }
}
