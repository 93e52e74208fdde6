//! Why TLS does not come about, in words for metrics and replies.

use std::io;

use rustls::{AlertDescription, CertificateError, Error, PeerIncompatible};

/// Why a handshake failed, as far as it can be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Trouble {
    /// The other end showed none.
    NoCertificate,
    ExpiredCertificate,
    /// By no authority that weir believes.
    UnknownAuthority,
    /// Not for the name that was asked.
    WrongName,
    /// Any other fault of the other end's certificate.
    BadCertificate,
    /// The other end says that it does not like weir's certificate, or that there is none.
    Distrusted,
    /// There is no version, cipher or protocol that both ends know.
    NothingInCommon,
    /// What came is not TLS.
    NotTls,
    /// Any other breach of the protocol, or an alert.
    Protocol,
    /// The other end went away.
    Gone,
    TimedOut,
}

impl Trouble {
    /// In the order of the variants: a counter of each stands at its number.
    pub const ALL: [Trouble; 11] = [
        Trouble::NoCertificate,
        Trouble::ExpiredCertificate,
        Trouble::UnknownAuthority,
        Trouble::WrongName,
        Trouble::BadCertificate,
        Trouble::Distrusted,
        Trouble::NothingInCommon,
        Trouble::NotTls,
        Trouble::Protocol,
        Trouble::Gone,
        Trouble::TimedOut,
    ];

    /// As metrics name it.
    pub fn name(self) -> &'static str {
        match self {
            Trouble::NoCertificate => "no_certificate",
            Trouble::ExpiredCertificate => "expired_certificate",
            Trouble::UnknownAuthority => "unknown_authority",
            Trouble::WrongName => "wrong_name",
            Trouble::BadCertificate => "bad_certificate",
            Trouble::Distrusted => "distrusted",
            Trouble::NothingInCommon => "nothing_in_common",
            Trouble::NotTls => "not_tls",
            Trouble::Protocol => "protocol",
            Trouble::Gone => "gone",
            Trouble::TimedOut => "timed_out",
        }
    }

    /// What TLS had against it; `None` where it was not TLS that failed.
    pub fn within(error: &io::Error) -> Option<Trouble> {
        let tls = error.get_ref()?.downcast_ref::<Error>()?;
        Some(Trouble::of(tls))
    }

    /// Of a handshake that failed with `error`.
    pub fn of_handshake(error: &io::Error) -> Trouble {
        Trouble::within(error).unwrap_or(match error.kind() {
            io::ErrorKind::TimedOut => Trouble::TimedOut,
            _ => Trouble::Gone,
        })
    }

    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "the enums of rustls grow, and most of it is one kind here"
    )]
    fn of(error: &Error) -> Trouble {
        match error {
            Error::NoCertificatesPresented => Trouble::NoCertificate,
            Error::InvalidCertificate(certificate) => match certificate {
                CertificateError::Expired
                | CertificateError::ExpiredContext { .. }
                | CertificateError::NotValidYet
                | CertificateError::NotValidYetContext { .. } => Trouble::ExpiredCertificate,
                // The other kind is one that has the name of an authority, and not its key.
                CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                    Trouble::UnknownAuthority
                }
                CertificateError::NotValidForName
                | CertificateError::NotValidForNameContext { .. } => Trouble::WrongName,
                _ => Trouble::BadCertificate,
            },
            Error::AlertReceived(alert) => match alert {
                AlertDescription::BadCertificate
                | AlertDescription::UnsupportedCertificate
                | AlertDescription::CertificateRevoked
                | AlertDescription::CertificateExpired
                | AlertDescription::CertificateUnknown
                | AlertDescription::CertificateRequired
                | AlertDescription::AccessDenied
                | AlertDescription::UnknownCA => Trouble::Distrusted,
                AlertDescription::HandshakeFailure
                | AlertDescription::ProtocolVersion
                | AlertDescription::InsufficientSecurity
                | AlertDescription::NoApplicationProtocol => Trouble::NothingInCommon,
                _ => Trouble::Protocol,
            },
            Error::PeerIncompatible(
                PeerIncompatible::NoCertificateRequestSignatureSchemesInCommon,
            ) => Trouble::BadCertificate,
            Error::PeerIncompatible(_) | Error::NoApplicationProtocol => Trouble::NothingInCommon,
            Error::InvalidMessage(rustls::InvalidMessage::InvalidContentType) => Trouble::NotTls,
            _ => Trouble::Protocol,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_stands_at_its_number() {
        for (index, trouble) in Trouble::ALL.into_iter().enumerate() {
            assert_eq!(trouble as usize, index);
        }
    }
}
