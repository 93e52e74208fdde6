//! The rules of sessions, as tests.

use std::num::NonZeroU32;

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::config::sessions::OnMax;
use crate::http1::hygiene::is_folded;

const fn s(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn settings() -> Settings {
    Settings {
        sources: vec![
            TokenSource::Cookie("sid".into()),
            TokenSource::Bearer,
            TokenSource::Header("X-Session".into()),
        ],
        idle_timeout: s(10),
        absolute_timeout: s(25),
        max_per_user: NonZeroU32::new(2),
        on_max: OnMax::EvictOldest,
        forward: Forward {
            user: Some("X-Auth-User".into()),
            session: Some("X-Auth-Session".into()),
            claims: Some("X-Auth-Claims".into()),
        },
        cookie: CookieAttributes {
            secure: true,
            http_only: true,
            same_site: SameSite::Lax,
            path: "/".into(),
        },
    }
}

const fn id(hash: [u8; 16]) -> SessionId {
    SessionId { hash, user: None }
}

fn claims(value: Value) -> Claims {
    serde_json::from_value(value).unwrap()
}

fn session(user: &str, with: Value) -> Session {
    let id = id([0xab; 16]);
    Session::new(id, user.into(), claims(with), &settings(), s(100))
}

#[track_caller]
fn check_token(fields: &[(&str, &str)], expected: Option<&str>) {
    let fields = fields
        .iter()
        .map(|(name, value)| (name.as_bytes(), value.as_bytes()));
    assert_eq!(token_from(&settings(), fields), expected);
}

#[test]
fn token_is_found_in_each_source() {
    check_token(&[("Cookie", "sid=a")], Some("a"));
    check_token(&[("cookie", "x=1; sid=a=b; y=2")], Some("a=b"));
    check_token(&[("cookie", "x=1;sid=a;y")], Some("a"));
    check_token(&[("cookie", "x=1; sid = \"a\" ")], Some("a"));
    check_token(&[("cookie", "x=1"), ("cookie", "sid=a")], Some("a"));
    check_token(&[("Authorization", "bEARER  a ")], Some("a"));
    check_token(&[("x-session", " a ")], Some("a"));
}

#[test]
fn first_source_with_a_token_wins() {
    let both = [("x-session", "h"), ("authorization", "Bearer b")];
    check_token(&both, Some("b"));
    check_token(
        &[("authorization", "Bearer b"), ("cookie", "sid=c")],
        Some("c"),
    );
    check_token(
        &[("authorization", "Basic b"), ("x-session", "h")],
        Some("h"),
    );
    check_token(&[("cookie", "sid="), ("x-session", "h")], Some("h"));
}

#[test]
fn token_said_twice_is_none() {
    check_token(&[("cookie", "sid=a; sid=b")], None);
    check_token(&[("cookie", "sid=a; sid=a")], None);
    check_token(&[("cookie", "sid=; sid=a")], None);
    check_token(&[("cookie", "sid=a"), ("cookie", "sid=b")], None);
    check_token(&[("cookie", "sid=a; sid=b"), ("x-session", "h")], None);
    check_token(&[("x-session", "a"), ("x-session", "b")], None);
    let bearers = [("authorization", "Bearer a"), ("authorization", "Bearer b")];
    check_token(&bearers, None);
}

#[test]
fn all_tokens_are_of_every_source_however_often_each_is_said() {
    let check = |fields: &[(&str, &str)], expected: &[&str]| {
        let fields = fields.iter();
        let fields = fields.map(|(name, value)| (name.as_bytes(), value.as_bytes()));
        assert_eq!(tokens_in(&settings(), fields), expected);
    };
    check(&[("cookie", "x=1")], &[]);
    check(&[("cookie", "sid=a")], &["a"]);
    check(&[("cookie", "sid=a; sid=; sid=b c; sid=b")], &["a", "b"]);
    let all = [
        ("x-session", "h"),
        ("authorization", "Bearer b"),
        ("cookie", "sid=c"),
        ("cookie", "sid=d"),
    ];
    check(&all, &["c", "d", "b", "h"]);
}

#[test]
fn what_only_looks_like_a_token_is_none() {
    check_token(&[], None);
    check_token(&[("cookie", "SID=a; sidx=b; xsid=c; sid; =sid")], None);
    check_token(&[("cookie", "sid=a b")], None);
    check_token(&[("cookie", "sid=ä")], None);
    check_token(&[("cookie", "sid=\"\"")], None);
    check_token(&[("authorization", "Bearer")], None);
    check_token(&[("authorization", "Bearerx")], None);
    check_token(&[("authorization", "")], None);
}

#[test]
fn unused_session_expires_after_the_idle_timeout() {
    let session = session("ann", json!({}));
    let none = Claims::new();
    assert_eq!(judge(&session, &none, s(109)), Verdict::Valid);
    assert_eq!(judge(&session, &none, s(110)), Verdict::Expired);
    session.touch(s(109));
    session.touch(s(105));
    assert_eq!(judge(&session, &none, s(118)), Verdict::Valid);
    assert_eq!(judge(&session, &none, s(119)), Verdict::Expired);
}

#[test]
fn busy_session_expires_after_the_absolute_timeout() {
    let session = session("ann", json!({}));
    for now in 100..125 {
        session.touch(s(now));
        assert_eq!(judge(&session, &Claims::new(), s(now)), Verdict::Valid);
    }
    assert_eq!(judge(&session, &Claims::new(), s(125)), Verdict::Expired);
}

#[test]
fn required_claims_must_be_equal() {
    let session = session("ann", json!({"role": "customer", "tier": 2}));
    let missing = |claim| Verdict::ClaimMissing { claim };
    let check = |required: Value, expected| {
        assert_eq!(judge(&session, &claims(required), s(100)), expected);
    };
    check(json!({}), Verdict::Valid);
    check(json!({"role": "customer"}), Verdict::Valid);
    check(json!({"role": "customer", "tier": 2}), Verdict::Valid);
    check(json!({"role": "admin"}), missing("role"));
    check(json!({"role": "customer", "tier": "2"}), missing("tier"));
    check(json!({"other": null}), missing("other"));
    let session = self::session("ann", json!({"roles": ["a", "b"]}));
    for (role, expected) in [("b", Verdict::Valid), ("c", missing("roles"))] {
        let required = claims(json!({"roles": role}));
        assert_eq!(judge(&session, &required, s(100)), expected);
    }
}

#[test]
fn cookie_is_set_and_cleared_with_the_same_attributes() {
    let mut settings = settings();
    let set = set_cookie(&settings, "sid", "t", s(60));
    let expected = "sid=t; Path=/; Max-Age=60; SameSite=Lax; Secure; HttpOnly";
    assert_eq!(set, expected);
    let expected = "sid=; Path=/; Max-Age=0; SameSite=Lax; Secure; HttpOnly";
    assert_eq!(clear_cookie(&settings, "sid"), expected);
    settings.cookie = CookieAttributes {
        secure: false,
        http_only: false,
        same_site: SameSite::Strict,
        path: "/a".into(),
    };
    let set = set_cookie(&settings, "sid", "t", s(60));
    assert_eq!(set, "sid=t; Path=/a; Max-Age=60; SameSite=Strict");
}

#[test]
fn upstream_is_told_in_printable_ascii() {
    let settings = settings();
    let check = |user, with, expected_user: &str, expected_claims: &str| {
        let session = session(user, with);
        let id = "ab".repeat(16);
        let expected = [
            ("X-Auth-User", expected_user),
            ("X-Auth-Session", &id),
            ("X-Auth-Claims", expected_claims),
        ];
        assert_eq!(
            identity_headers(&settings, &session).collect::<Vec<_>>(),
            expected
        );
    };
    check("a@b.example", json!({}), "a@b.example", "{}");
    check(
        "zoë 5%",
        json!({"n": "é"}),
        "zo%C3%AB%205%25",
        r#"{"n":"\u00e9"}"#,
    );
    let nasty = json!({"k\r\n": "\u{7f}\u{1f600}"});
    check(
        "a\r\nb",
        nasty,
        "a%0D%0Ab",
        r#"{"k\r\n":"\u007f\ud83d\ude00"}"#,
    );
}

#[test]
fn header_that_is_not_configured_is_not_told() {
    let mut settings = settings();
    settings.forward = Forward::default();
    assert_eq!(
        identity_headers(&settings, &session("a", json!({}))).count(),
        0
    );
}

#[test]
fn identity_headers_of_clients_are_known_however_written() {
    let names = identity_fields([&settings(), &settings()].into_iter());
    let known = |name: &[u8]| names.iter().any(|known| is_folded(name, known));
    for name in [
        "X-Auth-User",
        "x-auth-CLAIMS",
        "X_Auth-Session",
        "X.Auth~User",
        "x-weir-session-start",
    ] {
        assert!(known(name.as_bytes()), "{name}");
    }
    assert!(!known(b"X-Auth-User2") && !known(b"XAuthUser"));
    assert_eq!(names.len(), 5);

    // Those that `forward` leaves out are no client's to say either.
    let mut named = settings();
    named.forward = Forward {
        user: Some("X-User".into()),
        ..Forward::default()
    };
    let names = identity_fields([&named].into_iter());
    let known = |name: &[u8]| names.iter().any(|known| is_folded(name, known));
    for name in ["X-User", "X-Auth-User", "x_auth_session", "X-Auth-Claims"] {
        assert!(known(name.as_bytes()), "{name}");
    }
    assert_eq!(identity_fields([].into_iter()).len(), 2);
}

#[test]
fn session_start_needs_a_user_and_nothing_unknown() {
    let start = SessionStart::parse(br#"{"user": "ann", "claims": {"role": "x"}}"#).unwrap();
    assert_eq!(start.user, "ann");
    assert_eq!(start.claims, claims(json!({"role": "x"})));
    assert!(SessionStart::parse(br#"{"user": "ann"}"#).is_ok());
    for bad in [
        r#"{"claims": {}}"#,
        r#"{"user": ""}"#,
        r#"{"user": 1}"#,
        r#"{"user": "a", "claim": {}}"#,
        r#"{"user": "a", "claims": []}"#,
        r#"{"user": "a"} x"#,
        "",
    ] {
        assert!(SessionStart::parse(bad.as_bytes()).is_err(), "{bad}");
    }
}

#[test]
fn session_id_is_written_in_two_ways() {
    let in_memory = id([0x0f; 16]);
    assert_eq!(in_memory.to_string(), "0f".repeat(16));
    let user = UserTag::new("ann");
    let in_redis = SessionId {
        user: Some(user),
        ..in_memory
    };
    let text = format!("{}Dw8PDw8PDw8PDw8PDw8PDw", user.as_str());
    assert_eq!(in_redis.to_string(), text);
    for id in [in_memory, in_redis] {
        assert_eq!(id.to_string().parse(), Ok(id));
    }
    let not_base64url = text.replace('D', "+");
    for bad in [
        "",
        "0f",
        &"g".repeat(32),
        &format!("+{}", "0".repeat(31)),
        &not_base64url,
    ] {
        assert_eq!(bad.parse::<SessionId>(), Err(SessionIdError));
    }
}

proptest! {
    #[test]
    fn token_search_never_panics(
        random in proptest::collection::vec(any::<u8>(), 0..64),
        likely in "[sid=;\" \t,a]{0,40}",
    ) {
        for name in [&b"cookie"[..], b"authorization", b"x-session"] {
            let fields = [(name, &random[..]), (name, likely.as_bytes())];
            for fields in [&fields[..], &fields[..1], &fields[1..]] {
                let token = token_from(&settings(), fields.iter().copied());
                prop_assert!(token.is_none_or(|token| !token.is_empty()));
            }
        }
    }

    #[test]
    fn cookie_between_others_is_found(
        before in "([a-r]{1,3}=[a-z=]{0,4}; ){0,3}",
        token in "[A-Za-z0-9_-]{1,43}",
        after in "(; [a-r]{1,3}=[a-z=]{0,4}){0,3}",
    ) {
        let cookie = format!("{before}sid={token}{after}");
        check_token(&[("cookie", &cookie)], Some(&token));
    }

    #[test]
    fn identity_headers_are_printable_and_tell_the_claims(
        user in any::<String>(),
        key in any::<String>(),
        value in any::<String>(),
    ) {
        let settings = settings();
        let given = Claims::from([(key, json!([value, 1]))]);
        let id = id([0; 16]);
        let session = Session::new(id, user, given.clone(), &settings, s(0));
        for (name, value) in identity_headers(&settings, &session) {
            prop_assert!(value.bytes().all(|byte| matches!(byte, b' '..=b'~')));
            if name == "X-Auth-Claims" {
                prop_assert_eq!(&serde_json::from_str::<Claims>(value).unwrap(), &given);
            }
        }
    }
}
