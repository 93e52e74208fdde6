//! Which fields may go to the next hop (RFC 9110 section 7.6.1), and which names applications take for one. Owns the
//! hop-by-hop list; framing fields are among them, since each hop frames its own bodies.

use std::ops::Range;

use super::head::values;

/// Not `Trailer`: it goes on with the fields that it announces, which some receivers pass over without it (RFC 9110 section 6.6.2).
const HOP_BY_HOP: [&str; 8] = [
    "connection",
    "keep-alive",
    "proxy-connection",
    "proxy-authenticate",
    "proxy-authorization",
    "te",
    "transfer-encoding",
    "upgrade",
];

/// The options that the `Connection` fields of a head may name together: each field of it is compared with all of them, and
/// nobody needs more than a few.
pub const MAX_CONNECTION_OPTIONS: usize = 32;

/// Fields that stay though `Connection` names them, as does all that begins as [`FORWARDED`]: without them the request has another
/// meaning, or its client another name (RFC 9110 section 7.6.1, CVE-2021-33197).
const NOT_TO_BE_NAMED: [&[u8]; 5] = [
    b"host",
    b"content-length",
    b"forwarded",
    b"via",
    b"x-request-id",
];

/// By these proxies and content delivery networks name the client, as nginx, Akamai, Cloudflare, Fastly, Fly, Azure, Envoy and WebLogic do, to
/// applications that believe whoever they come from.
pub const OF_CLIENTS: [&[u8]; 13] = [
    b"x-real-ip",
    b"true-client-ip",
    b"cf-connecting-ip",
    b"fastly-client-ip",
    b"x-client-ip",
    b"x-cluster-client-ip",
    b"client-ip",
    b"proxy-client-ip",
    b"wl-proxy-client-ip",
    b"x-envoy-external-address",
    b"cf-connecting-ipv6",
    b"fly-client-ip",
    b"x-azure-clientip",
];

/// What proxies say of a request is named so: `X-Forwarded-For`, `-Prefix`, `-Port`, and others that an application may believe.
pub const FORWARDED: &[u8] = b"x-forwarded-";

/// By these an application may be told of another method than the request's. Many frameworks heed the first unless told otherwise, most of
/// them of a POST alone.
const OF_METHODS: [&[u8]; 3] = [
    b"x-http-method-override",
    b"x-http-method",
    b"x-method-override",
];

/// What the value of a `Connection` field names.
pub fn connection_options(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii)
}

/// What the `Connection` fields of a head say.
#[derive(Debug, Default)]
pub(super) struct Connection {
    pub close: bool,
    pub keep_alive: bool,
    /// Whether they name fields that would go on to the next hop.
    names_fields: bool,
    options: usize,
}

/// More than [`MAX_CONNECTION_OPTIONS`].
pub(super) struct TooManyOptions;

impl Connection {
    /// Takes in one more field.
    pub(super) fn hear(&mut self, value: &[u8]) -> Result<(), TooManyOptions> {
        for option in connection_options(value) {
            self.options += 1;
            if self.options > MAX_CONNECTION_OPTIONS {
                return Err(TooManyOptions);
            }
            let is = |name: &str| option.eq_ignore_ascii_case(name.as_bytes());
            if is("close") {
                self.close = true;
            } else if is("keep-alive") {
                self.keep_alive = true;
            } else {
                self.names_fields |= !is_hop_by_hop(option);
            }
        }
        Ok(())
    }

    /// Takes the fields away that are named: they are of this hop alone, and so they are nothing to any policy.
    pub(super) fn take_named(&self, bytes: &[u8], fields: &mut Vec<(Range<usize>, Range<usize>)>) {
        if !self.names_fields {
            return;
        }
        let options: Vec<&[u8]> = values(bytes, fields, "connection")
            .flat_map(connection_options)
            .filter(|option| !is_hop_by_hop(option) && !is_not_to_be_named(option))
            .collect();
        fields.retain(|(name, _)| {
            let is_it = |option: &&[u8]| option.eq_ignore_ascii_case(&bytes[name.clone()]);
            !options.iter().any(is_it)
        });
    }
}

fn is_not_to_be_named(name: &[u8]) -> bool {
    begins_folded(name, FORWARDED)
        || NOT_TO_BE_NAMED
            .iter()
            .chain(&OF_CLIENTS)
            .any(|other| name.eq_ignore_ascii_case(other))
}

/// Whether a field belongs to this hop alone by its name. Those that `Connection` names are in no head that was read.
pub fn is_hop_by_hop(name: &[u8]) -> bool {
    HOP_BY_HOP
        .iter()
        .any(|hop| hop.len() == name.len() && name.eq_ignore_ascii_case(hop.as_bytes()))
}

/// A field's name in lower case with `-` for all that is neither letter nor digit, because CGI, WSGI and their kin show
/// `X_Auth_User` and `X-Auth-User` to the application as one (RFC 3875 section 4.1.18), and some do `X.Auth.User` too.
pub fn folded(name: &[u8]) -> Vec<u8> {
    name.iter().copied().map(fold).collect()
}

/// Whether `name`, once [`folded`], is `known`, which is.
pub fn is_folded(name: &[u8], known: &[u8]) -> bool {
    name.len() == known.len() && name.iter().copied().map(fold).eq(known.iter().copied())
}

/// Whether `name`, once [`folded`], begins with `known`, which is.
pub fn begins_folded(name: &[u8], known: &[u8]) -> bool {
    name.get(..known.len())
        .is_some_and(|start| is_folded(start, known))
}

/// Whether a field of this name says another method, to applications that heed it.
pub fn names_a_method(name: &[u8]) -> bool {
    OF_METHODS.iter().any(|known| is_folded(name, known))
}

/// Whether two names are one once they are [`folded`].
pub fn fold_to_one(one: &[u8], other: &[u8]) -> bool {
    let mut pairs = one.iter().zip(other);
    one.len() == other.len() && pairs.all(|(one, other)| fold(*one) == fold(*other))
}

fn fold(byte: u8) -> u8 {
    match byte {
        byte if byte.is_ascii_alphanumeric() => byte.to_ascii_lowercase(),
        // In no field's name; in a parameter's it is part of a letter.
        byte if !byte.is_ascii() => byte,
        _ => b'-',
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hop_by_hop_fields_stay_on_their_hop() {
        assert!(is_hop_by_hop(b"Transfer-Encoding"));
        let stays = |connection: &str, name: &str| {
            let bytes = format!("Connection{connection}{name}");
            let (value, end) = (10..10 + connection.len(), 10 + connection.len());
            let mut said = Connection::default();
            assert!(said.hear(connection.as_bytes()).is_ok());
            let mut fields = vec![(0..10, value), (end..bytes.len(), 0..0)];
            said.take_named(bytes.as_bytes(), &mut fields);
            fields.len() == 2
        };
        assert!(!stays("close, x-secret", "X-Secret"));
        assert!(stays("close, x-secrets", "X-Secret"));
        assert!(stays("x, host, content-length", "Content-Length"));
        assert!(stays("x, host", "Host"));
        assert!(stays("x, X-FORWARDED-FOR", "x-forwarded-for"));
    }
}
