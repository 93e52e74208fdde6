//! What a limit charges, and tells, of a request that another limit, or another policy, refuses.

use std::net::SocketAddr;

use socket2::{Domain, Socket, Type};

use super::harness;
use super::harness::versions::{self, Version, field, run};
use super::harness::{DEADLINE, Lane, Store, Upstream, eventually_within};

crate::on_each_store!(
    what_another_policy_refuses_costs_no_quota,
    what_never_set_out_costs_no_quota,
    a_limit_has_admitted_what_no_other_refuses,
    a_refusal_tells_what_is_left_of_limits_that_did_not_refuse,
);

/// Longer than a test takes: what is counted in a window of the clock begins anew with the next hour.
fn period(algorithm: &str) -> &'static str {
    match algorithm {
        "fixed_window" => "year",
        _ => "h",
    }
}

fn what_another_policy_refuses_costs_no_quota(store: Store) {
    let upstream = Upstream::replying(|head| {
        let user = head.split(' ').nth(1).unwrap().strip_prefix("/in/");
        let field = user.map(|user| format!("X-Weir-Session-Start: {{\"user\": \"{user}\"}}\r\n"));
        let field = field.unwrap_or_default();
        format!("HTTP/1.1 200 OK\r\n{field}Content-Length: 0\r\n\r\n")
    });
    // Kept, so that no other test gets its port.
    let closed = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    let loopback = SocketAddr::from(([127, 0, 0, 1], 0));
    closed.bind(&loopback.into()).unwrap();
    let gone = closed.local_addr().unwrap().as_socket().unwrap();
    for algorithm in ["token_bucket", "sliding_window", "fixed_window"] {
        let per = period(algorithm);
        let lane = Lane::start(&format!(
            "listeners: [{{address: '127.0.0.1:0'}}]\n\
             upstreams:\n  app: {{endpoints: ['{}'], trust_session_headers: true}}\n  gone: {{endpoints: ['http://{gone}'], circuit_breaker: b}}\n\
             circuit_breakers: {{b: {{scope: local, window: {{type: count, size: 2}}, minimum_calls: 2}}}}\n\
             sessions: {{web: {{cookie: {{secure: false}}}}}}\n\
             rate_limits:\n  all: {{limit: 8/{per}, algorithm: {algorithm}, by: constant}}\n  each: {{limit: 1/{per}, algorithm: {algorithm}, by: session.user}}\n  \
             broken: {{limit: 8/{per}, algorithm: {algorithm}, by: constant}}\n  seen: {{limit: 8/{per}, algorithm: {algorithm}, by: constant, mode: shadow}}\n  tries: {{limit: 3/{per}, algorithm: {algorithm}, by: client.ip}}\n\
             routes:\n- {{match: {{path: /in/*}}, upstream: app, session: {{use: web, require: false}}}}\n\
             - {{match: {{path: /gone}}, upstream: gone, rate_limits: [broken, seen]}}\n\
             - {{match: {{path: /broken}}, upstream: app, rate_limits: [broken]}}\n\
             - {{match: {{path: /tried}}, upstream: app, session: {{use: web}}, rate_limits: [tries]}}\n\
             - {{upstream: app, session: {{use: web}}, rate_limits: [all, each]}}\n{}",
            upstream.url(),
            store.block()
        ));
        let asks = |path: &str, cookie: &str| lane.connect().send("GET", path, &[cookie], "");
        let session = |user: &str| {
            let set = asks(&format!("/in/{user}"), "X-A: b");
            let cookie = set.field("set-cookie").unwrap();
            format!("Cookie: {}", cookie.split(';').next().unwrap())
        };
        let sessions = ["ann", "bob", "cy", "dee"].map(session);
        let status = |path: &str, cookie: &str| asks(path, cookie).status;
        // By a limit of the session's, by the want of a session,
        assert_eq!(status("/", &sessions[0]), 200, "{algorithm}");
        for _ in 0..10 {
            assert_eq!(status("/", &sessions[0]), 429, "{algorithm}");
            assert_eq!(status("/", "X-A: b"), 401, "{algorithm}");
        }
        for cookie in &sessions[1..] {
            assert_eq!(status("/", cookie), 200, "{algorithm}");
        }
        // by a breaker. The two that tripped it were sent, or tried.
        assert_eq!([(); 2].map(|()| status("/gone", "X-A: b")), [502; 2]);
        for _ in 0..10 {
            assert_eq!(status("/gone", "X-A: b"), 503, "{algorithm}");
        }
        // One that only counts decides as it would.
        let shadow = "weir_limit_decisions_total{limit=\"seen\",decision=\"shadow_refused\"}";
        assert_eq!(lane.told(shadow), Some(0.0), "{algorithm}");
        for _ in 0..6 {
            assert_eq!(status("/broken", "X-A: b"), 200, "{algorithm}");
        }
        assert_eq!(status("/broken", "X-A: b"), 429, "{algorithm}");
        // A limit that tells clients apart bounds how often one can try.
        let tried = [(); 4].map(|()| status("/tried", "X-A: b"));
        assert_eq!(tried, [401, 401, 401, 429], "{algorithm}");
    }
}

fn what_never_set_out_costs_no_quota(store: Store) {
    for algorithm in ["token_bucket", "sliding_window", "fixed_window"] {
        for version in [Version::One, Version::Two] {
            let per = period(algorithm);
            let (held, app) = (Upstream::held(), Upstream::answering(""));
            let lane = Lane::start(&format!(
                "listen: 127.0.0.1:0\nupstreams:\n  app: {{endpoints: ['{}']}}\n\
                 \x20 held: {{endpoints: ['{}'], concurrency: {{max: 1, pending: 0}}}}\n\
                 \x20 down: {{endpoints: ['http://127.0.0.1:1', 'http://127.0.0.2:1'], panic_threshold: 0%, \
                 health: {{path: /, interval: 20ms, unhealthy_after: 1}}}}\n\
                 rate_limits: {{all: {{limit: 4/{per}, algorithm: {algorithm}, by: constant}}}}\n\
                 routes:\n- {{match: {{path: /held}}, upstream: held, rate_limits: [all]}}\n\
                 - {{match: {{path: /down}}, upstream: down, rate_limits: [all]}}\n- {{upstream: app, rate_limits: [all]}}\n{}",
                app.url(),
                held.url(),
                store.block()
            ));
            eventually_within(DEADLINE, || {
                let plan = lane.plan.borrow();
                let mut upstreams = plan.upstreams.iter();
                let down = upstreams.find(|it| it.name == "down").unwrap();
                down.live.counts().up == 0
            });
            let mut first = lane.connect();
            first.begin("GET", "/held", &[], "");
            held.wait_for_request();
            let asked = format!("{algorithm}, {version:?}");
            let check = |path: &str, reason: &str| {
                let answer = run(async {
                    let mut client = versions::Client::connect(version, lane.address).await;
                    client.get(path).await.answer().await
                });
                let told = field(&answer.fields, "proxy-status").unwrap_or_default();
                assert!(told.contains(reason), "{asked}: {:?}", answer.fields);
            };
            for _ in 0..6 {
                check("/held", "overloaded");
                check("/down", "no_endpoint");
            }
            held.answer("");
            assert_eq!(first.finish().status, 200);
            let left = [(); 4].map(|()| lane.connect().get("/").status);
            assert_eq!(left, [200, 200, 200, 429], "{asked}");
        }
    }
}

fn a_limit_has_admitted_what_no_other_refuses(store: Store) {
    let upstream = Upstream::replying(|head| {
        let begins = head.starts_with("GET /in ");
        let field = "X-Weir-Session-Start: {\"user\": \"ann\"}\r\n";
        let field = if begins { field } else { "" };
        format!("HTTP/1.1 200 OK\r\n{field}Content-Length: 0\r\n\r\n")
    });
    let lane = Lane::start(&format!(
        "listen: 127.0.0.1:0\nupstreams: {{app: {{endpoints: ['{}'], trust_session_headers: true}}}}\n\
         sessions: {{web: {{cookie: {{secure: false}}}}}}\n\
         rate_limits:\n  wide: {{limit: 90/h, by: constant, near_limit: 1%}}\n  slots: {{limit: 9, by: constant, algorithm: concurrency}}\n  \
         here: {{limit: 1/h, by: constant, accuracy: local}}\n  each: {{limit: 1/h, by: session.user}}\n  tries: {{limit: 9/h, by: client.ip}}\n\
         routes:\n- {{match: {{path: /in}}, upstream: app, session: {{use: web, require: false}}}}\n\
         - {{match: {{path: /here}}, upstream: app, rate_limits: [wide, slots, here]}}\n\
         - {{upstream: app, session: {{use: web}}, rate_limits: [wide, tries, each]}}\n{}",
        upstream.url(),
        store.block()
    ));
    let set = lane.connect().get("/in");
    let cookie = set.field("set-cookie").unwrap().split(';').next().unwrap();
    let cookie = format!("Cookie: {cookie}");
    let told = |limit: &str, decision: &str| {
        let of = format!("limit=\"{limit}\",decision=\"{decision}\"");
        lane.told(&format!("weir_limit_decisions_total{{{of}}}"))
    };
    let check = |limit: &str, admitted, refused| {
        let counts = (told(limit, "admitted"), told(limit, "refused"));
        assert_eq!(counts, (Some(admitted), Some(refused)), "{limit}");
    };
    let status = |path: &str, cookie: &str| lane.connect().send("GET", path, &[cookie], "").status;
    assert_eq!([(); 3].map(|()| status("/here", &cookie)), [200, 429, 429]);
    check("wide", 1.0, 0.0);
    check("slots", 1.0, 0.0);
    check("here", 1.0, 2.0);
    assert_eq!([(); 3].map(|()| status("/", &cookie)), [200, 429, 429]);
    check("wide", 2.0, 0.0);
    check("tries", 1.0, 0.0);
    check("each", 1.0, 2.0);
    // Without a session it has counted all the same.
    assert_eq!(status("/", "X-A: b"), 401);
    check("wide", 2.0, 0.0);
    check("tries", 2.0, 0.0);
    assert_eq!(told("wide", "near_limit"), Some(2.0));
}

fn a_refusal_tells_what_is_left_of_limits_that_did_not_refuse(store: Store) {
    let upstream = Upstream::replying(|head| {
        let begins = head.starts_with("GET /in ");
        let field = "X-Weir-Session-Start: {\"user\": \"ann\"}\r\n";
        let field = if begins { field } else { "" };
        format!("HTTP/1.1 200 OK\r\n{field}Content-Length: 0\r\n\r\n")
    });
    let accuracies: &[&str] = match store {
        Store::Memory => &["local"],
        Store::Redis => &["lease", "strict", "local"],
    };
    // What a refusal puts back is told of while it can be spent, which is to be for longer than the test takes.
    let leases = match store {
        Store::Memory => "",
        Store::Redis => "rate_limit_defaults: {lease: {ttl: 10s}}\n",
    };
    for accuracy in accuracies {
        // What is asked first, or last, is on its own ground where one limit alone is shared.
        for other in [accuracy, "local"] {
            let limit = |settings: &str, accuracy: &str| match store {
                Store::Memory => format!("{{{settings}}}"),
                Store::Redis => format!("{{{settings}, accuracy: {accuracy}}}"),
            };
            // Slots have no lease.
            let of_slots = if *accuracy == "local" {
                "local"
            } else {
                "strict"
            };
            let lane = Lane::start(&format!(
                "listen: 127.0.0.1:0\nupstreams: {{app: {{endpoints: ['{}'], trust_session_headers: true}}}}\n\
                 sessions: {{web: {{cookie: {{secure: false}}}}}}\n\
                 rate_limits:\n  a: {}\n  b: {}\n  c: {}\n  d: {}\n  e: {}\nroutes:\n\
                 - {{match: {{path: /in}}, upstream: app, session: {{use: web, require: false}}}}\n\
                 - {{match: {{path: /mine}}, upstream: app, session: {{use: web}}, rate_limits: [a, d, e]}}\n\
                 - {{upstream: app, rate_limits: [a, b, c]}}\n{leases}{}",
                upstream.url(),
                limit(
                    "limit: 100/h, by: constant, cost: {header: x-cost}",
                    accuracy
                ),
                limit("limit: 1/h, by: constant", other),
                limit("limit: 5, by: constant, algorithm: concurrency", of_slots),
                limit(
                    "limit: 9/year, by: constant, algorithm: fixed_window",
                    other
                ),
                limit("limit: 1/h, by: session.user", other),
                store.block()
            ));
            let set = lane.connect().get("/in");
            let cookie = set.field("set-cookie").unwrap().split(';').next().unwrap();
            let cookie = format!("Cookie: {cookie}");
            let ask = |path: &str| {
                let reply = lane
                    .connect()
                    .send("GET", path, &["X-Cost: 30", &cookie], "");
                let told = reply.field("ratelimit").unwrap().split(", ");
                let left = |told: &str| {
                    let (name, rest) = told.split_once(";r=").unwrap();
                    format!("{name} {}", rest.split(';').next().unwrap())
                };
                (reply.status, told.map(left).collect::<Vec<_>>().join(", "))
            };
            let check = |path: &str, status: u16, left: &str| {
                let told = (status, left.to_owned());
                assert_eq!(ask(path), told, "{path}, {accuracy} beside {other}");
            };
            let shared = |of: &str| store == Store::Redis && of != "local";
            let order = |names: &[(&str, &str, u64)]| {
                // Shared ones are asked first.
                let mut names = names.to_vec();
                names.sort_by_key(|(_, of, _)| !shared(of));
                let told = names
                    .iter()
                    .map(|(name, _, left)| format!("\"{name}\" {left}"));
                told.collect::<Vec<_>>().join(", ")
            };
            let of_all = |a, b, c: Option<u64>| {
                let c = c.map(|c| ("c", of_slots, c));
                let all = [("a", *accuracy, a), ("b", other, b)];
                order(&all.into_iter().chain(c).collect::<Vec<_>>())
            };
            check("/", 200, &of_all(70, 0, Some(4)));
            // Nor is it asked of anything where this process refuses.
            let is_here = shared(accuracy) && !shared(other);
            let refused = |c| match is_here {
                true => "\"b\" 0".to_owned(),
                false => of_all(70, 0, c),
            };
            check("/", 429, &refused(Some(5)));
            // Redis is not asked for a slot once a lease is known to refuse, which it is for a second at least.
            let free = (!shared(other)).then_some(5);
            let [known, forgotten] = [free, Some(5)].map(|c| (429, refused(c)));
            harness::eventually(|| {
                let told = ask("/");
                let either = told == known || told == forgotten;
                assert!(either, "{told:?}, {accuracy} beside {other}");
                told == known
            });
            let of_mine = |a, d, e| {
                format!(
                    "{}, \"e\" {e}",
                    order(&[("a", *accuracy, a), ("d", other, d)])
                )
            };
            check("/mine", 200, &of_mine(40, 8, 0));
            check("/mine", 429, &of_mine(40, 8, 0));
            check("/mine", 429, &of_mine(40, 8, 0));
        }
    }
}
