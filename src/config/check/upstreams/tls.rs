//! TLS to upstreams, and how endpoints that are URLs say whether it is spoken.

use rustls::pki_types::ServerName;

use super::super::Checker;
use super::split_port;
use crate::config::raw;
use crate::config::tls::UpstreamTls;
use crate::config::upstreams::Source;
use crate::config::yaml::{At, Position};

/// Whether an endpoint says of itself that TLS is spoken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Security {
    Plain,
    Tls,
    /// A name or a socket, which is as the upstream says.
    Either,
}

/// `http://HOST:PORT`, `https://HOST:PORT` or `unix:/PATH`; the port 80 or 443 when there is none.
pub(super) fn url(text: &str) -> Result<(Source, Security), String> {
    if let Some(path) = text.strip_prefix("unix:") {
        return match path.starts_with('/') {
            true => Ok((Source::Fixed(text.to_owned()), Security::Either)),
            false => Err(format!(
                "\"{text}\" is not a socket: use unix:/PATH, for example unix:/run/app.sock"
            )),
        };
    }
    let schemes = [
        ("http://", 80, Security::Plain),
        ("https://", 443, Security::Tls),
    ];
    let found = schemes.into_iter().find_map(|(scheme, port, security)| {
        let rest = text.strip_prefix(scheme)?;
        let authority = rest.strip_suffix('/').unwrap_or(rest);
        let fits = !authority.contains(['/', '?', '#', '@', ' ']);
        let place = match split_port(authority).filter(|_| fits)? {
            (_, Some(_)) => authority.to_owned(),
            (_, None) => format!("{authority}:{port}"),
        };
        Some((Source::Fixed(place), security))
    });
    found.ok_or_else(|| {
        format!(
            "\"{text}\" is not an endpoint: use http://HOST:PORT, for example http://127.0.0.1:3000"
        )
    })
}

impl Checker {
    /// `found`: what each endpoint says of the list at `endpoints_at`.
    pub(super) fn upstream_tls(
        &mut self,
        raw: Option<At<raw::UpstreamTls>>,
        found: &[Security],
        endpoints_at: &Position,
    ) -> Option<UpstreamTls> {
        let says = |what: Security| found.contains(&what);
        if says(Security::Tls) && says(Security::Plain) {
            let message =
                "some endpoints use TLS and some do not: write http:// or https:// in all";
            self.say(endpoints_at, message);
        }
        let Some(at) = raw else {
            return says(Security::Tls).then(UpstreamTls::default);
        };
        if says(Security::Plain) {
            let message =
                "no endpoint uses TLS: write https:// in place of http://, or leave this out";
            self.say(&at.place, message);
        }
        let raw = at.value.unwrap_or_default();
        let sni = raw.sni.and_then(|at| {
            self.read(at, |text| {
                match ServerName::try_from(text) {
                    Ok(_) => Ok(text.to_owned()),
                    Err(_) => Err(format!(
                        "\"{text}\" is not a name that a certificate can have: use, for example, app.svc"
                    )),
                }
            })
        });
        let (ca, certificate) = (raw.ca, raw.certificate);
        let tls = self.tls(raw::Tls { ca, certificate });
        Some(UpstreamTls { sni, tls })
    }
}
