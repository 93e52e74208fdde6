//! What is in a message arrives, whatever carries it.

use std::io::{Read, Write};
use std::net::TcpStream;

use super::harness::at_once;
use super::harness::raw;
use super::harness::raw::End;
use super::harness::versions::{
    Client, Incoming, Length, Origin, Outgoing, Version, field, is_quiet, run,
};
use super::{World, on_each_pairing};

/// What no upstream may hear from a client, behind a body neither.
const NEVER_UP: [&str; 15] = [
    "trailer",
    "x-forwarded-for",
    "x-forwarded-proto",
    "x-forwarded-prefix",
    "x-original-url",
    "x-real-ip",
    "x-request-id",
    "forwarded",
    "x-auth-user",
    "x_auth_user",
    "x-weir-session-end",
    "authorization",
    "content-length",
    "content_length",
    "expect",
];

#[test]
fn a_request_without_a_body_and_its_response_arrive() {
    on_each_pairing(async |mut world| {
        for method in ["GET", "DELETE", "OPTIONS", "POST"] {
            let call = world
                .client
                .call(method, "/a%20b?c=d&e", &[("x-a", "1")], Length::None);
            let call = call.await;
            let mut asked = world.origin.asked().await;
            assert_eq!((&*asked.method, &*asked.path), (method, "/a%20b?c=d&e"));
            assert_eq!(asked.host, "test");
            assert_eq!(field(&asked.fields, "x-a"), Some("1"));
            assert_eq!(field(&asked.fields, "x-forwarded-for"), Some("127.0.0.1"));
            assert_eq!(field(&asked.fields, "transfer-encoding"), None);
            assert!(field(&asked.fields, "x-request-id").is_some());
            assert_eq!(asked.body.rest().await, Ok((Vec::new(), Vec::new())));
            let mut out = asked.reply(200, &[("x-b", "2")], Length::Known(5)).await;
            out.finish(b"hello").await.unwrap();
            let mut answer = call.answer().await;
            assert_eq!(answer.status, 200);
            assert_eq!(field(&answer.fields, "x-b"), Some("2"));
            assert_eq!(field(&answer.fields, "content-length"), Some("5"));
            assert_eq!(field(&answer.fields, "transfer-encoding"), None);
            assert_eq!(
                answer.body.rest().await,
                Ok((b"hello".to_vec(), Vec::new()))
            );
        }
    });
}

#[test]
fn a_body_arrives_however_long_it_is_said_to_be() {
    on_each_pairing(async |mut world| {
        for (length, parts) in [
            (Length::Known(0), &[][..]),
            (Length::Unknown, &[]),
            (Length::Known(6), &["abcdef"]),
            (Length::Known(6), &["abc", "def"]),
            (Length::Unknown, &["abcdef"]),
            (Length::Unknown, &["a", "bcdef"]),
        ] {
            let mut call = world.client.call("POST", "/", &[], length).await;
            for part in parts {
                call.body.send(part.as_bytes()).await.unwrap();
            }
            call.body.end(&[]).await.unwrap();
            let mut asked = world.origin.asked().await;
            let body = parts.concat();
            assert_eq!(asked.body.rest().await.unwrap().0, body.as_bytes());
            let said = field(&asked.fields, "content-length");
            match length {
                Length::Known(length) => assert_eq!(said, Some(&*length.to_string())),
                Length::None | Length::Unknown => assert_eq!(said, None),
            }
            let mut out = asked.reply(201, &[], length).await;
            for part in parts {
                out.send(part.as_bytes()).await.unwrap();
            }
            out.end(&[]).await.unwrap();
            assert_eq!(call.whole().await, (201, body), "{length:?}");
        }
    });
}

#[test]
fn a_response_without_a_body_has_none() {
    on_each_pairing(async |mut world| {
        let length = [("content-length", "5"), ("etag", "\"x\"")];
        for (method, status, fields, said) in [
            ("HEAD", 200, &length[..], Some("5")),
            ("HEAD", 404, &length[1..], None),
            ("GET", 204, &[], None),
            ("POST", 204, &[], None),
            ("GET", 304, &length, Some("5")),
            ("GET", 304, &length[1..], None),
            ("GET", 200, &[], Some("0")),
        ] {
            let name = format!("{method} {status}");
            let call = world.client.call(method, "/", &[], Length::None).await;
            let mut asked = world.origin.asked().await;
            assert_eq!(asked.method, method);
            asked.reply(status, fields, Length::None).await;
            let mut answer = call.answer().await;
            assert_eq!(answer.status, status, "{name}");
            let length = field(&answer.fields, "content-length");
            // That its head is its end says enough over HTTP/2.
            if (world.asks, world.serves, status) != (Version::Two, Version::Two, 200)
                || said != Some("0")
            {
                assert_eq!(length, said, "{name}");
            }
            assert_eq!(field(&answer.fields, "transfer-encoding"), None, "{name}");
            assert_eq!(
                answer.body.rest().await,
                Ok((Vec::new(), Vec::new())),
                "{name}"
            );
        }
    });
}

#[test]
fn large_bodies_arrive_whole_both_ways_at_once() {
    on_each_pairing(async |mut world| {
        let body: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();
        for length in [Length::Known(body.len()), Length::Unknown] {
            let mut call = world.client.call("POST", "/", &[], length).await;
            let origin = &mut world.origin;
            let echo = async {
                let mut asked = origin.asked().await;
                let mut out = asked.reply(200, &[], length).await;
                while let Some(data) = asked.body.data().await.unwrap() {
                    out.send(&data).await.unwrap();
                }
                out.end(&[]).await.unwrap();
            };
            let mut up = std::mem::replace(&mut call.body, Outgoing::Ended);
            let upload = async {
                up.finish(&body).await.unwrap();
                up
            };
            let download = async {
                let mut answer = call.answer().await;
                assert_eq!(answer.status, 200);
                answer.body.rest().await.unwrap().0
            };
            let ((), _up, came) = tokio::join!(echo, upload, download);
            assert!(
                came == body,
                "{length:?}: {} of {} bytes",
                came.len(),
                body.len()
            );
        }
    });
}

#[test]
fn trailers_arrive_but_for_those_that_decide() {
    on_each_pairing(async |mut world| {
        let mut fields = vec![("x-sum", "1"), ("x-sum", "2"), ("server-timing", "a")];
        fields.extend(NEVER_UP.map(|name| (name, "6")));
        // Receivers that pass a body on may leave out what it does not name (RFC 9110 section 6.6.2).
        let announced = [("trailer", "x-sum"), ("trailer", "server-timing, x-none")];
        let asks = [announced[0], ("te", "trailers"), announced[1]];
        let names = |fields: &[(String, String)]| -> Vec<String> {
            let named = fields.iter().filter(|(name, _)| name == "trailer");
            named.map(|(_, value)| value.clone()).collect()
        };
        let mut call = world.client.call("POST", "/", &asks, Length::Unknown).await;
        call.body.send(b"abc").await.unwrap();
        call.body.end(&fields).await.unwrap();
        let mut asked = world.origin.asked().await;
        assert_eq!(names(&asked.fields), announced.map(|(_, value)| value));
        let (body, mut trailers) = asked.body.rest().await.unwrap();
        trailers.sort();
        let arrived = [("server-timing", "a"), ("x-sum", "1"), ("x-sum", "2")];
        let arrived = arrived.map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!((&*body, &*trailers), (&b"abc"[..], &arrived[..]));
        let mut out = asked.reply(200, &announced, Length::Unknown).await;
        out.send(b"def").await.unwrap();
        let mut fields = vec![("x-sum", "1"), ("x-sum", "2"), ("server-timing", "a")];
        let never_down = [
            "content-length",
            "trailer",
            "set-cookie",
            "x-weir-session-start",
            "x-weir-session-end",
            "www-authenticate",
        ];
        fields.extend(never_down.map(|name| (name, "6")));
        out.end(&fields).await.unwrap();
        let mut answer = call.answer().await;
        assert_eq!(names(&answer.fields), announced.map(|(_, value)| value));
        let (body, mut trailers) = answer.body.rest().await.unwrap();
        trailers.sort();
        assert_eq!((&*body, &*trailers), (&b"def"[..], &arrived[..]));
    });
}

/// What a server of gRPC says behind its messages is for the application, whatever it is named.
#[test]
fn what_ends_a_call_arrives_but_for_what_is_of_the_hop_or_weir() {
    at_once([Version::One, Version::Two], |serves| {
        run(async {
            let mut world = World::new(Version::Two, serves).await;
            let asks = [("content-type", "application/grpc"), ("te", "trailers")];
            let call = world.client.call("POST", "/", &asks, Length::None).await;
            let mut asked = world.origin.asked().await;
            let mut out = asked.reply(200, &asks[..1], Length::Unknown).await;
            out.send(b"def").await.unwrap();
            let arrive = [
                "age",
                "date",
                "expires",
                "grpc-status",
                "location",
                "retry-after",
                "vary",
                "warning",
                "x-t",
            ];
            let never = [
                "content-length",
                "x-weir-session-start",
                "x-weir-session-end",
            ];
            let names = arrive.iter().chain(&never);
            let fields: Vec<_> = names.map(|name| (*name, "6")).collect();
            out.end(&fields).await.unwrap();
            let (_, mut trailers) = call.answer().await.body.rest().await.unwrap();
            trailers.sort();
            let names: Vec<_> = trailers.iter().map(|(name, _)| &**name).collect();
            assert_eq!(names, arrive, "{serves:?}");
        });
    });
}

#[test]
fn trailers_behind_no_body_arrive() {
    on_each_pairing(async |mut world| {
        let mut call = world.client.call("POST", "/", &[], Length::Unknown).await;
        call.body.end(&[("x-sum", "1")]).await.unwrap();
        let mut asked = world.origin.asked().await;
        let sum = vec![("x-sum".to_owned(), "1".to_owned())];
        assert_eq!(asked.body.rest().await, Ok((Vec::new(), sum.clone())));
        let mut out = asked.reply(200, &[], Length::Unknown).await;
        out.end(&[("x-sum", "1")]).await.unwrap();
        let mut answer = call.answer().await;
        assert_eq!(answer.body.rest().await, Ok((Vec::new(), sum)));
    });
}

#[test]
fn trailers_have_no_place_behind_a_length_of_http1() {
    on_each_pairing(async |mut world| {
        for sent in ["abc", ""] {
            let call = world.client.get("/").await;
            let mut asked = world.origin.asked().await;
            let mut out = asked.reply(200, &[], Length::Known(sent.len())).await;
            if !sent.is_empty() {
                out.send(sent.as_bytes()).await.unwrap();
            }
            out.end(&[("x-sum", "1")]).await.unwrap();
            let mut answer = call.answer().await;
            let (body, trailers) = answer.body.rest().await.unwrap();
            assert_eq!(body, sent.as_bytes());
            let both = (world.asks, world.serves) == (Version::Two, Version::Two);
            assert_eq!(trailers.len(), usize::from(both), "{sent:?}");
        }
    });
}

#[test]
fn interim_responses_arrive_but_for_100() {
    on_each_pairing(async |mut world| {
        let mut call = world.client.get("/").await;
        let mut asked = world.origin.asked().await;
        asked.interim(100, &[]).await;
        asked.interim(103, &[("link", "</a>; rel=preload")]).await;
        let (status, fields) = call.interim().await;
        assert_eq!(
            (status, field(&fields, "link")),
            (103, Some("</a>; rel=preload"))
        );
        asked
            .interim(
                103,
                &[("link", "</b>; rel=preload"), ("connection", "x")][..1],
            )
            .await;
        let (status, fields) = call.interim().await;
        assert_eq!(
            (status, field(&fields, "link")),
            (103, Some("</b>; rel=preload"))
        );
        asked.ok("done").await;
        assert_eq!(call.whole().await, (200, "done".to_owned()));
    });
}

#[test]
fn interim_responses_arrive_while_the_request_is_still_sent() {
    on_each_pairing(async |mut world| {
        for length in [Length::Known(6), Length::Unknown] {
            let mut call = world.client.call("POST", "/", &[], length).await;
            call.body.send(b"abc").await.unwrap();
            let mut asked = world.origin.asked().await;
            asked.body.expect(b"abc").await;
            for link in ["</a>; rel=preload", "</b>; rel=preload"] {
                asked.interim(100, &[]).await;
                asked.interim(103, &[("link", link)]).await;
                let (status, fields) = call.interim().await;
                assert_eq!((status, field(&fields, "link")), (103, Some(link)));
            }
            call.body.finish(b"def").await.unwrap();
            assert_eq!(asked.body.rest().await.unwrap().0, b"def");
            asked.interim(103, &[("link", "</c>")]).await;
            assert_eq!(call.interim().await.0, 103);
            asked.ok("done").await;
            assert_eq!(call.whole().await, (200, "done".to_owned()));
        }
    });
}

/// However many of them come before the request is whole.
#[test]
fn sixteen_interim_responses_arrive_and_no_more() {
    on_each_pairing(async |mut world| {
        let mut call = world.client.call("POST", "/", &[], Length::Known(6)).await;
        call.body.send(b"abc").await.unwrap();
        let mut asked = world.origin.asked().await;
        asked.body.expect(b"abc").await;
        for count in 1..=16 {
            asked.interim(103, &[]).await;
            assert_eq!(call.interim().await.0, 103);
            if count == 9 {
                call.body.finish(b"def").await.unwrap();
                asked.body.expect(b"def").await;
            }
        }
        asked.interim(103, &[]).await;
        assert!(is_quiet(call.interim()).await);
        asked.ok("done").await;
        assert_eq!(call.whole().await, (200, "done".to_owned()));
    });
}

#[test]
fn who_waits_for_100_is_told_by_weir() {
    on_each_pairing(async |mut world| {
        let expects = [("expect", "100-continue")];
        let mut call = world
            .client
            .call("POST", "/", &expects, Length::Known(3))
            .await;
        assert_eq!(call.interim().await.0, 100);
        call.body.finish(b"abc").await.unwrap();
        let mut asked = world.origin.asked().await;
        assert_eq!(field(&asked.fields, "expect"), None);
        assert_eq!(asked.body.rest().await.unwrap().0, b"abc");
        asked.ok("done").await;
        assert_eq!(call.whole().await, (200, "done".to_owned()));

        let call = world
            .client
            .call("POST", "/", &[("expect", "200-ok")], Length::Known(3))
            .await;
        assert_eq!(call.answer().await.status, 417);
    });
}

#[test]
fn cookies_are_one_field_and_set_cookies_are_many() {
    on_each_pairing(async |mut world| {
        let crumbs = [
            ("cookie", "a=1"),
            ("x-a", "1"),
            ("cookie", "b=2; c=3"),
            ("cookie", ""),
        ];
        // In HTTP/1.1 a client sends one (RFC 6265 section 5.4).
        let whole = [("cookie", "a=1; b=2; c=3")];
        let sent = match world.asks {
            Version::One => &whole[..],
            Version::Two => &crumbs,
        };
        let call = world.client.call("GET", "/", sent, Length::None).await;
        let mut asked = world.origin.asked().await;
        let cookies = asked.fields.iter().filter(|(name, _)| name == "cookie");
        let cookies: Vec<_> = cookies.map(|(_, value)| &**value).collect();
        assert_eq!(cookies, ["a=1; b=2; c=3"]);
        asked
            .reply(
                200,
                &[("set-cookie", "d=4"), ("set-cookie", "e=5")],
                Length::None,
            )
            .await;
        let answer = call.answer().await;
        let set = answer
            .fields
            .iter()
            .filter(|(name, _)| name == "set-cookie");
        assert_eq!(set.count(), 2);
    });
}

#[test]
fn fields_of_one_hop_stay_on_it() {
    on_each_pairing(async |mut world| {
        let ours = [
            ("connection", "x-hop"),
            ("x-hop", "1"),
            ("keep-alive", "5"),
            ("proxy-authorization", "x"),
        ];
        let sent = match world.asks {
            Version::One => &ours[..],
            Version::Two => &ours[3..],
        };
        let call = world.client.call("GET", "/", sent, Length::None).await;
        let mut asked = world.origin.asked().await;
        for (name, _) in ours {
            assert_eq!(field(&asked.fields, name), None, "{name}");
        }
        let theirs = [
            ("x-hop", "1"),
            ("keep-alive", "5"),
            ("proxy-authenticate", "x"),
        ];
        let sent = match world.serves {
            Version::One => &theirs[1..],
            Version::Two => &theirs[2..],
        };
        asked.reply(200, sent, Length::None).await;
        let answer = call.answer().await;
        for (name, _) in theirs {
            assert_eq!(field(&answer.fields, name), None, "{name}");
        }
        if world.asks == Version::Two {
            assert_eq!(field(&answer.fields, "connection"), None);
        }
    });
}

#[test]
fn a_host_and_an_authority_are_one() {
    on_each_pairing(async |mut world| {
        if world.asks == Version::One {
            return;
        }
        let call = world
            .client
            .call("GET", "/", &[("host", "TEST")], Length::None)
            .await;
        let mut asked = world.origin.asked().await;
        assert_eq!(asked.host, "test");
        let hosts = asked.fields.iter().filter(|(name, _)| name == "host");
        assert_eq!(hosts.count(), usize::from(world.serves == Version::One));
        asked.ok("done").await;
        assert_eq!(call.whole().await, (200, "done".to_owned()));
        for host in ["other", "test:80", "test.", ""] {
            let call = world
                .client
                .call("GET", "/", &[("host", host)], Length::None)
                .await;
            assert_eq!(call.answer().await.status, 400, "{host:?}");
        }
        assert!(world.origin.is_quiet().await);
    });
}

#[test]
fn bytes_that_some_parsers_refuse_in_a_target_arrive_or_are_refused() {
    on_each_pairing(async |mut world| {
        let call = world.client.get("/a;b=c/~d/:e@f?a={b}|c[d]'e'!$").await;
        let mut asked = world.origin.asked().await;
        assert_eq!(asked.path, "/a;b=c/~d/:e@f?a={b}|c[d]'e'!$");
        asked.ok("done").await;
        assert_eq!(call.whole().await.0, 200);
    });
}

/// HTTP/2 as `http` has it cannot carry them.
#[test]
fn bytes_that_belong_escaped_into_a_query_are_so_for_http2() {
    run(async {
        for (serves, path) in [
            (Version::One, "/x?q=<a>&\"b\"=%3c|\\^`"),
            (Version::Two, "/x?q=%3Ca%3E&%22b%22=%3c|\\^`"),
        ] {
            let mut world = World::new(Version::One, serves).await;
            let call = world.client.get("/x?q=<a>&\"b\"=%3c|\\^`").await;
            let mut asked = world.origin.asked().await;
            assert_eq!(asked.path, path);
            asked.ok("done").await;
            assert_eq!(call.whole().await.0, 200);
            // Escaped, it is longer than `http` takes.
            if serves == Version::Two {
                let long = format!("/x?{}", "<".repeat(30_000));
                let call = world.client.get(&long).await;
                assert_eq!(call.whole().await.0, 400);
                assert!(world.origin.is_quiet().await);
            }
        }
    });
}

#[test]
fn a_client_of_http_1_0_is_served_by_an_upstream_of_http2() {
    run(async {
        let mut world = World::new(Version::One, Version::Two).await;
        let address = world.lane.address;
        let ask = move |request: &'static str| {
            tokio::task::spawn_blocking(move || raw::send(address, request.as_bytes()))
        };
        let reply = ask("GET /a HTTP/1.0\r\n\r\n");
        let mut asked = world.origin.asked().await;
        assert_eq!(
            asked.host,
            world.origin.address.to_string(),
            "it names none"
        );
        asked.interim(103, &[]).await;
        asked.ok("hello").await;
        let reply = reply.await.unwrap();
        assert_eq!(
            (reply.status(), reply.end, reply.parts().1),
            (Some(200), End::Closed, "hello")
        );

        let reply = ask("POST /a HTTP/1.0\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc");
        let mut asked = world.origin.asked().await;
        assert_eq!(
            (&*asked.host, asked.body.rest().await.unwrap().0),
            ("x", b"abc".to_vec())
        );
        let mut out = asked.reply(200, &[], Length::Unknown).await;
        out.send(b"hel").await.unwrap();
        out.finish(b"lo").await.unwrap();
        let reply = reply.await.unwrap();
        assert_eq!(
            (reply.status(), reply.end, reply.parts().1),
            (Some(200), End::Closed, "hello")
        );
        assert!(!reply.text.to_lowercase().contains("chunked"), "{reply:?}");

        let (cut_off, begun) = tokio::sync::oneshot::channel();
        let reply = tokio::task::spawn_blocking(move || {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.write_all(b"GET /a HTTP/1.0\r\n\r\n").unwrap();
            let mut seen = Vec::new();
            while !seen.ends_with(b"hel") {
                let mut byte = [0];
                stream.read_exact(&mut byte).unwrap();
                seen.extend_from_slice(&byte);
            }
            cut_off.send(()).unwrap();
            raw::read_to_end(&mut stream).end
        });
        let mut asked = world.origin.asked().await;
        let mut out = asked.reply(200, &[], Length::Unknown).await;
        out.send(b"hel").await.unwrap();
        begun.await.unwrap();
        out.reset();
        assert_eq!(
            reply.await.unwrap(),
            End::Reset,
            "a close would say that it is whole"
        );
    });
}

/// Each was a frame of its own, however small.
#[test]
fn chunks_that_came_together_go_on_in_one_frame() {
    const CHUNKS: usize = 200;
    async fn one_frame(mut body: Incoming) {
        let mut frames = Vec::new();
        while let Some(data) = body.data().await.unwrap() {
            frames.push(data.len());
        }
        assert_eq!(frames.iter().sum::<usize>(), CHUNKS);
        // The kernel may part them.
        assert!(frames.len() <= 3, "{frames:?}");
    }
    let body = format!(
        "Transfer-Encoding: chunked\r\n\r\n{}0\r\n\r\n",
        "1\r\nx\r\n".repeat(CHUNKS)
    );
    run(async {
        let mut world = World::new(Version::One, Version::Two).await;
        let mut client = TcpStream::connect(world.lane.address).unwrap();
        let request = format!("POST / HTTP/1.1\r\nHost: x\r\n{body}");
        client.write_all(request.as_bytes()).unwrap();
        let asked = world.origin.asked().await;
        one_frame(asked.body).await;

        let response = format!("HTTP/1.1 200 OK\r\n{body}");
        let upstream = raw::scripted(move |mut stream| {
            let _ = raw::read_head(&mut stream);
            let _ = stream.write_all(response.as_bytes());
        });
        let lane = super::Lane::start(&format!(
            "{{listen: '127.0.0.1:0', upstream: 'http://{upstream}'}}"
        ));
        let mut client = Client::connect(Version::Two, lane.address).await;
        let answer = client.get("/").await.answer().await;
        one_frame(answer.body).await;
    });
}

/// It has no chunks, so that a close would say that the body is whole.
#[test]
fn a_response_that_weir_breaks_off_is_a_reset_for_a_client_of_http_1_0() {
    for serves in [Version::One, Version::Two] {
        run(async {
            let origin = Origin::start(serves).await;
            let idle = "timeouts: {stream_idle: 500ms}";
            let mut world = World::behind(idle, Version::One, serves, origin, "timeout: 5s").await;
            let address = world.lane.address;
            let reply = tokio::task::spawn_blocking(move || {
                let request = b"POST / HTTP/1.0\r\nHost: x\r\nContent-Length: 6\r\n\r\nabc";
                raw::send(address, request)
            });
            let mut asked = world.origin.asked().await;
            asked.body.expect(b"abc").await;
            let mut out = asked.reply(200, &[], Length::Unknown).await;
            out.send(b"hello").await.unwrap();
            // The rest of its body never comes.
            let reply = reply.await.unwrap();
            assert_eq!(reply.end, End::Reset, "{serves:?}: {reply:?}");
            assert_eq!(world.ended("body_timeout"), 1, "{serves:?}");
        });
    }
}

#[test]
fn a_client_of_http2_may_send_many_requests_at_once() {
    run(async {
        let mut origin = Origin::start(Version::One).await;
        let lane = super::Lane::start(&format!(
            "{{listen: '127.0.0.1:0', upstream: 'http://{}'}}",
            origin.address
        ));
        let mut client = Client::connect(Version::Two, lane.address).await;
        let mut calls = Vec::new();
        for n in 0..50 {
            calls.push((n, client.get(&format!("/{n}")).await));
        }
        let mut asked = Vec::new();
        for _ in 0..50 {
            asked.push(origin.asked().await);
        }
        for mut asked in asked.into_iter().rev() {
            let path = asked.path.clone();
            asked.ok(&path).await;
        }
        for (n, call) in calls {
            assert_eq!(call.whole().await, (200, format!("/{n}")));
        }
    });
}
