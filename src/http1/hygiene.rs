//! Which fields may go to the next hop (RFC 9110 section 7.6.1), and which names applications take for one. Owns the
//! hop-by-hop list; framing fields are among them, since each hop frames its own bodies.

const HOP_BY_HOP: [&str; 9] = [
    "connection",
    "keep-alive",
    "proxy-connection",
    "proxy-authenticate",
    "proxy-authorization",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// The options that the `Connection` fields of a head may name together: each field of it is compared with all of them, and
/// nobody needs more than a few.
pub const MAX_CONNECTION_OPTIONS: usize = 32;

/// What the value of a `Connection` field names.
pub fn connection_options(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii)
}

/// Whether a field belongs to this hop alone: by its name, or because it is among the [`connection_options`] of the same head.
/// `Host` and `Content-Length` are never dropped by being named there: that would change the request's meaning.
pub fn is_hop_by_hop(name: &[u8], options: &[&[u8]]) -> bool {
    if HOP_BY_HOP
        .iter()
        .any(|hop| hop.len() == name.len() && name.eq_ignore_ascii_case(hop.as_bytes()))
    {
        return true;
    }
    if options.is_empty() {
        return false;
    }
    if name.eq_ignore_ascii_case(b"host") || name.eq_ignore_ascii_case(b"content-length") {
        return false;
    }
    options
        .iter()
        .any(|option| option.eq_ignore_ascii_case(name))
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

/// Whether two names are one once they are [`folded`].
pub fn fold_to_one(one: &[u8], other: &[u8]) -> bool {
    one.len() == other.len()
        && one
            .iter()
            .copied()
            .map(fold)
            .eq(other.iter().copied().map(fold))
}

fn fold(byte: u8) -> u8 {
    match byte {
        byte if byte.is_ascii_alphanumeric() => byte.to_ascii_lowercase(),
        _ => b'-',
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hop_by_hop_fields_stay_on_their_hop() {
        assert!(is_hop_by_hop(b"Transfer-Encoding", &[]));
        let names = |value: &[u8]| {
            let options: Vec<_> = connection_options(value).collect();
            is_hop_by_hop(b"X-Secret", &options)
        };
        assert!(names(b"close, x-secret"));
        assert!(!names(b"close, x-secrets"));
        assert!(!is_hop_by_hop(b"Content-Length", &[b"content-length"]));
        assert!(!is_hop_by_hop(b"Host", &[b"host"]));
    }
}
