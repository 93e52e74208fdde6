//! What is said of an upstream with which there is no TLS.

use crate::net::tls::Trouble;

/// The error type for Proxy-Status (RFC 9209), a name for metrics and audit, and what
/// clients are told.
pub(super) fn said_of(trouble: Trouble) -> (&'static str, &'static str, &'static str) {
    const CERTIFICATE: &str = "tls_certificate_error";
    const PROTOCOL: &str = "tls_protocol_error";
    match trouble {
        Trouble::NoCertificate => (
            CERTIFICATE,
            "upstream_no_certificate",
            "upstream shows no certificate",
        ),
        Trouble::ExpiredCertificate => (
            CERTIFICATE,
            "upstream_expired_certificate",
            "upstream's certificate is not valid now",
        ),
        Trouble::UnknownAuthority => (
            CERTIFICATE,
            "upstream_unknown_authority",
            "upstream's certificate is of no authority that is believed",
        ),
        Trouble::WrongName => (
            CERTIFICATE,
            "upstream_wrong_name",
            "upstream's certificate is for another name",
        ),
        Trouble::BadCertificate => (
            CERTIFICATE,
            "upstream_bad_certificate",
            "upstream's certificate cannot be used",
        ),
        Trouble::Distrusted => (
            "tls_alert_received",
            "upstream_distrusts",
            "upstream does not accept the certificate that it is shown, or the want of one",
        ),
        Trouble::NothingInCommon => (
            PROTOCOL,
            "upstream_nothing_in_common",
            "upstream speaks no version, cipher or protocol that is spoken here",
        ),
        Trouble::NotTls => (PROTOCOL, "upstream_not_tls", "upstream does not speak TLS"),
        Trouble::Protocol | Trouble::Gone | Trouble::TimedOut => (
            PROTOCOL,
            "upstream_tls",
            "upstream broke off the TLS handshake",
        ),
    }
}
