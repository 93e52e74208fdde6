//! How the keys of limits are written: those of requests, and those that overrides name. What could never be a request's key is a mistake.
//! Must not know what is counted.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr};

use super::limits::KeyPart;
use super::matches::literal;
use crate::http1::path;

/// A client as limits know it: its IPv4 address, or the network of so many bits of its IPv6 one.
pub fn client_key(ip: IpAddr, ipv6_prefix: u8) -> String {
    one_client(ip, ipv6_prefix).to_string()
}

/// Likewise, as an address.
pub fn one_client(ip: IpAddr, ipv6_prefix: u8) -> IpAddr {
    match ip {
        IpAddr::V4(_) => ip,
        IpAddr::V6(ip) => {
            let others = u128::MAX.checked_shr(ipv6_prefix.into()).unwrap_or(0);
            Ipv6Addr::from(u128::from(ip) & !others).into()
        }
    }
}

/// Whether a field of this name has a scheme and its credentials (RFC 9110, section 11.4).
pub fn has_credentials(name: &str) -> bool {
    ["authorization", "proxy-authorization"]
        .iter()
        .any(|other| name.eq_ignore_ascii_case(other))
}

/// Credentials as limits know them: the scheme in small letters, and one space behind it, however a client spells both.
pub fn credentials_key(value: &[u8]) -> Cow<'_, [u8]> {
    let at = value.iter().position(|byte| *byte == b' ');
    let (scheme, rest) = value.split_at(at.unwrap_or(value.len()));
    let rest = rest.trim_ascii_start();
    let is_so =
        !scheme.iter().any(u8::is_ascii_uppercase) && scheme.len() + 1 + rest.len() == value.len();
    match is_so || at.is_none() {
        true => Cow::Borrowed(value),
        false => Cow::Owned([&scheme.to_ascii_lowercase(), &b" "[..], rest].concat()),
    }
}

/// A part of a key as requests have it, but for a client: a host's letters are small, a path is in its normal form and without
/// parameters. What can be none of a request's stays as it is.
pub fn as_counted(by: &KeyPart, text: String) -> String {
    match by {
        KeyPart::Host => {
            let name = || text.trim_end_matches('.').to_ascii_lowercase();
            literal(&text).unwrap_or_else(name)
        }
        KeyPart::Path => {
            let normal = path::normalise(text.as_bytes()).map(Cow::into_owned);
            let normal = normal.ok().and_then(|path| String::from_utf8(path).ok());
            let normal = normal.unwrap_or(text);
            path::most_lenient(&normal).into_owned()
        }
        KeyPart::Header(name) if has_credentials(name) => {
            let counted = credentials_key(text.as_bytes()).into_owned();
            String::from_utf8(counted).unwrap_or(text)
        }
        KeyPart::ClientIp
        | KeyPart::ClientCertSubject
        | KeyPart::ClientCertSan
        | KeyPart::Header(_)
        | KeyPart::Cookie(_)
        | KeyPart::Query(_)
        | KeyPart::Method
        | KeyPart::Route
        | KeyPart::Upstream
        | KeyPart::SessionUser
        | KeyPart::SessionClaim(_) => text,
    }
}

/// The parts of a request's key as overrides name it: joined by `:`. Where they are several, a `:` or `\` within one has a `\` before it, but for
/// those of an address: else who chooses one part could be given the override of another key. Parts that are no UTF-8 have no such name.
pub fn joined<P: AsRef<str>>(by: &[KeyPart], parts: &[P]) -> String {
    let bytes = parts.iter().map(|part| part.as_ref().len() + 1);
    let mut key = String::with_capacity(bytes.sum());
    for (place, (by, part)) in by.iter().zip(parts).enumerate() {
        if place > 0 {
            key.push(':');
        }
        let text = part.as_ref();
        if parts.len() == 1 || matches!(by, KeyPart::ClientIp) {
            key.push_str(text);
            continue;
        }
        for character in text.chars() {
            if matches!(character, ':' | '\\') {
                key.push('\\');
            }
            key.push(character);
        }
    }
    key
}

/// The keys of requests that `text` stands for, as [`joined`] writes them: one, but where listeners tell IPv6 clients apart by
/// different bits, `ipv6_prefixes`.
pub fn override_keys(
    by: &[KeyPart],
    text: &str,
    ipv6_prefixes: &BTreeSet<u8>,
) -> Result<Vec<String>, String> {
    let pieces = match by.len() {
        1 => vec![text.to_owned()],
        _ => pieces(text),
    };
    if pieces.len() < by.len() {
        return Err(format!(
            "\"{text}\" is not a key of this limit, which has {} parts: write all, joined by \":\", as in {}",
            by.len(),
            example(by)
        ));
    }
    if by.is_empty() {
        return match text.is_empty() {
            true => Ok(vec![String::new()]),
            false => Err(format!(
                "\"{text}\" is not a key of this limit, which has one key for all: give it a \"by\" other than constant, or change the limit itself"
            )),
        };
    }
    let Some(parts) = split(by, &pieces, &mut BTreeSet::new()) else {
        let why = match by.contains(&KeyPart::ClientIp) {
            true => "in which client.ip is the address of one client".to_owned(),
            false => format!("which has {} parts", by.len()),
        };
        let colons = match by.len() {
            1 => "",
            _ => r#", and "\:" for a colon within a part"#,
        };
        return Err(format!(
            "\"{text}\" is not a key of this limit, {why}: write, for example, {}{colons}",
            example(by)
        ));
    };
    let parts = by.iter().zip(parts).map(|(by, part)| match part {
        Part::Text(text) => Part::Text(as_counted(by, text)),
        Part::Client(_) => part,
    });
    let parts: Vec<_> = parts.collect();
    // Without a listener there is a mistake already.
    let prefixes = ipv6_prefixes.iter().copied();
    let mut keys: Vec<_> = prefixes.map(|prefix| key(by, &parts, prefix)).collect();
    keys.dedup();
    Ok(keys)
}

/// A part of a key, as it is written.
#[derive(Clone)]
enum Part {
    Client(IpAddr),
    Text(String),
}

/// What stands between colons that have no `\` before them, without those that stand before another, or before a colon.
fn pieces(text: &str) -> Vec<String> {
    let mut pieces = Vec::new();
    let mut piece = String::new();
    let mut rest = text.chars().peekable();
    while let Some(character) = rest.next() {
        match character {
            ':' => pieces.push(std::mem::take(&mut piece)),
            '\\' => piece.push(
                rest.next_if(|next| matches!(next, ':' | '\\'))
                    .unwrap_or('\\'),
            ),
            character => piece.push(character),
        }
    }
    pieces.push(piece);
    pieces
}

/// The pieces between colons as the parts of a key; an IPv6 address takes several. `dead` are ends that have led nowhere: parts and
/// pieces that were left.
fn split(
    by: &[KeyPart],
    pieces: &[String],
    dead: &mut BTreeSet<(usize, usize)>,
) -> Option<Vec<Part>> {
    let Some((first, others)) = by.split_first() else {
        return pieces.is_empty().then(Vec::new);
    };
    let most = (pieces.len() + 1).checked_sub(by.len())?;
    if most == 0 || dead.contains(&(by.len(), pieces.len())) {
        return None;
    }
    let is_address = matches!(first, KeyPart::ClientIp);
    let most = if is_address { most } else { 1 };
    // An address is as long as can be: `2001:db8::` is not `2001` and `db8::`.
    let found = (1..=most).rev().find_map(|taken| {
        let (own, behind) = pieces.split_at(taken);
        let text = own.join(":");
        let part = match is_address {
            true => Part::Client(text.parse::<IpAddr>().ok()?.to_canonical()),
            false => Part::Text(text),
        };
        let mut parts = vec![part];
        parts.extend(split(others, behind, dead)?);
        Some(parts)
    });
    if found.is_none() {
        dead.insert((by.len(), pieces.len()));
    }
    found
}

fn key(by: &[KeyPart], parts: &[Part], ipv6_prefix: u8) -> String {
    let texts = parts.iter().map(|part| match part {
        Part::Client(ip) => client_key(*ip, ipv6_prefix),
        Part::Text(text) => text.clone(),
    });
    joined(by, &texts.collect::<Vec<_>>())
}

/// A key of these parts.
fn example(by: &[KeyPart]) -> String {
    let texts = by.iter().map(|part| match part {
        KeyPart::ClientIp => "192.0.2.7",
        KeyPart::Path => "/pay",
        KeyPart::Host => "example.com",
        KeyPart::Method => "GET",
        KeyPart::ClientCertSubject
        | KeyPart::ClientCertSan
        | KeyPart::Header(_)
        | KeyPart::Cookie(_)
        | KeyPart::Query(_)
        | KeyPart::Route
        | KeyPart::Upstream
        | KeyPart::SessionUser
        | KeyPart::SessionClaim(_) => "VALUE",
    });
    texts.collect::<Vec<_>>().join(":")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn keys(by: &[KeyPart], text: &str, prefixes: &[u8]) -> Result<Vec<String>, String> {
        override_keys(by, text, &prefixes.iter().copied().collect())
    }

    #[test]
    fn hosts_and_paths_are_as_requests_have_them() {
        let one = |by: KeyPart, text: &str| keys(&[by], text, &[64]).unwrap().remove(0);
        assert_eq!(one(KeyPart::Host, "API.Example.com."), "api.example.com");
        assert_eq!(one(KeyPart::Host, "[0:0::1]"), "[::1]");
        for (written, counted) in [
            ("/a//b/../c", "/a/c"),
            ("/a%2Db", "/a-b"),
            ("/x;v=1", "/x"),
            ("pay", "pay"),
        ] {
            assert_eq!(one(KeyPart::Path, written), counted);
        }
        assert_eq!(one(KeyPart::Header("x".to_owned()), "Ab//"), "Ab//");
        let header = || KeyPart::Header("x".to_owned());
        let two = |by: KeyPart, text: &str| keys(&[header(), by], text, &[64]).unwrap().remove(0);
        assert_eq!(two(KeyPart::Path, "Ab:/a//b"), "Ab:/a/b");
    }

    #[test]
    fn a_colon_within_a_part_is_told_from_one_between_two() {
        let header = || KeyPart::Header("x".to_owned());
        let two = |by: KeyPart, text: &str| keys(&[header(), by], text, &[64]);
        let is = |by: KeyPart, text: &str, key: &str| {
            assert_eq!(two(by, text), Ok(vec![key.to_owned()]), "{text}");
        };
        is(
            KeyPart::Path,
            r"spiffe\://td/ns/a:/pay",
            r"spiffe\://td/ns/a:/pay",
        );
        is(KeyPart::Path, r"u\:v;w:/p;x", r"u\:v;w:/p");
        is(
            KeyPart::Host,
            r"Urn\:Acme:Example.com",
            r"Urn\:Acme:example.com",
        );
        is(header(), r"CORP\ann:b", r"CORP\\ann:b");
        is(header(), r"a\\:b\\\:c\", r"a\\:b\\\:c\\");
        for (by, colons) in [
            (KeyPart::Path, "spiffe://td/ns/a:/pay"),
            (header(), "a:b:c"),
            (KeyPart::ClientIp, "a:b:10.0.0.1"),
        ] {
            let said = two(by, colons).unwrap_err();
            assert!(said.contains(r#""\:" for a colon within a part"#), "{said}");
        }
        let said = two(header(), "a:b:c").unwrap_err();
        assert!(
            said.contains("which has 2 parts: write, for example, VALUE:VALUE"),
            "{said}"
        );
    }

    #[test]
    fn a_client_is_one_address_and_of_ipv6_a_network() {
        let one = |text: &str| keys(&[KeyPart::ClientIp], text, &[64]);
        let is = |text: &str, key: &str| assert_eq!(one(text), Ok(vec![key.to_owned()]), "{text}");
        is("10.1.2.3", "10.1.2.3");
        is("::1", "::");
        is("2001:DB8:0:1::7", "2001:db8:0:1::");
        is("2001:db8:0:1::", "2001:db8:0:1::");
        for bad in [
            "10.0.0.0/8",
            "localhost",
            "",
            "10.1.2",
            "::1/64",
            "10.1.2.3:80",
        ] {
            let said = one(bad).unwrap_err();
            assert!(
                said.contains(
                    "client.ip is the address of one client: write, for example, 192.0.2.7"
                ),
                "{said}"
            );
        }
        let two = keys(&[KeyPart::ClientIp], "2001:db8:1:2::7", &[64, 48]);
        assert_eq!(
            two,
            Ok(vec!["2001:db8:1::".to_owned(), "2001:db8:1:2::".to_owned()])
        );
        assert_eq!(
            keys(&[KeyPart::ClientIp], "10.1.2.3", &[64, 48])
                .unwrap()
                .len(),
            1
        );
    }

    #[test]
    fn parts_are_as_many_as_the_limit_has() {
        let by = [KeyPart::Method, KeyPart::ClientIp, KeyPart::Path];
        let is = |text: &str, key: &str| {
            assert_eq!(keys(&by, text, &[64]), Ok(vec![key.to_owned()]), "{text}");
        };
        is("GET:10.1.2.3:/a", "GET:10.1.2.3:/a");
        is(r"GET:10.1.2.3:/a\:b", r"GET:10.1.2.3:/a\:b");
        is("GET:2001:db8::7:/a", "GET:2001:db8:::/a");
        is("GET:2001:db8:::/a", "GET:2001:db8:::/a");
        let said = keys(&by, "GET:10.1.2.3", &[64]).unwrap_err();
        assert!(
            said.contains(
                "which has 3 parts: write all, joined by \":\", as in GET:192.0.2.7:/pay"
            ),
            "{said}"
        );
        assert!(keys(&by, "GET:nobody:/a", &[64]).is_err());
        let said = keys(&[], "acme", &[64]).unwrap_err();
        assert!(said.contains("one key for all"), "{said}");
        let tenant = [KeyPart::Header("x".to_owned())];
        assert_eq!(keys(&tenant, "a:b", &[64]), Ok(vec!["a:b".to_owned()]));
    }

    proptest! {
        #[test]
        fn what_is_read_is_read_back(text in "[0-9a-f:./]{0,60}", parts in 1usize..12) {
            let by = vec![KeyPart::ClientIp; parts];
            if let Ok(read) = keys(&by, &text, &[64]) {
                prop_assert_eq!(keys(&by, &read[0], &[64]), Ok(read));
            }
        }

        #[test]
        fn an_ipv6_client_is_read_back(ip: u128, path in "/[a-z:]{0,9}") {
            let ip = IpAddr::from(Ipv6Addr::from(ip));
            let by = [KeyPart::ClientIp, KeyPart::Path];
            let key = joined(&by, &[client_key(ip, 64), path.clone()]);
            let text = format!("{ip}:{}", path.replace(':', r"\:"));
            prop_assert_eq!(keys(&by, &text, &[64]), Ok(vec![key]));
        }

        /// Else one client could have another's override.
        #[test]
        fn no_two_keys_are_written_alike(
            parts in proptest::collection::vec(r"[a:\\]{0,4}", 2..4),
            others in proptest::collection::vec(r"[a:\\]{0,4}", 2..4),
            ips: [u128; 2],
            place in 0usize..4,
        ) {
            let count = parts.len().min(others.len());
            let header = KeyPart::Header("x".to_owned());
            let mut by = vec![header; count];
            let [mut parts, mut others] = [parts, others].map(|all| all[..count].to_vec());
            if place < count {
                by[place] = KeyPart::ClientIp;
                let [one, other] = ips.map(|ip| client_key(Ipv6Addr::from(ip).into(), 128));
                (parts[place], others[place]) = (one, other);
            }
            let [one, other] = [&parts, &others].map(|parts| joined(&by, parts));
            prop_assert_eq!(parts == others, one == other, "{} {}", one, other);
            prop_assert_eq!(keys(&by, &one, &[128]), Ok(vec![one]));
        }
    }
}
