//! What other proxies call what the file has under another name, for suggestions alone. Decides nothing.

/// Each with what it may be here, nearest first. Letters and digits alone, in lower case: `proxy_read_timeout` and `proxyReadTimeout` are one.
const WORDS: &[(&str, &[&str])] = &[
    // Sections.
    ("accesslog", &["access_log", "telemetry"]),
    ("backends", &["endpoints", "upstreams"]),
    ("clusters", &["upstreams"]),
    ("entrypoints", &["listeners"]),
    ("frontend", &["listeners"]),
    ("frontends", &["listeners"]),
    ("locations", &["routes"]),
    ("log", &["log", "telemetry"]),
    ("logging", &["log", "telemetry"]),
    ("routers", &["routes"]),
    ("virtualhosts", &["routes"]),
    // Listeners.
    ("bind", &["address", "listen"]),
    ("clientmaxbodysize", &["max_body", "limits"]),
    ("maxbodysize", &["max_body"]),
    ("maxconn", &["max_connections"]),
    ("realip", &["client_ip"]),
    ("setrealipfrom", &["trusted_proxies", "client_ip"]),
    ("trustedips", &["trusted_proxies"]),
    ("trustedproxies", &["client_ip", "listeners"]),
    ("cert", &["certificates"]),
    ("sslcertificate", &["certificates", "tls"]),
    ("tlsv12", &["1.2"]),
    ("tlsv13", &["1.3"]),
    // Upstreams.
    ("balance", &["load_balancing"]),
    ("failtimeout", &["outlier_detection"]),
    ("grpc", &["http2"]),
    ("h2", &["http2"]),
    ("h2c", &["http2"]),
    ("healthchecks", &["health"]),
    ("httpchk", &["health"]),
    ("iphash", &["ring_hash"]),
    ("keepalive", &["keep_alive", "idle_timeout"]),
    ("keepalivetimeout", &["keep_alive", "idle_timeout"]),
    ("lbpolicy", &["load_balancing"]),
    ("leastconn", &["least_request"]),
    ("maxfails", &["outlier_detection"]),
    ("maxretries", &["attempts"]),
    ("numretries", &["attempts"]),
    ("proxyconnecttimeout", &["connect_timeout"]),
    ("proxynextupstream", &["retries"]),
    ("proxyreadtimeout", &["timeout"]),
    ("proxysendtimeout", &["timeout"]),
    ("readtimeout", &["timeout"]),
    ("requesttimeout", &["timeout"]),
    ("responsetimeout", &["timeout"]),
    ("retrypolicy", &["retries"]),
    ("sendtimeout", &["timeout"]),
    ("servers", &["endpoints", "upstreams", "listeners"]),
    ("targets", &["endpoints"]),
    ("url", &["urls", "endpoints"]),
    ("urls", &["endpoints"]),
    // Routes.
    ("backend", &["upstream"]),
    ("cluster", &["upstream"]),
    ("directresponse", &["reply"]),
    ("host", &["match", "endpoints", "address"]),
    ("hosts", &["host", "match", "endpoints"]),
    ("location", &["match"]),
    ("methods", &["match"]),
    ("path", &["match"]),
    ("pathprefix", &["path", "match"]),
    ("prefix", &["path_prefix", "path", "match"]),
    ("proxypass", &["upstream"]),
    ("return", &["reply"]),
    ("service", &["upstream"]),
    ("uri", &["path"]),
    // Limits.
    ("average", &["limit"]),
    ("key", &["by", "certificates"]),
    ("limitreq", &["rate_limits"]),
    ("maxtokens", &["burst"]),
    ("rate", &["limit"]),
    ("requestsperunit", &["limit"]),
    // The process.
    ("draintimeout", &["drain"]),
    ("graceperiod", &["drain", "shutdown"]),
    ("port", &["address"]),
    ("threads", &["lanes", "runtime"]),
    ("workerprocesses", &["lanes", "runtime"]),
    ("workers", &["lanes", "runtime"]),
];

/// The word of `known` that stands for `word` of another proxy, or is it but for case and what parts its words.
pub(super) fn meant<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    let word = letters(word);
    let other_case = known.iter().find(|known| letters(known) == word);
    let (_, ours) = WORDS
        .iter()
        .find(|(theirs, _)| *theirs == word)
        .unwrap_or(&("", &[]));
    let named = ours
        .iter()
        .find_map(|ours| known.iter().find(|known| *known == ours));
    other_case.or(named).copied().filter(|_| !word.is_empty())
}

fn letters(word: &str) -> String {
    let letters = word.chars().filter(|char| char.is_alphanumeric());
    letters.flat_map(char::to_lowercase).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_spelt_as_they_are_looked_for_and_stand_once() {
        for (at, (word, ours)) in WORDS.iter().enumerate() {
            assert_eq!(letters(word), *word);
            assert!(!ours.is_empty());
            assert!(
                !WORDS[..at].iter().any(|(other, _)| other == word),
                "{word}"
            );
        }
    }

    #[test]
    fn what_is_meant_is_what_is_known_there() {
        let upstream = ["endpoints", "connect_timeout", "timeout", "idle_timeout"];
        for (word, expected) in [
            ("proxy_read_timeout", Some("timeout")),
            ("readTimeout", Some("timeout")),
            ("connectTimeout", Some("connect_timeout")),
            ("Timeout", Some("timeout")),
            ("keepalive", Some("idle_timeout")),
            ("max_fails", None),
            ("", None),
            ("ü", None),
        ] {
            assert_eq!(meant(word, &upstream), expected, "{word}");
        }
        assert_eq!(meant("WARN", &["warn", "error"]), Some("warn"));
        assert_eq!(meant("HTTP/2", &["http1", "http2"]), Some("http2"));
        assert_eq!(meant("--", &["by"]), None);
    }
}
