//! Tests of what is never written down, however it is spelt.

use proptest::prelude::*;

use super::*;

#[test]
fn redacted_parameters_keep_their_name_and_lose_their_value() {
    let redaction = Redaction::new(["Authorization"], ["token", "a b"]);
    let check = |query: &str, expected: &str| {
        assert_eq!(redaction.redact_query(query), expected, "{query}");
    };
    check("", "");
    check("a=1&b=2", "a=1&b=2");
    check("token=s&b=2", "token=***&b=2");
    check("b=2&TOKEN=s", "b=2&TOKEN=***");
    check("%74oke%6E=s", "%74oke%6E=***");
    check("a+b=s&a%20b=s", "a+b=***&a%20b=***");
    check("token=s=t;u", "token=***");
    check("a=1;token=s;t", "a=1;token=***");
    check("token", "token");
    check("token[]=s&token%5B0%5D=s", "token[]=***&token%5B0%5D=***");
    check("u[token]=s&u%5Ba%20b%5d=s", "u[token]=***&u%5Ba%20b%5d=***");
    check("u[1][Token]=s;t", "u[1][Token]=***");
    check("u[tokens]=1&[]=2&u[=3", "u[tokens]=1&[]=2&u[=3");
    check("u[token=s", "u[token=***");
    check("%zz=1&%=2&%7=3", "%zz=1&%=2&%7=3");
    assert_eq!(redaction.redact_header("AUTHORIZATION", "Bearer s"), "***");
    assert_eq!(redaction.redact_header("accept", "*/*"), "*/*");
}

#[test]
fn urls_in_headers_show_no_secret() {
    let redaction = Redaction::default();
    let check = |url: &str, expected: &str| {
        for name in ["Referer", "location", "Content-Location"] {
            assert_eq!(redaction.redact_header(name, url), expected, "{name}");
        }
    };
    check("https://a/b", "https://a/b");
    check(
        "https://a/?x=1&access_token=s",
        "https://a/?x=1&access_token=***",
    );
    check("/cb?code=s#x", "/cb?code=***#x");
    check("/cb?a=1#id_token=s&b=2", "/cb?a=1#id_token=***&b=2");
    check("/#/cb?code=s", "/#/cb?code=***");
    check("/?token=a?b#token=a?b", "/?token=***#token=***");
    check("/a?x=//b@c", "/a?x=//b@c");
    check("https://ann:s@a:1/b@c?d=@", "https://a:1/b@c?d=@");
    check("//ann@a/b", "//a/b");
    check("ann@b", "ann@b");
    check("", "");
    for secret in ["passwd", "pwd", "jwt", "assertion", "SAMLResponse"] {
        check(&format!("/?{secret}=s&x=1"), &format!("/?{secret}=***&x=1"));
    }
    assert_eq!(redaction.redact_header("x-url", "/?code=1"), "/?code=1");
}

#[test]
fn names_are_the_same_however_their_words_are_parted() {
    let redaction = Redaction::default();
    for name in [
        "accessToken",
        "access-token",
        "ACCESS.TOKEN",
        "refreshtoken",
    ] {
        assert_eq!(
            redaction.redact_query(&format!("{name}=s")),
            format!("{name}=***")
        );
    }
    assert!(redaction.hides("x_api_key") && redaction.hides("XApiKey"));
    for name in ["to", "ken", "tokens", "", "-", "_"] {
        let query = format!("{name}=s");
        assert_eq!(redaction.redact_query(&query), query);
    }
    assert_eq!(
        Redaction::new(["-"], ["-"]).redact_query("-=s&_=t&=u"),
        "-=***&_=t&=u"
    );
}

#[test]
fn a_url_within_a_url_shows_no_secret() {
    let check = |query: &str, expected: &str| {
        assert_eq!(
            Redaction::default().redact_query(query),
            expected,
            "{query}"
        );
    };
    check("next=/cb?token=s", "next=***");
    check("a=1&next=%2Fcb%3Fa%3D1%26token%3Ds&b=2", "a=1&next=***&b=2");
    check("next=%252Fcb%253Ftoken%253Ds", "next=***");
    check("next=%2Fcb%23access_token%3Ds", "next=***");
    check("next=%2Fcb%3F%74oken%3Ds", "next=***");
    for shown in [
        "next=/cb?a=1",
        "q=token%3D1",
        "next=%2Ftoken%3Fa%3D1",
        "q=50%25&r=%zz?",
        "q=a%26token%3D1",
    ] {
        check(shown, shown);
    }
}

#[test]
fn no_more_of_a_query_is_looked_through_than_is_kept() {
    for part in ["=&", "=;", "a[b]=1&"] {
        let told = Redaction::default().redact_query(&part.repeat(9_000)).len();
        assert!((LONGEST + 1..LONGEST + 10).contains(&told), "{told}");
    }
    let beyond = format!("next=/{}?token=5", "ä".repeat(LONGEST / 2));
    assert_eq!(Redaction::default().redact_query(&beyond), beyond);
    for before in LONGEST - 8..LONGEST + 2 {
        let told = Redaction::default().redact_query(&("a".repeat(before) + ";token=5"));
        assert!(!told.contains('5'), "{told}");
    }
}

#[test]
fn names_are_redacted_by_pattern() {
    let check = |pattern: &str, name: &str, expected: bool| {
        let redaction = Redaction::new([pattern], [pattern]);
        assert_eq!(redaction.hides(name), expected, "{pattern} {name}");
        let query = redaction.redact_query(&format!("{name}=s"));
        assert_eq!(query.ends_with("=***"), expected, "{pattern} {name}");
    };
    check("x-secret-*", "X-Secret-Key", true);
    check("x-secret-*", "x-secret-", true);
    check("x-secret-*", "x-secret", false);
    check("*_Token", "reset_token", true);
    check("*_token", "reset_token2", false);
    check("*pin*", "my-pin-1", true);
    check("a*b*c", "abc", true);
    check("a*b*c", "acb", false);
    check("a*a", "a", false);
    check("*", "a", true);
    check("a.c", "abc", false);
}

#[test]
fn paths_are_redacted_by_pattern() {
    let mut redaction = Redaction::default();
    let patterns = ["/reset/*", "/users/*/keys/*", "/u/*/x"];
    redaction.add_paths(patterns.map(str::to_owned));
    let check = |path: &str, expected: &str| {
        assert_eq!(redaction.redact_path(path), expected, "{path}");
    };
    check("/reset/s", "/reset/***");
    check("/reset/s/t;u", "/reset/***");
    check("/Reset;a=b/s", "/Reset;a=b/***");
    check("/reset/", "/reset/");
    check("/reset", "/reset");
    check("/resets/s", "/resets/s");
    check("/users/ann/keys/s", "/users/***/keys/***");
    check("/users/ann/keys", "/users/ann/keys");
    check("/u/ann/x/y/", "/u/***/x/y/");
    check("/u/ann/x", "/u/***/x");
    check("/u/ann", "/u/ann");
    check("//reset/./%73", "/reset/***");
    check("/reset/%2f", "/reset/***");
    check("https://a/reset/s", "https://a/reset/***");
    check("https://a", "https://a");
    check("", "");
    check("/", "/");
    assert_eq!(
        redaction.redact_header("Referer", "https://a/reset/s?code=t"),
        "https://a/reset/***?code=***"
    );
    let none = Redaction::default();
    assert!(matches!(none.redact_path("/reset/s"), Cow::Borrowed(_)));
}

#[test]
fn no_pattern_of_paths_undoes_another() {
    let mut redaction = Redaction::default();
    let patterns = ["/users/*/profile", "/users/me/*", "/a/*/*", "/a/b/*/d"];
    redaction.add_paths(patterns.map(str::to_owned));
    let check = |path: &str, expected: &str| {
        assert_eq!(redaction.redact_path(path), expected, "{path}");
    };
    check("/users/me/profile/s", "/users/***/***");
    check("/users/me/x/y", "/users/me/***");
    check("/users/ann/profile/x", "/users/***/profile/x");
    check("/a/b/c/d", "/a/***/***");
    check("/a/b", "/a/b");
}

#[test]
fn no_spelling_of_a_path_shows_what_is_hidden() {
    let mut redaction = Redaction::default();
    redaction.add_paths(["/reset/*", "/users/*/keys/*", "/p;x/*/y"].map(str::to_owned));
    let check = |path: &str, expected: &str| {
        assert_eq!(redaction.redact_path(path), expected, "{path}");
    };
    check("/reset%2Fs", "/reset/***");
    check("/x/..%5creset\\s", "/reset/***");
    check("/reset/s/..%2f", "/reset/***");
    check("/RESET/%zz", "/reset/***");
    // What `..` takes away was sent, too.
    check("/reset/s/../../public", "/reset/***");
    check("/reset/s/..", "/reset/***");
    check("/reset/s/%2E%2e/", "/reset/***");
    check("/reset/s/.%2e/../x%2Fy", "/reset/***");
    check("/users/ann/keys/s/../..", "/users/***");
    check("/users/ann/../me/keys/s", "/users/***");
    check("/x/../y", "/x/../y");
    check("/x/../p;x/s/y", "/p;x/***");
    check("/users/a%2Fb/%6Beys/s", "/users/***");
    check("/reset%3Bx/s", "/reset%3Bx/***");
    check("/;x/reset/s", "/;x/reset/***");
    check("/p/s/y", "/p/***/y");
    check("/other%2Fs", "/other%2Fs");
    check("reset/s", "/reset/***");
    check("*", "*");
    check("x:443", "x:443");
    let check = |url: &str, expected: &str| {
        assert_eq!(redaction.redact_header("location", url), expected, "{url}");
    };
    check("//host/reset/s", "//host/reset/***");
    check("//ann:s@host/reset/s?x", "//host/reset/***?x");
    check("https://host\\reset/s", "https://host/reset/***");
    check("https://host", "https://host");
    check("/Reset/s", "/Reset/***");
    // Below what it is, is not known.
    check("s?code=s", "***?code=***");
    check("reset//s", "***");
    check("?a=1", "?a=1");
}

#[test]
fn what_is_hidden_of_a_path_is_hidden_where_it_moves() {
    let mut redaction = Redaction::default();
    let patterns = ["/users/*/keys/*", "/*/me/x", "/v2/keys/*/open", "/pay/*"];
    redaction.add_paths(patterns.map(str::to_owned));
    let check = |asked: &str, kept: usize, moved: &str, expected: &str| {
        let told = redaction.redact_moved(asked, moved, kept);
        assert_eq!(told, expected, "{asked} {moved}");
    };
    check("/users/me/keys/s", 2, "/v2/keys/s", "/v2/keys/***");
    check("/users/me/keys/s/t", 3, "/keys/s/t", "/keys/***");
    check("/users/me/x", 1, "/v2/x", "/v2/x");
    check("/a/keys/s/open", 3, "/v2/keys/s/open", "/v2/keys/***/open");
    check("/pay/s/t", 0, "/v2", "/v2");
    check("/pay/s/t", 1, "/v2/t", "/v2/***");
    check("/x/me/x", 3, "/v2/x/me/x", "/v2/***/me/x");
    let none = Redaction::default();
    let told = none.redact_moved("/pay/s", "/v2/s", 1);
    assert!(matches!(told, Cow::Borrowed("/v2/s")));
}

#[test]
fn what_signs_the_urls_of_clouds_is_hidden() {
    for name in [
        "X-Amz-Signature",
        "X-Amz-Security-Token",
        "X-Goog-Signature",
        "AWSAccessKeyId",
    ] {
        let redacted = Redaction::default().redact_query(&format!("{name}=s"));
        assert_eq!(redacted, format!("{name}=***"));
    }
    for name in ["X-Weir-Session-Token", "X-Amz-Security-Token"] {
        assert!(Redaction::default().hides(name), "{name}");
    }
}

#[test]
fn what_is_always_hidden_is_what_the_page_names() {
    let page = include_str!("../../../docs/audit.md");
    let (_, told) = page.split_once("Always hidden are the headers").unwrap();
    let (told, _) = told.split_once(".\n").unwrap();
    let (headers, query) = told.split_once("in queries").unwrap();
    let named = |text: &str| -> Vec<String> {
        let mut names: Vec<_> = text
            .split('`')
            .skip(1)
            .step_by(2)
            .map(str::to_lowercase)
            .collect();
        names.sort();
        names
    };
    let always = Redaction::default();
    assert_eq!(named(headers), always.headers().collect::<Vec<_>>());
    assert_eq!(named(query), always.query().collect::<Vec<_>>());
}

proptest! {
    #[test]
    fn no_spelling_of_a_redacted_name_shows_its_value(
        before in "[a-z=;%+]{0,8}",
        escaped in proptest::collection::vec(any::<bool>(), 5),
        secret in "[0-9;=]{6,12}",
    ) {
        let name: String = "token".chars().zip(escaped).map(|(c, escaped)| {
            if escaped { format!("%{:02x}", u32::from(c)) } else { c.to_string() }
        }).collect();
        let redacted = Redaction::default().redact_query(&format!("{before}&{name}={secret}&z=1"));
        prop_assert!(!redacted.contains(&secret), "{}", redacted);
        prop_assert!(redacted.ends_with(&format!("{name}=***&z=1")), "{}", redacted);
    }

    #[test]
    fn no_spelling_of_a_path_shows_its_secret(
        before in prop::sample::select(vec!["", "/x/..", "/..", "/;x", "/x%2f..", "//host", "https://a:1", "https://b@c"]),
        part in prop::sample::select(vec!["/", "//", "/./", "/;x/", "%2f", "%2F", "\\", "%5c"]),
        parameters in prop::sample::select(vec!["", ";x", "%3bx", "%3Bx;y"]),
        escaped in prop::collection::vec(0..3, 5),
        secret in "[0-9]{6,12}",
        behind in prop::sample::select(vec!["", "/", "/x", "/..%2f", "%zz", "\u{e9}", ";x", "/..", "/../../x", "/x/%2e./.%2E/../y"]),
    ) {
        let name: String = "reset".chars().zip(escaped).map(|(c, escaped)| match escaped {
            0 => c.to_string(),
            1 => c.to_ascii_uppercase().to_string(),
            _ => format!("%{:02x}", u32::from(c)),
        }).collect();
        let path = format!("/{name}{parameters}{part}{secret}{behind}");
        let mut redaction = Redaction::default();
        redaction.add_paths(["/reset/*".to_owned()]);
        let url = format!("{before}{path}");
        let told = redaction.redact_header("referer", &url);
        prop_assert!(!told.contains(&secret), "{url}: {told}");
        let told = redaction.redact_path(&path);
        prop_assert!(!told.contains(&secret), "{path}: {told}");
    }

    #[test]
    fn no_path_panics(url in "[/*a;%2fFkB:@.]{0,24}", moved in "(/[ab]){0,6}", kept in 0..9_usize) {
        let mut redaction = Redaction::default();
        redaction.add_paths(["/a/*", "/*/b"].map(str::to_owned));
        redaction.redact_header("referer", &url);
        redaction.redact_path(&url);
        redaction.redact_moved(&url, &moved, kept);
    }

    #[test]
    fn a_query_without_redacted_names_is_kept_byte_for_byte(query in any::<String>()) {
        prop_assert_eq!(Redaction::new::<&str>([], []).redact_query(&query), query);
    }

    #[test]
    fn a_url_without_secrets_is_kept_byte_for_byte(url in "[a-z:/?#=&.]{0,24}") {
        prop_assert_eq!(Redaction::new::<&str>([], []).redact_url(&url), url);
    }
}
