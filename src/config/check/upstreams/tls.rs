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
        let fits = !authority.contains(['/', '?', '#', '@', ' ', '$']);
        let place = match split_port(authority).filter(|_| fits)? {
            (_, Some(_)) => authority.to_owned(),
            (_, None) => format!("{authority}:{port}"),
        };
        Some((Source::Fixed(place), security))
    });
    found.ok_or_else(|| no_endpoint(text))
}

/// With the mend for what is often written.
fn no_endpoint(text: &str) -> String {
    let (scheme, rest) = text.split_once("://").unwrap_or(("", text));
    // It may be a password.
    if rest.contains('@') {
        return "an endpoint has no user and no password: use http://HOST:PORT; a field that the app asks for can be set by request_headers of a route".to_owned();
    }
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let is_http = ["http", "https"].contains(&scheme);
    let variable = rest.split_once('$').map(|(_, behind)| {
        let end = behind.find(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        &behind[..end.unwrap_or(behind.len())]
    });
    let mend = match () {
        () if variable.is_some_and(|name| !name.is_empty()) => format!(
            "write an environment variable as ${{{}}}",
            variable.unwrap_or_default()
        ),
        // As nginx spells it.
        () if is_http && rest.starts_with("unix:/") => {
            format!("use {}", rest.trim_end_matches([':', '/']))
        }
        () if is_http && !path.is_empty() && split_port(authority).is_some() => format!(
            "it has a path: use {scheme}://{authority}, and \"rewrite: {{path_prefix: /{}}}\" of a route",
            path.trim_end_matches('/')
        ),
        () if is_http && authority.matches(':').count() > 1 && !authority.contains('[') => {
            "an IPv6 address stands in [], as in http://[::1]:3000".to_owned()
        }
        () => "use http://HOST:PORT, for example http://127.0.0.1:3000".to_owned(),
    };
    format!("\"{text}\" is not an endpoint: {mend}")
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
