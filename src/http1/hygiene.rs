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

/// Whether a field belongs to this hop alone: by its name, or because a `Connection` field of the same head names it.
/// `Host` and `Content-Length` are never dropped by being named there: that would change the request's meaning.
pub fn is_hop_by_hop(name: &[u8], connection_values: &[&[u8]]) -> bool {
    if HOP_BY_HOP
        .iter()
        .any(|hop| hop.len() == name.len() && name.eq_ignore_ascii_case(hop.as_bytes()))
    {
        return true;
    }
    if connection_values.is_empty() {
        return false;
    }
    if name.eq_ignore_ascii_case(b"host") || name.eq_ignore_ascii_case(b"content-length") {
        return false;
    }
    connection_values
        .iter()
        .flat_map(|value| value.split(|byte| *byte == b','))
        .any(|option| option.trim_ascii().eq_ignore_ascii_case(name))
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
        assert!(is_hop_by_hop(b"X-Secret", &[b"close, x-secret"]));
        assert!(!is_hop_by_hop(b"X-Secret", &[b"close, x-secrets"]));
        assert!(!is_hop_by_hop(b"Content-Length", &[b"content-length"]));
        assert!(!is_hop_by_hop(b"Host", &[b"host"]));
    }
}
