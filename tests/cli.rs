//! The binary, as a user runs it.

#![expect(
    clippy::unwrap_used,
    reason = "a broken step of a test is a failed test"
)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::thread;

/// A process that is ended when the test lets go of it.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn file(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

#[test]
fn run_proxies_to_the_upstream_of_the_file() {
    let upstream = TcpListener::bind("127.0.0.1:0").unwrap();
    let config = file(&format!(
        "listen: 127.0.0.1:0\nupstream: http://{}\n",
        upstream.local_addr().unwrap()
    ));
    thread::spawn(move || {
        let (mut stream, _) = upstream.accept().unwrap();
        let mut piece = [0; 1024];
        let _ = stream.read(&mut piece).unwrap();
        stream
            .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")
            .unwrap();
    });
    let mut child = Command::new(env!("CARGO_BIN_EXE_weir"))
        .args(["run", "-c"])
        .arg(config.path())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let stderr = child.stderr.take().unwrap();
    let _running = Running(child);
    let mut line = String::new();
    BufReader::new(stderr).read_line(&mut line).unwrap();
    let address = line.split(' ').nth(3).unwrap();
    let mut client = TcpStream::connect(address).unwrap();
    client
        .write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        .unwrap();
    let mut reply = String::new();
    client.read_to_string(&mut reply).unwrap();
    assert!(
        reply.starts_with("HTTP/1.1 200 OK\r\n") && reply.ends_with("hi"),
        "{reply}"
    );
}

#[test]
fn check_exits_1_and_names_the_file_and_the_mistake() {
    let good = file("listen: 127.0.0.1:0\nupstream: http://127.0.0.1:1\n");
    let bad = file("listen: 127.0.0.1:0\nupstrem: http://127.0.0.1:1\n");
    let check = |path| {
        Command::new(env!("CARGO_BIN_EXE_weir"))
            .args(["check", "-c"])
            .arg(path)
            .output()
            .unwrap()
    };
    assert!(check(good.path()).status.success());
    let output = check(bad.path());
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        said.contains("upstrem") && said.contains(bad.path().to_str().unwrap()),
        "{said}"
    );
}

#[test]
fn sigterm_lets_a_request_in_flight_end_and_exits_0() {
    let upstream = TcpListener::bind("127.0.0.1:0").unwrap();
    let config = file(&format!(
        "listen: 127.0.0.1:0\nupstream: http://{}\n",
        upstream.local_addr().unwrap()
    ));
    let mut child = Command::new(env!("CARGO_BIN_EXE_weir"))
        .args(["run", "-c"])
        .arg(config.path())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let stderr = child.stderr.take().unwrap();
    let mut running = Running(child);
    let mut line = String::new();
    BufReader::new(stderr).read_line(&mut line).unwrap();
    let mut client = TcpStream::connect(line.split(' ').nth(3).unwrap()).unwrap();
    let mut idle = TcpStream::connect(line.split(' ').nth(3).unwrap()).unwrap();
    client
        .write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        .unwrap();
    let (mut stream, _) = upstream.accept().unwrap();
    let _ = stream.read(&mut [0; 1024]).unwrap();
    let killed = Command::new("kill")
        .arg(running.0.id().to_string())
        .status()
        .unwrap();
    assert!(killed.success());
    assert_eq!(
        idle.read(&mut [0; 1]).unwrap(),
        0,
        "an idle connection is closed at once"
    );
    stream
        .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")
        .unwrap();
    let mut reply = String::new();
    client.read_to_string(&mut reply).unwrap();
    assert!(reply.ends_with("hi"), "{reply}");
    assert_eq!(running.0.wait().unwrap().code(), Some(0));
}
