//! Sessions, checked: where a token is found, how long a session lives, what the upstream and the browser are told.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::time::Duration;

use serde_json::Value;
use thiserror::Error;

pub use super::raw::{OnMax, SameSite};

/// One entry of `sessions`, with its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sessions {
    pub name: String,
    pub settings: Settings,
    /// Held in memory at most; at this bound new ones are refused.
    pub max_sessions: usize,
    /// How they are kept where the file has `redis`.
    pub shared: Shared,
}

/// How sessions are asked of Redis, and what a process does without asking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shared {
    /// A use is written down this long after the last one that was; zero: each. Below the idle timeout.
    pub touch_every: Duration,
    pub cache: Cache,
    /// While Redis does not answer, verdicts that are remembered hold for this long; then requests are denied.
    pub grace: Duration,
}

/// What a process remembers of Redis's answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cache {
    /// How long a session is believed; zero: not at all.
    pub ttl: Duration,
    /// How long it is believed that a token has no session.
    pub negative_ttl: Duration,
    /// At least one.
    pub max_entries: usize,
}

/// What a route asks of sessions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteSession {
    /// An index into [`super::Config::sessions`].
    pub sessions: usize,
    /// Whether a request without a session is refused.
    pub require: bool,
    /// What a session must have; such a route requires one.
    pub claims: Claims,
    /// How often the session of a switched connection is looked at again; not zero.
    pub revalidate_every: Duration,
}

/// What is known about a user, by name; the application decides what they mean.
pub type Claims = BTreeMap<String, Value>;

/// One entry of `sessions:`, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Where a token may be, in the order in which they are looked at.
    pub sources: Vec<TokenSource>,
    /// A session unseen for this long is over.
    pub idle_timeout: Duration,
    /// A session this old is over, however busy it is (OWASP Session Management, "Absolute Timeout").
    pub absolute_timeout: Duration,
    /// How many live sessions a user may have; `None`: any number.
    pub max_per_user: Option<NonZeroU32>,
    pub on_max: OnMax,
    pub forward: Forward,
    pub cookie: CookieAttributes,
}

/// A place in a request that may hold a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenSource {
    /// The cookie of this name; names of cookies are case-sensitive (RFC 6265 section 5.3).
    Cookie(String),
    /// `Authorization: Bearer` (RFC 6750 section 2.1).
    Bearer,
    /// The whole value of the header of this name, in any case.
    Header(String),
}

/// The request headers that tell the upstream who asks; `None`: not told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Forward {
    pub user: Option<String>,
    pub session: Option<String>,
    pub claims: Option<String>,
}

impl Forward {
    /// What they are called unless the file says otherwise: user, session and claims.
    pub const NAMES: [&str; 3] = ["X-Auth-User", "X-Auth-Session", "X-Auth-Claims"];
}

/// How the session's cookie is set (RFC 6265 section 4.1.2; `SameSite` from its successor draft, RFC 6265bis).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CookieAttributes {
    pub secure: bool,
    pub http_only: bool,
    pub same_site: SameSite,
    pub path: String,
}

/// Why a browser would not keep a cookie, or would keep another one than meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum CookieError {
    #[error("a cookie's name is letters, digits and any of !#$%&'*+-.^_`|~")]
    Name,
    #[error(
        "a cookie's path begins with / and has no semicolon, control character or non-ASCII character"
    )]
    Path,
    #[error("browsers drop a cookie with same_site: none unless secure: true")]
    NoneNeedsSecure,
    #[error("browsers drop a cookie named __Secure-… unless secure: true")]
    SecurePrefix,
    #[error("browsers drop a cookie named __Host-… unless secure: true and path: /")]
    HostPrefix,
}

/// Whether browsers will keep a cookie of this name with these attributes (RFC 6265 section 4.1.1; for the prefixes and
/// `SameSite=None` RFC 6265bis sections 4.1.3 and 5.7).
pub fn check_cookie(name: &str, cookie: &CookieAttributes) -> Result<(), CookieError> {
    let is_token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    if name.is_empty() || !name.bytes().all(is_token) {
        return Err(CookieError::Name);
    }
    let is_path = |byte: u8| matches!(byte, b' '..=b'~') && byte != b';';
    if !cookie.path.starts_with('/') || !cookie.path.bytes().all(is_path) {
        return Err(CookieError::Path);
    }
    if cookie.same_site == SameSite::None && !cookie.secure {
        return Err(CookieError::NoneNeedsSecure);
    }
    // Browsers compare the prefixes in any case.
    let name = name.to_ascii_lowercase();
    if name.starts_with("__secure-") && !cookie.secure {
        return Err(CookieError::SecurePrefix);
    }
    if name.starts_with("__host-") && !(cookie.secure && cookie.path == "/") {
        return Err(CookieError::HostPrefix);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cookie_that_browsers_would_drop_is_refused() {
        let check = |name: &str, secure, same_site, path: &str, expected| {
            let cookie = CookieAttributes {
                secure,
                http_only: true,
                same_site,
                path: path.into(),
            };
            assert_eq!(check_cookie(name, &cookie), expected, "{name} {cookie:?}");
        };
        check("sid", false, SameSite::Lax, "/a", Ok(()));
        check("__Host-sid", true, SameSite::None, "/", Ok(()));
        check("", true, SameSite::Lax, "/", Err(CookieError::Name));
        check("a=b", true, SameSite::Lax, "/", Err(CookieError::Name));
        check("sid", true, SameSite::Lax, "a", Err(CookieError::Path));
        check("sid", true, SameSite::Lax, "/;x", Err(CookieError::Path));
        check("sid", true, SameSite::Lax, "/\r", Err(CookieError::Path));
        let needs_secure = Err(CookieError::NoneNeedsSecure);
        check("sid", false, SameSite::None, "/", needs_secure);
        let secure_prefix = Err(CookieError::SecurePrefix);
        check("__secure-sid", false, SameSite::Lax, "/", secure_prefix);
        let host_prefix = Err(CookieError::HostPrefix);
        check("__Host-sid", true, SameSite::Lax, "/a", host_prefix);
    }
}
