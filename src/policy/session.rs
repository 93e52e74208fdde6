//! Sessions as rules: where a token is found, whether a session holds, how cookies and identity headers are written.
//!
//! Keeps nothing and makes no tokens: that is `store::sessions`. `now` is the time since an origin that the process
//! chooses once; only differences matter.

use std::fmt::{self, Write as _};
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::Deserialize;
use serde_json::Value;
use thiserror::Error;

use crate::config::sessions::CookieAttributes;
use crate::config::sessions::{Claims, Forward, SameSite, Settings, TokenSource};
use crate::http1::hygiene::folded;
use crate::keys::UserTag;

/// The response header by which a trusted upstream starts a session; see [`SessionStart`].
pub const START_HEADER: &str = "X-Weir-Session-Start";
/// The response header by which a trusted upstream ends the session of the request.
pub const END_HEADER: &str = "X-Weir-Session-End";

/// What people and upstreams call a session: the first 16 bytes of the SHA-256 of its token. In memory these are written in hex;
/// in Redis as base64url behind the tag of the user, since that is where the session is. Knowing it does not help to guess
/// the token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId {
    pub hash: [u8; 16],
    /// Of a session in Redis.
    pub user: Option<UserTag>,
}

/// One user, logged in. Shared by the lanes; of all that is in it only times change.
#[derive(Debug)]
pub struct Session {
    pub id: SessionId,
    pub user: String,
    /// By name. A tree of one claim would take more room than all else of the session.
    claims: Box<[(String, Value)]>,
    /// When it was created.
    pub created: Duration,
    // In nanoseconds since the origin, which are good for 584 years.
    ends: AtomicU64,
    last_seen: AtomicU64,
    /// In nanoseconds.
    idle_timeout: AtomicU64,
    // Written once, because each request that is passed on needs them.
    header_values: HeaderValues,
}

/// When a session began, was used and is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Times {
    pub created: Duration,
    pub ends: Duration,
    pub idle_timeout: Duration,
    pub last_seen: Duration,
}

/// After what time sessions are over that begin now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    pub absolute: Duration,
    pub idle: Duration,
}

impl Timeouts {
    pub const UNBOUNDED: Timeouts = Timeouts {
        absolute: Duration::MAX,
        idle: Duration::MAX,
    };

    pub fn of(settings: &Settings) -> Timeouts {
        Timeouts {
            absolute: settings.absolute_timeout,
            idle: settings.idle_timeout,
        }
    }
}

#[derive(Debug)]
struct HeaderValues {
    user: String,
    session: String,
    claims: String,
}

/// Whether a session lets a request through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict<'a> {
    Valid,
    /// Idle for too long, or too old.
    Expired,
    /// The session does not have this claim with the value that the route asks for.
    ClaimMissing {
        claim: &'a str,
    },
}

/// What an upstream says in [`START_HEADER`]: `{"user": "ann", "claims": {"role": "customer"}}`; `claims` may be left out.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SessionStart {
    pub user: String,
    #[serde(default)]
    pub claims: Claims,
}

/// Why a [`START_HEADER`] starts nothing.
#[derive(Debug, Error)]
pub enum StartError {
    #[error("not a session start: {0}")]
    Json(#[from] serde_json::Error),
    #[error("a session needs a user, and \"user\" is empty")]
    NoUser,
}

impl Session {
    /// A session that begins, and is first seen, at `now`.
    pub fn new(
        id: SessionId,
        user: String,
        claims: Claims,
        settings: &Settings,
        now: Duration,
    ) -> Self {
        let times = Times {
            created: now,
            ends: now.saturating_add(settings.absolute_timeout),
            idle_timeout: settings.idle_timeout,
            last_seen: now,
        };
        Self::resumed(id, user, claims, times)
    }

    /// A session that has begun.
    pub fn resumed(id: SessionId, user: String, claims: Claims, times: Times) -> Self {
        let header_values = HeaderValues {
            user: percent_encoded(&user),
            session: id.to_string(),
            claims: ascii_json(&claims),
        };
        Self {
            id,
            user,
            claims: claims.into_iter().collect(),
            created: times.created,
            ends: AtomicU64::new(nanoseconds(times.ends)),
            last_seen: AtomicU64::new(nanoseconds(times.last_seen)),
            idle_timeout: AtomicU64::new(nanoseconds(times.idle_timeout)),
            header_values,
        }
    }

    /// What is known of the user by this name.
    pub fn claim(&self, name: &str) -> Option<&Value> {
        let found = self
            .claims
            .binary_search_by(|(own, _)| own.as_str().cmp(name));
        found.ok().map(|place| &self.claims[place].1)
    }

    /// All that is known of the user.
    pub fn claims(&self) -> Claims {
        self.claims.iter().cloned().collect()
    }

    /// Puts off the idle timeout: the session was used at `now`. Of two uses the later one counts, in whatever order
    /// they are told.
    pub fn touch(&self, now: Duration) {
        let now = nanoseconds(now);
        // Relaxed: nothing else is published by it. The load spares the cache line of a busy session a write.
        if self.last_seen.load(Ordering::Relaxed) < now {
            self.last_seen.fetch_max(now, Ordering::Relaxed);
        }
    }

    /// When it was last used.
    pub fn last_seen(&self) -> Duration {
        Duration::from_nanos(self.last_seen.load(Ordering::Relaxed))
    }

    /// When it is over, however busy it is.
    pub fn ends(&self) -> Duration {
        Duration::from_nanos(self.ends.load(Ordering::Relaxed))
    }

    pub fn idle_timeout(&self) -> Duration {
        Duration::from_nanos(self.idle_timeout.load(Ordering::Relaxed))
    }

    /// Has no longer timeouts than these from now on.
    pub fn shorten(&self, timeouts: Timeouts) {
        let ends = self.created.saturating_add(timeouts.absolute);
        self.ends.fetch_min(nanoseconds(ends), Ordering::Relaxed);
        let idle = nanoseconds(timeouts.idle);
        self.idle_timeout.fetch_min(idle, Ordering::Relaxed);
    }

    /// When it is over unless it is used before: its first instant without.
    pub fn over_at(&self) -> Duration {
        let idle = self.last_seen().saturating_add(self.idle_timeout());
        idle.min(self.ends())
    }

    /// Whether it is over at `now`.
    pub fn is_expired(&self, now: Duration) -> bool {
        now >= self.over_at()
    }
}

impl SessionStart {
    /// Reads the value of a [`START_HEADER`]. Unknown keys are refused, so that a misspelt "claims" does not give a session
    /// without any.
    pub fn parse(value: &[u8]) -> Result<Self, StartError> {
        let start: Self = serde_json::from_slice(value)?;
        if start.user.is_empty() {
            return Err(StartError::NoUser);
        }
        Ok(start)
    }
}

/// The token of a request, from the first source that has one; `fields` are the header fields as they came.
///
/// A source that has two answers, such as a cookie sent twice, ends the search with none: which of them is meant depends
/// on the reader, and a sibling domain can add a cookie but not take one away (RFC 6265 section 8.6, "Weak Integrity").
pub fn token_from<'a>(
    settings: &Settings,
    fields: impl Iterator<Item = (&'a [u8], &'a [u8])> + Clone,
) -> Option<&'a str> {
    for source in &settings.sources {
        let found = match source {
            TokenSource::Cookie(name) => only(cookies(name, fields.clone())),
            TokenSource::Bearer => only(bearers(fields.clone())),
            TokenSource::Header(name) => only(headers(name, fields.clone())),
        };
        match found {
            Found::Nothing => {}
            Found::One(token) => return Some(token),
            Found::Several => return None,
        }
    }
    None
}

/// All that can be tokens of a request, whichever of them [`token_from`] believes.
pub fn tokens_in<'a>(
    settings: &Settings,
    fields: impl Iterator<Item = (&'a [u8], &'a [u8])> + Clone,
) -> Vec<&'a str> {
    let mut tokens = Vec::new();
    for source in &settings.sources {
        let fields = fields.clone();
        match source {
            TokenSource::Cookie(name) => tokens.extend(cookies(name, fields).filter_map(token)),
            TokenSource::Bearer => tokens.extend(bearers(fields).filter_map(token)),
            TokenSource::Header(name) => tokens.extend(headers(name, fields).filter_map(token)),
        }
    }
    tokens
}

/// Whether `session` lets a request through at `now` to a route that asks for these claims. A claim is there when it is
/// equal as JSON, or a list that holds the value; of several that are missing the first by name is told.
pub fn judge<'a>(session: &Session, required: &'a Claims, now: Duration) -> Verdict<'a> {
    if session.is_expired(now) {
        return Verdict::Expired;
    }
    let holds = |claim: &str, value: &Value| match session.claim(claim) {
        Some(Value::Array(list)) if !value.is_array() => list.contains(value),
        claim => claim == Some(value),
    };
    let missing = required.iter().find(|(claim, value)| !holds(claim, value));
    missing.map_or(Verdict::Valid, |(claim, _)| Verdict::ClaimMissing { claim })
}

/// The value of a `Set-Cookie` that gives the token to the browser for `max_age`, in whole seconds. Never with `Domain`:
/// a cookie without is sent to this host alone (OWASP Session Management, "Domain and Path Attributes").
///
/// `name` and the attributes have passed [`check_cookie`]; `token` came from the store.
pub fn set_cookie(settings: &Settings, name: &str, token: &str, max_age: Duration) -> String {
    let CookieAttributes {
        secure,
        http_only,
        same_site,
        path,
    } = &settings.cookie;
    let same_site = match same_site {
        SameSite::Lax => "Lax",
        SameSite::Strict => "Strict",
        SameSite::None => "None",
    };
    let secure = if *secure { "; Secure" } else { "" };
    let http_only = if *http_only { "; HttpOnly" } else { "" };
    let max_age = max_age.as_secs();
    format!(
        "{name}={token}; Path={path}; Max-Age={max_age}; SameSite={same_site}{secure}{http_only}"
    )
}

/// The value of a `Set-Cookie` that makes the browser forget the token: no value, and over at once (RFC 6265 section 5.2.2).
/// The attributes are those of [`set_cookie`], because another path would be another cookie.
pub fn clear_cookie(settings: &Settings, name: &str) -> String {
    set_cookie(settings, name, "", Duration::ZERO)
}

/// The headers that tell the upstream who asks, as name and value. Values are visible ASCII and spaces, whatever is in the
/// session, and no two users have the same: the user is percent-encoded (RFC 3986 section 2.1) where it is not visible
/// ASCII or is a `%`; the claims are compact JSON with everything but ASCII as `\u` escapes.
pub fn identity_headers<'a>(
    settings: &'a Settings,
    session: &'a Session,
) -> impl Iterator<Item = (&'a str, &'a str)> {
    let Forward {
        user,
        session: id,
        claims,
    } = &settings.forward;
    let values = &session.header_values;
    [
        (user, &values.user),
        (id, &values.session),
        (claims, &values.claims),
    ]
    .into_iter()
    .filter_map(|(name, value)| Some((name.as_deref()?, value.as_str())))
}

/// The request fields that clients must not send, each [`folded`]: the identity headers of all sessions, since an upstream
/// may believe them on routes without, and weir's own, since an upstream that echoes request headers would otherwise let its
/// clients start sessions.
pub fn identity_fields<'a>(all: impl Iterator<Item = &'a Settings>) -> Vec<Vec<u8>> {
    let mut names: Vec<_> = [START_HEADER, END_HEADER]
        .map(|name| folded(name.as_bytes()))
        .into();
    for settings in all {
        let Forward {
            user,
            session,
            claims,
        } = &settings.forward;
        let told = [user, session, claims].into_iter().flatten();
        names.extend(told.map(|name| folded(name.as_bytes())));
        // An app that reads all of them must not take a client's own for one that `forward` leaves out.
        names.extend(Forward::NAMES.map(|name| folded(name.as_bytes())));
    }
    names.sort_unstable();
    names.dedup();
    names
}

impl SessionId {
    /// Of a session in Redis: what it is called among those of its user.
    pub fn field(&self) -> String {
        URL_SAFE_NO_PAD.encode(self.hash)
    }

    /// Of what [`SessionId::field`] gave, of this user.
    pub fn of_field(user: UserTag, field: &str) -> Result<SessionId, SessionIdError> {
        let mut hash = [0; 16];
        match URL_SAFE_NO_PAD.decode_slice(field, &mut hash) {
            Ok(16) => Ok(SessionId {
                hash,
                user: Some(user),
            }),
            Ok(_) | Err(_) => Err(SessionIdError),
        }
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.user {
            None => self
                .hash
                .iter()
                .try_for_each(|byte| write!(f, "{byte:02x}")),
            Some(user) => write!(f, "{}{}", user.as_str(), self.field()),
        }
    }
}

/// Neither way to write one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("a session's id is 32 hex digits, or with redis 38 letters, digits, - and _")]
pub struct SessionIdError;

impl FromStr for SessionId {
    type Err = SessionIdError;

    fn from_str(text: &str) -> Result<Self, SessionIdError> {
        if let Some((user, field)) = text.split_at_checked(UserTag::CHARS)
            && field.len() == 22
        {
            let user = UserTag::parse(user).ok_or(SessionIdError)?;
            return SessionId::of_field(user, field);
        }
        // `from_str_radix` alone would take a sign.
        if text.len() != 32 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(SessionIdError);
        }
        let number = u128::from_str_radix(text, 16).map_err(|_| SessionIdError)?;
        Ok(Self {
            hash: number.to_be_bytes(),
            user: None,
        })
    }
}

enum Found<'a> {
    Nothing,
    One(&'a str),
    Several,
}

/// The one value, where it can be a token: not empty, and visible ASCII.
fn only<'a>(mut values: impl Iterator<Item = &'a [u8]>) -> Found<'a> {
    let Some(value) = values.next() else {
        return Found::Nothing;
    };
    if values.next().is_some() {
        return Found::Several;
    }
    token(value).map_or(Found::Nothing, Found::One)
}

fn token(value: &[u8]) -> Option<&str> {
    let is_token = !value.is_empty() && value.iter().all(u8::is_ascii_graphic);
    str::from_utf8(value).ok().filter(|_| is_token)
}

fn named<'a>(
    name: &str,
    fields: impl Iterator<Item = (&'a [u8], &'a [u8])>,
) -> impl Iterator<Item = &'a [u8]> {
    fields.filter_map(|(field, value)| field.eq_ignore_ascii_case(name.as_bytes()).then_some(value))
}

fn headers<'a>(
    name: &str,
    fields: impl Iterator<Item = (&'a [u8], &'a [u8])>,
) -> impl Iterator<Item = &'a [u8]> {
    named(name, fields).map(<[u8]>::trim_ascii)
}

fn bearers<'a>(
    fields: impl Iterator<Item = (&'a [u8], &'a [u8])>,
) -> impl Iterator<Item = &'a [u8]> {
    named("authorization", fields).filter_map(bearer)
}

/// The token of one `Authorization`, if its scheme is `Bearer`, in any case (RFC 9110 section 11.1).
pub fn bearer(value: &[u8]) -> Option<&[u8]> {
    let value = value.trim_ascii();
    let (scheme, token) = value.split_at_checked(b"Bearer".len())?;
    (scheme.eq_ignore_ascii_case(b"Bearer") && token.first() == Some(&b' '))
        .then(|| token.trim_ascii())
}

/// The values of the cookies of this name. The field is what a browser writes by RFC 6265 section 5.4: pairs between `; `,
/// split at the first `=`. Several fields are one (RFC 9113 section 8.2.3); a value may be in quotes (section 4.1.1).
/// A piece without `=` is a cookie without a name, and never ours.
fn cookies<'a>(
    name: &str,
    fields: impl Iterator<Item = (&'a [u8], &'a [u8])>,
) -> impl Iterator<Item = &'a [u8]> {
    named("cookie", fields)
        .flat_map(|field| field.split(|byte| *byte == b';'))
        .filter_map(move |pair| {
            let equals = pair.iter().position(|byte| *byte == b'=')?;
            let (key, value) = pair.split_at(equals);
            (key.trim_ascii() == name.as_bytes()).then(|| unquoted(value[1..].trim_ascii()))
        })
}

fn unquoted(value: &[u8]) -> &[u8] {
    match value {
        [b'"', inside @ .., b'"'] => inside,
        bare => bare,
    }
}

fn percent_encoded(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        // Spaces are encoded too: at an end they would not survive the way (RFC 9110 section 5.5).
        if byte.is_ascii_graphic() && byte != b'%' {
            encoded.push(char::from(byte));
        } else {
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}

/// Compact JSON in printable ASCII.
fn ascii_json(claims: &Claims) -> String {
    let json = serde_json::to_string(claims)
        .expect("a map from strings to JSON values is always JSON, and a String takes it all");
    let mut ascii = String::with_capacity(json.len());
    // serde_json escapes what is below a space. The rest can only be inside a string, where an escape means the same.
    for character in json.chars() {
        if matches!(character, ' '..='~') {
            ascii.push(character);
        } else {
            for unit in character.encode_utf16(&mut [0; 2]) {
                let _ = write!(ascii, "\\u{unit:04x}");
            }
        }
    }
    ascii
}

fn nanoseconds(since_origin: Duration) -> u64 {
    u64::try_from(since_origin.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
