//! Other ways in than a plain port, and out: Unix sockets, and connections that a PROXY header announces.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::harness::front::{Weir, configuration};
use super::harness::process::{Running, audited, file, signal};
use super::harness::tls::Authority;
use super::harness::{Client, DEADLINE, Upstream, eventually, eventually_within, ok, read_reply};

/// The status of the answer to `bytes` and a request behind them, and whom the upstream was told of; `None` where the
/// connection was closed.
fn ask(weir: &Weir, bytes: &[u8]) -> Option<(u16, Option<String>)> {
    let tcp = weir.running.connect();
    tcp.set_read_timeout(Some(DEADLINE)).unwrap();
    ask_over(weir, tcp, bytes)
}

fn ask_over(
    weir: &Weir,
    mut stream: impl Read + Write,
    bytes: &[u8],
) -> Option<(u16, Option<String>)> {
    let request = b"GET / HTTP/1.1\r\nHost: test\r\n\r\n";
    stream.write_all(&[bytes, request].concat()).ok()?;
    let mut reader = BufReader::new(stream);
    if reader.fill_buf().map_or(true, <[u8]>::is_empty) {
        return None;
    }
    let status = read_reply(&mut reader, true).status;
    let told = (status == 200).then(|| {
        let seen = weir.upstream.wait_for_request();
        let mut lines = seen.lines();
        let line = lines.find_map(|line| line.strip_prefix("X-Forwarded-For: "));
        line.unwrap().to_owned()
    });
    Some((status, told))
}

fn failures(weir: &Weir, reason: &str) -> u64 {
    let series =
        format!("weir_proxy_protocol_failures_total{{listener=\"in\",reason=\"{reason}\"}}");
    weir.running.metric(&series)
}

fn run(config: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_weir"))
        .args(["run", "-c"])
        .arg(config)
        .output()
        .unwrap()
}

fn told(client: &str) -> Option<(u16, Option<String>)> {
    Some((200, Some(client.to_owned())))
}

#[test]
fn a_socket_is_a_way_in_and_is_cleared_away_before_and_after() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("in.sock");
    let listener = format!("address: 'unix:{}', socket_mode: '600'", path.display());
    // What a process that was killed left behind.
    drop(UnixListener::bind(&path).unwrap());
    let mut weir = Weir::start(&listener, "");
    assert_eq!(weir.running.address, format!("unix:{}", path.display()));
    let file = fs::symlink_metadata(&path).unwrap();
    assert!(file.file_type().is_socket());
    assert_eq!(file.permissions().mode() & 0o777, 0o600);
    // All lanes take their part; a client is of this machine.
    for _ in 0..20 {
        let stream = UnixStream::connect(&path).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        assert_eq!(ask_over(&weir, stream, b""), told("127.0.0.1"));
    }
    // A second weir is told so, and leaves it.
    let second = configuration("http://127.0.0.1:1", &listener, "");
    let output = run(second.path());
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        !output.status.success() && said.contains("another process listens there"),
        "{said}"
    );
    assert!(UnixStream::connect(&path).is_ok());
    weir.running.signal("TERM");
    assert!(weir.running.child.wait().unwrap().success());
    assert!(!path.exists());
}

#[test]
fn what_is_no_socket_is_never_removed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("precious");
    fs::write(&path, "text").unwrap();
    let listener = format!("address: 'unix:{}'", path.display());
    let config = configuration("http://127.0.0.1:1", &listener, "");
    let output = run(config.path());
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        !output.status.success() && said.contains("a file that is no socket"),
        "{said}"
    );
    assert_eq!(fs::read_to_string(&path).unwrap(), "text");
}

#[test]
fn an_upstream_can_be_a_socket() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("app.sock");
    let listener = UnixListener::bind(&path).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut reader = BufReader::new(stream.unwrap());
            let mut line = String::new();
            // As many requests as come over it.
            while reader.read_line(&mut line).is_ok_and(|some| some > 0) {
                if line == "\r\n" {
                    reader
                        .get_mut()
                        .write_all(ok("by socket").as_bytes())
                        .unwrap();
                }
                line.clear();
            }
        }
    });
    let config = configuration(&format!("unix:{}", path.display()), "", "");
    let running = Running::start(config.path());
    let mut client = running.client();
    for _ in 0..3 {
        assert_eq!(client.get("/").body, "by socket");
    }
    let missing = configuration("unix:/nowhere/app.sock", "", "");
    let running = Running::start(missing.path());
    assert_eq!(running.client().get("/").status, 502);
}

const LOCAL: &[u8] = b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0";

/// A header of version 2 from 9.8.7.6, with more behind the addresses.
fn block() -> Vec<u8> {
    let more = [4, 0, 2, 1, 1];
    let head = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x11";
    [&head[..], &[9, 8, 7, 6, 1, 1, 1, 1, 0, 9, 0, 80], &more].concat()
}

#[test]
fn a_header_says_whose_connection_it_is() {
    let line = b"PROXY TCP4 1.2.3.4 5.6.7.8 9 10\r\n";
    let six = b"PROXY TCP6 fd00::1 ::1 9 10\r\n";
    for mode in ["require", "accept"] {
        let weir = Weir::start(&format!("proxy_protocol: {mode}"), "");
        assert_eq!(ask(&weir, line), told("1.2.3.4"));
        assert_eq!(ask(&weir, six), told("fd00::1"));
        assert_eq!(ask(&weir, &block()), told("9.8.7.6"));
        assert_eq!(ask(&weir, b"PROXY UNKNOWN\r\n"), told("127.0.0.1"));
        assert_eq!(ask(&weir, LOCAL), told("127.0.0.1"));
        assert_eq!(ask(&weir, b"PROXY TCP4 1.2.3.4\r\n"), None);
        eventually(|| failures(&weir, "malformed") == 1);
        assert_eq!(
            ask(&weir, &[b"PROXY UNKNOWN ", &[b'a'; 200][..]].concat()),
            None
        );
        eventually(|| failures(&weir, "too_long") == 1);
    }
    // Unless the file says so, no one is believed.
    let weir = Weir::start("", "");
    assert_eq!(ask(&weir, line), Some((505, None)));
    let weir = Weir::start("proxy_protocol: require", "");
    assert_eq!(ask(&weir, b""), None);
    eventually(|| failures(&weir, "absent") == 1);
    let weir = Weir::start("proxy_protocol: accept", "");
    assert_eq!(ask(&weir, b""), told("127.0.0.1"));
    assert_eq!(failures(&weir, "absent"), 0);
}

#[test]
fn a_header_in_pieces_is_read_and_what_only_looks_like_one_is_not_lost() {
    let weir = Weir::start("proxy_protocol: accept", "");
    let pieces = |bytes: &[u8]| {
        let mut tcp = weir.running.connect();
        tcp.set_nodelay(true).unwrap();
        tcp.set_read_timeout(Some(DEADLINE)).unwrap();
        for byte in bytes {
            tcp.write_all(&[*byte]).unwrap();
        }
        tcp
    };
    for header in [&b"PROXY TCP4 1.2.3.4 5.6.7.8 9 10\r\n"[..], &block()] {
        let tcp = pieces(header);
        let expected = if header[0] == b'P' {
            "1.2.3.4"
        } else {
            "9.8.7.6"
        };
        assert_eq!(ask_over(&weir, tcp, b""), told(expected));
    }
    // It begins as PROXY does.
    let mut tcp = pieces(b"PRO");
    tcp.write_all(b"PFIND / HTTP/1.1\r\nHost: test\r\n\r\n")
        .unwrap();
    assert_eq!(read_reply(&mut BufReader::new(tcp), true).status, 200);
    assert!(weir.upstream.wait_for_request().starts_with("PROPFIND / "));
}

#[test]
fn a_header_that_does_not_come_is_not_waited_for_long() {
    let weir = Weir::start("proxy_protocol: require, timeouts: {header_read: 1s}", "");
    for begun in [&b"PROXY TCP4 1.2"[..], b""] {
        let mut tcp = weir.running.connect();
        tcp.set_read_timeout(Some(DEADLINE)).unwrap();
        tcp.write_all(begun).unwrap();
        assert!(matches!(tcp.read(&mut [0]), Ok(0) | Err(_)));
    }
    eventually(|| failures(&weir, "timed_out") == 2);
    // One who goes before a byte came is a health check.
    drop(TcpStream::connect(&weir.running.address).unwrap());
    drop(ask(&weir, b"PROXY UNKNOWN\r\n").unwrap());
    assert_eq!(failures(&weir, "gone"), 0);
}

#[test]
fn limits_and_trust_go_by_whom_the_header_names() {
    let weir = Weir::start(
        "proxy_protocol: require, client_ip: {trusted_proxies: [9.0.0.0/8]}",
        "rate_limits: {per_client: {limit: 1/h, by: client.ip}}\nroutes: [{upstream: upstream, rate_limits: [per_client]}]\n",
    );
    let from = |ip: &str, more: &str| {
        let header = format!("PROXY TCP4 {ip} 5.6.7.8 9 10\r\n");
        let tcp = weir.running.connect();
        tcp.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut tcp = tcp;
        let request = format!("{header}GET / HTTP/1.1\r\nHost: test\r\n{more}\r\n");
        tcp.write_all(request.as_bytes()).unwrap();
        read_reply(&mut BufReader::new(tcp), true).status
    };
    assert_eq!([from("1.1.1.1", ""), from("1.1.1.1", "")], [200, 429]);
    assert_eq!(from("1.1.1.2", ""), 200);
    // A trusted proxy's word goes further, and no one else's.
    assert_eq!(from("9.1.1.1", "X-Forwarded-For: 1.1.1.1\r\n"), 429);
    assert_eq!(from("1.1.1.3", "X-Forwarded-For: 1.1.1.1\r\n"), 200);
}

#[test]
fn tls_begins_behind_the_header() {
    let authority = Authority::new();
    authority.issue("a", "DNS:a.test");
    let weir = Weir::start(
        &format!(
            "proxy_protocol: require, tls: {{certificates: [{}]}}",
            authority.pair("a")
        ),
        "",
    );
    let mut tcp = weir.running.connect();
    tcp.set_read_timeout(Some(DEADLINE)).unwrap();
    tcp.write_all(b"PROXY TCP4 1.2.3.4 5.6.7.8 9 10\r\n")
        .unwrap();
    let mut client = authority.client().try_over(tcp, "a.test").unwrap();
    assert_eq!(client.get("/").status, 200);
    let seen = weir.upstream.wait_for_request();
    assert!(seen.contains("X-Forwarded-For: 1.2.3.4\r\n"), "{seen}");
}

#[test]
fn headers_are_believed_from_the_networks_that_the_file_names() {
    let line = b"PROXY TCP4 1.2.3.4 5.6.7.8 9 10\r\n";
    let others = "proxy_protocol_from: [10.0.0.0/8, '::1']";
    let weir = Weir::start(&format!("proxy_protocol: require, {others}"), "");
    assert_eq!(ask(&weir, line), None);
    assert_eq!(ask(&weir, b""), None);
    eventually(|| failures(&weir, "untrusted") == 2);
    let said = weir.running.log_until("no PROXY header");
    for part in [
        " DEBUG ",
        "listener=\"in\"",
        "peer=127.0.0.1",
        "reason=\"untrusted\"",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    // Others may come without one, and then it is no header.
    let weir = Weir::start(&format!("proxy_protocol: accept, {others}"), "");
    assert_eq!(ask(&weir, b""), told("127.0.0.1"));
    assert_eq!(ask(&weir, line), Some((505, None)));
    let near = "proxy_protocol: require, proxy_protocol_from: [127.0.0.0/8]";
    let weir = Weir::start(near, "");
    assert_eq!(ask(&weir, line), told("1.2.3.4"));
    // Also where IPv4 comes mapped to IPv6, and by a socket.
    let weir = Weir::start(&format!("address: '[::]:0', {near}"), "");
    let port = weir.running.address.rsplit(':').next().unwrap();
    let tcp = TcpStream::connect(format!("127.0.0.1:{port}")).unwrap();
    tcp.set_read_timeout(Some(DEADLINE)).unwrap();
    assert_eq!(ask_over(&weir, tcp, line), told("1.2.3.4"));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("in.sock");
    let weir = Weir::start(&format!("address: 'unix:{}', {near}", path.display()), "");
    let stream = UnixStream::connect(&path).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    assert_eq!(ask_over(&weir, stream, line), told("1.2.3.4"));
}

#[test]
fn the_audit_keeps_whom_the_header_names() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("audit.db");
    let audit = format!("audit: {{sqlite: {{path: '{}'}}}}\n", file.display());
    let weir = Weir::start("proxy_protocol: require", &audit);
    assert_eq!(ask(&weir, &block()), told("9.8.7.6"));
    eventually(|| {
        let events = audited(weir.config.path(), &[]);
        events.len() == 1 && events[0]["client"] == "9.8.7.6"
    });
}

#[test]
fn a_socket_goes_on_with_the_process_that_takes_over() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("in.sock");
    let upstream = Upstream::answering("ok");
    let text = |admin: &str, lanes: usize, mode: &str| {
        file(&format!(
            "listeners: [{{address: 'unix:{}', socket_mode: '{mode}'}}]\nupstream: {}\nadmin: {{address: '{admin}'}}\nruntime: {{lanes: {lanes}}}\n\
             shutdown: {{propagation_delay: 0s}}\n",
            path.display(),
            upstream.url()
        ))
    };
    let first_config = text("127.0.0.1:0", 2, "666");
    let mut running = Running::taking_over(first_config.path());
    let ask = || {
        let mut stream = UnixStream::connect(&path).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream
            .write_all(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
            .unwrap();
        assert_eq!(read_reply(&mut BufReader::new(stream), true).status, 200);
    };
    ask();
    // More lanes than sockets, and fewer.
    for (lanes, mode) in [(3, "600"), (1, "660")] {
        let config = text(&running.admin, lanes, mode);
        let mut before = std::mem::replace(&mut running, Running::taking_over(config.path()));
        assert!(before.child.wait().unwrap().success());
        let file = fs::symlink_metadata(&path).unwrap();
        assert_eq!(format!("{:o}", file.permissions().mode() & 0o777), mode);
        for _ in 0..10 {
            ask();
        }
    }
    running.signal("TERM");
    assert!(running.child.wait().unwrap().success());
    assert!(!path.exists());
}

/// A Redis that says nothing, and the section of the file that has weir wait for it.
fn silent_redis() -> (TcpListener, String) {
    let redis = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = redis.local_addr().unwrap();
    let section = format!("redis: {{urls: 'redis://{address}', connect_timeout: 3s}}\n");
    (redis, section)
}

#[test]
fn a_take_over_that_is_under_way_or_fails_leaves_the_socket_to_who_listens() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("in.sock");
    let text = |admin: &str, more: &str| {
        file(&format!(
            "listeners: [{{address: 'unix:{}'}}]\nroutes: [{{reply: {{status: 200, body: ok}}}}]\nadmin: {{address: '{admin}'}}\n\
             runtime: {{lanes: 2}}\nshutdown: {{propagation_delay: 0s}}\n{more}",
            path.display(),
        ))
    };
    let ask = || {
        let mut stream = UnixStream::connect(&path).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream
            .write_all(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
            .unwrap();
        assert_eq!(read_reply(&mut BufReader::new(stream), true).status, 200);
    };
    let config = text("127.0.0.1:0", "");
    let mut old = Running::taking_over(config.path());
    let config = text(&old.admin, "");
    let fails = Command::new(env!("CARGO_BIN_EXE_weir"))
        .args(["run", "--take-over", "-c"])
        .arg(config.path())
        .env("WEIR_APP_PROBES", "nonsense")
        .output()
        .unwrap();
    assert!(!fails.status.success());
    ask();
    // The old one is told to end while the new one, which has the sockets already, still starts.
    let (redis, section) = silent_redis();
    let config = text(&old.admin, &section);
    let config_path = config.path().to_owned();
    let starting = thread::spawn(move || Running::taking_over(&config_path));
    let _waits = redis.accept().unwrap();
    old.signal("TERM");
    assert!(old.child.wait().unwrap().success());
    let mut new = starting.join().unwrap();
    ask();
    new.signal("TERM");
    assert!(new.child.wait().unwrap().success());
    assert!(!path.exists());
}

#[test]
fn the_socket_of_a_listener_that_the_new_process_lacks_goes_with_the_old_one() {
    let folder = tempfile::tempdir().unwrap();
    let [stays, goes] = ["stays.sock", "goes.sock"].map(|name| folder.path().join(name));
    let text = |paths: &[&Path], admin: &str| {
        let listeners = paths
            .iter()
            .map(|path| format!("{{address: 'unix:{}'}}", path.display()));
        let listeners = listeners.collect::<Vec<_>>().join(", ");
        file(&format!(
            "listeners: [{listeners}]\nroutes: [{{reply: {{status: 200, body: ok}}}}]\nadmin: {{address: '{admin}'}}\n\
             runtime: {{lanes: 2}}\nshutdown: {{propagation_delay: 0s}}\n"
        ))
    };
    let config = text(&[&stays, &goes], "127.0.0.1:0");
    let mut old = Running::taking_over(config.path());
    let config = text(&[&stays], &old.admin);
    let mut new = Running::taking_over(config.path());
    assert!(old.child.wait().unwrap().success());
    assert!(stays.exists() && !goes.exists());
    assert!(UnixStream::connect(&stays).is_ok());
    new.signal("TERM");
    assert!(new.child.wait().unwrap().success());
    assert!(!stays.exists());
}

#[test]
fn a_take_over_that_is_told_to_end_before_it_serves_leaves_the_old_process() {
    let text = |listener: &str, admin: &str, lanes: usize, more: &str| {
        file(&format!(
            "listen: {listener}\nroutes: [{{reply: {{status: 200, body: ok}}}}]\nadmin: {{address: '{admin}'}}\n\
             runtime: {{lanes: {lanes}}}\n{more}"
        ))
    };
    let config = text("127.0.0.1:0", "127.0.0.1:0", 1, "");
    let mut old = Running::taking_over(config.path());
    // While it waits for Redis with no lane yet, and while its lanes do.
    for (name, has_lanes) in [
        ("TERM", false),
        ("INT", false),
        ("TERM", true),
        ("INT", true),
    ] {
        let (redis, section) = silent_redis();
        let config = text(&old.address, &old.admin, 1, &section);
        let ended = if has_lanes {
            let mut new = Running::taking_over(config.path());
            new.signal(name);
            new.child.wait().unwrap()
        } else {
            let mut new = Command::new(env!("CARGO_BIN_EXE_weir"))
                .args(["run", "--take-over", "-c"])
                .arg(config.path())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            let _waits = redis.accept().unwrap();
            signal(&new, name);
            new.wait().unwrap()
        };
        assert_eq!(ended.code(), Some(0), "{name} {has_lanes}");
        old.log_until("not taken over, and so going on");
        assert!(old.child.try_wait().unwrap().is_none());
        assert_eq!(old.client().get("/").status, 200);
        assert_eq!(old.admin().get("/ready").status, 200);
    }
    // It can be replaced still.
    let config = text(&old.address, &old.admin, 2, "");
    let new = Running::taking_over(config.path());
    assert!(old.child.wait().unwrap().success());
    assert_eq!(new.client().get("/").status, 200);
}

#[test]
fn a_process_of_another_user_neither_takes_over_nor_is_taken_over() {
    let as_nobody = ["--reuid=65534", "--regid=65534", "--clear-groups"];
    let config = |address: &str, admin: &str| {
        let config = file(&format!(
            "listen: {address}\nroutes: [{{reply: {{status: 200, body: ok}}}}]\nadmin: {{address: '{admin}'}}\n"
        ));
        fs::set_permissions(config.path(), fs::Permissions::from_mode(0o644)).unwrap();
        config
    };
    let any = config("127.0.0.1:0", "127.0.0.1:0");
    // Where every user may read it.
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let weir = folder.path().join("weir");
    fs::copy(env!("CARGO_BIN_EXE_weir"), &weir).unwrap();
    let script = format!(
        "shift; exec setpriv {} {} \"$@\" --take-over",
        as_nobody.join(" "),
        weir.display()
    );
    for (old, user, mut new) in [
        (Running::taking_over(any.path()), 0, {
            let mut new = Command::new("setpriv");
            new.args(as_nobody).arg(&weir);
            new
        }),
        (
            Running::start_after(&script, any.path(), &[]),
            65534,
            Command::new(env!("CARGO_BIN_EXE_weir")),
        ),
    ] {
        let config = config(&old.address, &old.admin);
        let output = new.args(["run", "--take-over", "-c"]).arg(config.path());
        let output = output.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        let why = format!(
            "cannot take over: the other process is of user {user}, and this one of {}: start both as one user",
            65534 - user
        );
        assert!(said.contains(&why), "{said}");
        old.log_until(&format!("is of user {}", 65534 - user));
        assert_eq!(old.client().get("/").status, 200);
    }
}

#[test]
fn the_old_process_serves_until_the_lanes_of_the_new_one_do() {
    serves_until_others_do(2);
}

/// A new socket of theirs beside the old one's must not be given connections before they accept.
#[test]
fn so_it_does_where_the_new_one_has_more_lanes() {
    serves_until_others_do(1);
}

#[expect(clippy::disallowed_methods, reason = "a bound on time")]
fn serves_until_others_do(lanes: usize) {
    let text = |listener: &str, admin: &str, lanes: usize, more: &str| {
        file(&format!(
            "listen: {listener}\nroutes: [{{reply: {{status: 200, body: ok}}}}]\nadmin: {{address: '{admin}'}}\n\
             runtime: {{lanes: {lanes}}}\n{more}"
        ))
    };
    let config = text("127.0.0.1:0", "127.0.0.1:0", lanes, "");
    let mut old = Running::taking_over(config.path());
    let (_redis, section) = silent_redis();
    let config = text(&old.address, &old.admin, 2, &section);
    let config_path = config.path().to_owned();
    let starting = thread::spawn(move || Running::taking_over(&config_path));
    let address = old.address.clone();
    let mut slowest = Duration::ZERO;
    eventually_within(3 * DEADLINE, || {
        let began = Instant::now();
        assert_eq!(Client::to(&address).get("/").status, 200);
        slowest = slowest.max(began.elapsed());
        old.child.try_wait().unwrap().is_some()
    });
    // A lane of the new one waits for Redis for three.
    assert!(slowest < Duration::from_secs(2), "{slowest:?}");
    assert_eq!(starting.join().unwrap().client().get("/").status, 200);
}
