//! Upstreams that cannot be reached: what the client is told, what the log says, and that the client's connection lives on.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use super::harness::process::{Running, file};
use super::harness::raw::{self, Silent, scripted};
use super::harness::{Lane, ok};
use socket2::{Domain, Socket, Type};
use weir::clock::now;

/// A socket that nobody listens at, kept so that no one else gets its port.
fn closed() -> (Socket, SocketAddr) {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    let loopback = SocketAddr::from(([127, 0, 0, 1], 0));
    socket.bind(&loopback.into()).unwrap();
    let address = socket.local_addr().unwrap().as_socket().unwrap();
    (socket, address)
}

/// A lane before this endpoint, as the file names it, with `settings` of the upstream.
fn lane(endpoint: &str, settings: &str) -> Lane {
    Lane::start(&format!(
        "listen: 127.0.0.1:0\nupstreams: {{app: {{endpoints: ['{endpoint}'], {settings}}}}}\n"
    ))
}

#[test]
fn a_client_is_told_what_keeps_an_upstream_from_being_reached() {
    let (_kept, refused) = closed();
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("missing.sock");
    let going = scripted(|mut stream| drop(raw::read_head(&mut stream)));
    // A label may have 63 bytes, so that no server is asked.
    let nobody = "x".repeat(64);
    for (endpoint, settings, error) in [
        (
            format!("http://{refused}"),
            "protocol: http1",
            "connection_refused",
        ),
        (
            format!("http://{refused}"),
            "protocol: http2",
            "connection_refused",
        ),
        (
            format!("unix:{}", missing.display()),
            "protocol: http1",
            "destination_unavailable",
        ),
        (
            format!("http://{nobody}:80"),
            "protocol: http1",
            "dns_error",
        ),
        // No one listens at a group.
        (
            "http://224.0.0.1:80".to_owned(),
            "protocol: http1",
            "destination_ip_unroutable",
        ),
        (
            format!("http://{going}"),
            "protocol: http2",
            "connection_terminated",
        ),
    ] {
        let reply = lane(&endpoint, settings).connect().get("/");
        let status = format!("weir; error={error}; details=\"connect_failed\"");
        assert_eq!(
            (reply.status, reply.field("proxy-status")),
            (502, Some(&*status)),
            "{endpoint}, {settings}"
        );
    }
}

#[test]
fn the_log_says_once_that_an_endpoint_cannot_be_reached_and_once_that_it_is_again() {
    for protocol in ["http1", "http2"] {
        let (socket, address) = closed();
        let config = file(&format!(
            "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\n\
             upstreams: {{app: {{endpoints: ['http://{address}'], protocol: {protocol}, timeout: 60s, connect_timeout: 60s}}}}\n"
        ));
        let weir = Running::start(config.path());
        for _ in 0..5 {
            assert_eq!(weir.client().get("/").status, 502);
        }
        socket.listen(16).unwrap();
        let listener = TcpListener::from(socket);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                // As much of either version as a client waits for.
                let preface = b"\0\0\0\x04\0\0\0\0\0";
                let answer = match protocol {
                    "http1" => {
                        raw::read_head(&mut stream);
                        ok("back").into_bytes()
                    }
                    _ => preface.to_vec(),
                };
                let _ = stream.write_all(&answer);
                thread::spawn(move || stream.read_to_end(&mut Vec::new()));
            }
        });
        // By HTTP/2 it waits for more.
        let mut client = weir.client();
        client.begin("GET", "/", &[], "");
        let said = weir.log_until("endpoint ");
        for part in [
            " WARN ",
            "cannot be reached",
            &address.to_string(),
            "app",
            "Connection refused (os error 111)",
        ] {
            assert!(said.contains(part), "{part}: {said}");
        }
        let next = weir.log_until("endpoint ");
        for part in [" INFO ", "is reached again", &address.to_string()] {
            assert!(next.contains(part), "{part}: {next}");
        }
        if protocol == "http1" {
            assert_eq!(client.finish().status, 200);
        }
    }
}

#[test]
fn the_client_s_connection_outlives_an_upstream_that_does_not_answer() {
    let (_kept, refused) = closed();
    let (full, crowded) = closed();
    full.listen(0).unwrap();
    let mut waiting = Vec::new();
    while let Ok(stream) = TcpStream::connect_timeout(&crowded, Duration::from_millis(300)) {
        waiting.push(stream);
    }
    let silent = scripted(|mut stream| drop(stream.read_to_end(&mut Vec::new())));
    let going = scripted(|mut stream| drop(raw::read_head(&mut stream)));
    let cut = scripted(|mut stream| {
        raw::read_head(&mut stream);
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Le");
    });
    let plain = scripted(|mut stream| {
        let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n");
        let _ = stream.read_to_end(&mut Vec::new());
    });
    let reply = |status, reason| (status, reason);
    let (failed, timed_out) = (reply(502, "connect_failed"), reply(504, "connect_timeout"));
    let (not_tls, broken) = (
        reply(502, "upstream_not_tls"),
        reply(502, "upstream_broken"),
    );
    for (endpoint, protocol, (status, reason)) in [
        (format!("http://{refused}"), "http1", failed),
        (format!("http://{refused}"), "http2", failed),
        (format!("https://{refused}"), "auto", failed),
        (format!("http://{crowded}"), "http1", timed_out),
        (format!("http://{silent}"), "http2", timed_out),
        (format!("https://{plain}"), "http1", not_tls),
        (format!("https://{plain}"), "auto", not_tls),
        (
            format!("http://{silent}"),
            "http1",
            reply(504, "upstream_timeout"),
        ),
        (format!("http://{going}"), "http1", broken),
        (format!("http://{cut}"), "http1", broken),
    ] {
        // What is not to be over is long.
        let (connect, timeout) = match reason {
            "connect_timeout" => ("200ms", "60s"),
            "upstream_timeout" => ("60s", "200ms"),
            _ => ("60s", "60s"),
        };
        let config = file(&format!(
            "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\nruntime: {{lanes: 1}}\n\
             upstreams: {{app: {{endpoints: ['{endpoint}'], protocol: {protocol}, connect_timeout: {connect}, timeout: {timeout}}}}}\n"
        ));
        let weir = Running::start(config.path());
        let mut client = weir.client();
        let name = format!("{endpoint}, {protocol}, {reason}");
        for method in ["GET", "HEAD", "DELETE"] {
            client.begin(method, "/", &[], "");
            let reply = match method {
                "HEAD" => client.finish_head(),
                _ => client.finish(),
            };
            assert_eq!(reply.status, status, "{name}: {reply:?}");
            let told = reply.field("proxy-status").unwrap();
            assert!(told.ends_with(&format!("\"{reason}\"")), "{name}: {told}");
            assert_eq!(reply.field("connection"), None, "{name}: {method}");
        }
        // A short body that never set out is read away; what is sent of one could not be told from a next request.
        let read_away =
            protocol == "http1" && [failed, timed_out, not_tls].contains(&(status, reason));
        let reply = client.send("POST", "/", &[], "body");
        let close = (!read_away).then_some("close");
        assert_eq!(reply.field("connection"), close, "{name}");
        if read_away {
            assert_eq!(client.get("/").status, status, "{name}");
        }
        let asks = ["Connection: close"];
        let reply = weir.client().send("GET", "/", &asks, "");
        assert_eq!(reply.field("connection"), Some("close"), "{name}");
    }
}

#[test]
fn the_log_says_why_a_response_is_refused() {
    let address = scripted(|mut stream| {
        while raw::read_head(&mut stream).is_some() {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nA : 1\r\n\r\n");
        }
    });
    let config = file(&format!(
        "listen: 127.0.0.1:0\nupstream: 'http://{address}'\nadmin: {{address: '127.0.0.1:0'}}\n"
    ));
    let weir = Running::start(config.path());
    assert_eq!(weir.client().get("/").status, 502);
    let line = weir.log_until("a response was refused");
    let why = "why=a field name is malformed, or white space stands before its colon";
    for part in [&address.to_string(), why] {
        assert!(line.contains(part), "{part}: {line}");
    }
}

#[test]
fn all_who_wait_for_one_connection_hear_that_there_is_none() {
    let silent = Silent::new();
    for protocol in ["http1", "http2"] {
        let config = file(&format!(
            "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\nruntime: {{lanes: 1}}\n\
             upstreams: {{app: {{endpoints: ['http://{}'], protocol: {protocol}, connect_timeout: 3s}}}}\n",
            silent.address
        ));
        let weir = Running::start(config.path());
        let mut clients: Vec<_> = (0..4).map(|_| weir.client()).collect();
        // Of the first: others may join it late, and hear no later.
        let began = now();
        for client in &mut clients {
            client.begin("GET", "/", &[], "");
        }
        for client in &mut clients {
            assert_eq!(client.finish().status, 504);
            let took = began.elapsed();
            let bounds = Duration::from_millis(2_900)..Duration::from_millis(5_500);
            assert!(bounds.contains(&took), "{protocol}: {took:?}");
        }
        // Who comes later tries for itself.
        let (began, status) = (now(), weir.client().get("/").status);
        assert_eq!(status, 504);
        assert!(began.elapsed() > Duration::from_millis(2_900));
    }
}
