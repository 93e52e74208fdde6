//! When a running weir takes its file up again, and what it says of that.

use std::fs::{self, File};
use std::io::Write as _;
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use super::harness::process::{Ended, Log, Running, signal};
use super::harness::servers::{Kept, NameServer};
use super::harness::{Upstream, eventually, raw};

const TAKEN: &str = "weir_config_last_reload_successful";

/// A folder with a `weir.yaml` of this text.
fn folder(text: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    replace(&folder.path().join("weir.yaml"), text);
    folder
}

/// Whole at once, as editors and Kubernetes do.
fn replace(path: &Path, text: &str) {
    let fresh = path.with_extension("fresh");
    fs::write(&fresh, text).unwrap();
    fs::rename(fresh, path).unwrap();
}

fn replying(body: &str) -> String {
    format!(
        "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\nroutes: [{{reply: {{status: 200, body: {body}}}}}]\n"
    )
}

#[test]
fn a_file_is_not_taken_up_while_it_is_written() {
    let folder = folder(&replying("old"));
    let path = folder.path().join("weir.yaml");
    let running = Running::start(&path);
    let body = || running.client().get("/").body;
    // A writer that is slow, and whose file is without mistakes all along.
    let mut text = replying("half");
    for _ in 0..30 {
        text += "# more\n";
        fs::write(&path, &text).unwrap();
        sleep(Duration::from_millis(100));
        assert_eq!(body(), "old");
    }
    fs::write(&path, replying("new")).unwrap();
    eventually(|| match body().as_str() {
        "new" => true,
        "old" => false,
        other => panic!("{other}"),
    });
    // Whoever asks for it gets what is there.
    fs::write(&path, replying("asked")).unwrap();
    running.signal("HUP");
    eventually(|| body() == "asked");
}

#[test]
fn a_file_of_the_future_is_taken_up() {
    let folder = folder(&replying("old"));
    let path = folder.path().join("weir.yaml");
    let running = Running::start(&path);
    let fresh = path.with_extension("fresh");
    fs::write(&fresh, replying("new")).unwrap();
    let file = fs::File::options().write(true).open(&fresh).unwrap();
    let modified = file.metadata().unwrap().modified().unwrap();
    file.set_modified(modified + Duration::from_secs(86_400))
        .unwrap();
    fs::rename(fresh, &path).unwrap();
    eventually(|| running.client().get("/").body == "new");
}

#[test]
fn a_secret_that_changes_is_taken_up_or_told_of() {
    let folder = folder("");
    let path = folder.path().join("weir.yaml");
    let secret = |name: &str, text: &str| replace(&folder.path().join(name), text);
    let named = |name: &str| format!("'${{file:{}}}'", folder.path().join(name).display());
    let nobody = Kept::new();
    let redis = nobody.address;
    let text = |body: &str, password: &str| {
        format!(
            "{}redis: {{urls: 'redis://{redis}', password: {}}}\n",
            replying(body).replace(
                "127.0.0.1:0}",
                &format!("'127.0.0.1:0', token: {}}}", named("token"))
            ),
            named(password),
        )
    };
    secret("token", "first\n");
    secret("password", "one");
    replace(&path, &text("old", "password"));
    let running = Running::start(&path);
    let lets_in = |token: &str| {
        let bearer = format!("Authorization: Bearer {token}");
        let reply = running.admin().send("GET", "/v1/limits", &[&bearer], "");
        reply.status == 200
    };
    let body = || running.client().get("/").body;
    assert!(lets_in("first"));

    // The admin port's is followed.
    secret("token", "second\n");
    eventually(|| lets_in("second"));
    assert!(!lets_in("first"));

    // That of Redis is not, and holds nothing up.
    secret("password", "two");
    replace(&path, &text("new", "password"));
    let said = running.log_until("a secret is another");
    assert!(said.contains("redis.password"), "{said}");
    assert!(said.contains("restart"), "{said}");
    assert!(!said.contains("two"), "{said}");
    eventually(|| body() == "new");
    assert_eq!(running.metric(TAKEN), 1);

    // What was refused for a secret that was not there is taken once it is.
    replace(&path, &text("newest", "late"));
    eventually(|| running.metric(TAKEN) == 0);
    assert_eq!(body(), "new");
    secret("late", "one");
    eventually(|| running.metric(TAKEN) == 1 && body() == "newest");
}

#[test]
fn a_name_that_is_not_found_does_not_replace_endpoints() {
    let upstreams = ["one", "two"].map(Upstream::answering);
    let names = NameServer::start();
    let text = |endpoints: &str| {
        format!(
            "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\nupstreams: {{app: {{endpoints: {endpoints}}}}}\n"
        )
    };
    let folder = folder(&text(&format!("'{}'", upstreams[0].url())));
    let path = folder.path().join("weir.yaml");
    let running = Running::start(&path);
    assert_eq!(running.client().get("/").body, "one");
    let second: SocketAddr = upstreams[1].url()["http://".len()..].parse().unwrap();
    let port = second.port();
    replace(
        &path,
        &text(&format!(
            "{{dns: 'app.test:{port}', refresh: 200ms, servers: ['{}']}}",
            names.address
        )),
    );
    let said = running.log_until("cannot be looked up");
    assert!(said.contains("before the reload"), "{said}");
    running.log_until("configuration reloaded");
    let asked =
        || running.metric("weir_upstream_dns_lookups_total{upstream=\"app\",result=\"failed\"}");
    // Name servers say so again and again.
    eventually(|| asked() >= 5);
    assert_eq!(running.client().get("/").body, "one");
    names.says("app.test", &[second.ip()], 60);
    eventually(|| running.client().get("/").body == "two");
}

#[test]
fn a_file_that_is_as_before_is_told_as_that() {
    let folder = folder(&replying("old"));
    let path = folder.path().join("weir.yaml");
    let running = Running::start(&path);
    running.signal("HUP");
    let said = running.log_until("configuration re");
    assert!(said.contains("read again: nothing changed"), "{said}");
    replace(&path, &replying("new"));
    running.signal("HUP");
    running.log_until("configuration reloaded");
    assert_eq!(running.client().get("/").body, "new");
}

#[test]
fn another_log_level_is_taken_up() {
    let text = |level: &str| {
        format!(
            "listeners: [{{address: '127.0.0.1:0', proxy_protocol: require}}]\nadmin: {{address: 127.0.0.1:0}}\n\
             upstream: http://127.0.0.1:1\ntelemetry: {{log: {{level: {level}}}}}\n"
        )
    };
    let folder = folder(&text("info"));
    let path = folder.path().join("weir.yaml");
    let running = Running::start(&path);
    let told_until = |level: &str| {
        raw::send(running.address.parse().unwrap(), b"GET / HTTP/1.1\r\n");
        replace(&path, &text(level));
        running.signal("HUP");
        let lines = running.log_to("configuration re");
        lines.iter().any(|line| line.contains("no PROXY header"))
    };
    assert!(!told_until("debug"));
    assert!(told_until("info"));
    assert!(!told_until("info"));
}

/// As `weir run -c <(template weir.yaml)` has it.
#[test]
fn a_file_that_can_be_read_once_is_read_once() {
    let pipe = format!("exec 3<<'END'\n{}END\n:", replying("piped"));
    let running = Running::start_after(&pipe, Path::new("/dev/fd/3"), &[]);
    assert_eq!(running.client().get("/").body, "piped");
}

/// To open a named pipe again would be to wait for a writer, with the admin port and all else of the control thread.
#[test]
fn a_named_pipe_is_not_read_again_and_holds_nothing_up() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weir.yaml");
    let made = Command::new("mkfifo").arg(&path).status().unwrap();
    assert!(made.success());
    let to = path.clone();
    let writer = std::thread::spawn(move || fs::write(to, replying("piped")).unwrap());
    let running = Running::start(&path);
    writer.join().unwrap();
    let body = || running.client().get("/").body;
    assert_eq!(body(), "piped");
    running.signal("HUP");
    let said = running.log_until("configuration not reloaded");
    assert!(said.contains("can be read once"), "{said}");
    assert_eq!((running.metric(TAKEN), &*body()), (0, "piped"));
    // A file in its place is taken up.
    replace(&path, &replying("file"));
    eventually(|| body() == "file" && running.metric(TAKEN) == 1);
    // Nor is one that a value names.
    let value = folder.path().join("value");
    let made = Command::new("mkfifo").arg(&value).status().unwrap();
    assert!(made.success());
    let named = format!("'${{file:{}}}'", value.display());
    replace(&path, &replying(&named));
    running.signal("HUP");
    let said = running.log_until("configuration not reloaded");
    assert!(
        said.contains(&format!("{} can be read once", value.display())),
        "{said}"
    );
    assert_eq!(body(), "file");
}

/// As of a service manager that is told to reload what it has just begun, or of one that tells all processes in a take-over.
#[test]
fn a_signal_to_reload_that_comes_before_the_file_is_read_ends_no_process() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weir.yaml");
    let made = Command::new("mkfifo").arg(&path).status().unwrap();
    assert!(made.success());
    let mut child = Command::new(env!("CARGO_BIN_EXE_weir"))
        .args(["run", "-c"])
        .arg(&path)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let log = Log::of(&mut child);
    // It may be about to read the file again, and wait for a writer.
    let child = Ended(child);
    // There is a reader to open it for once it reads.
    let mut options = File::options();
    options
        .write(true)
        .custom_flags(rustix::fs::OFlags::NONBLOCK.bits() as i32);
    let mut pipe = None;
    eventually(|| {
        pipe = options.open(&path).ok();
        pipe.is_some()
    });
    signal(&child.0, "HUP");
    let mut pipe = pipe.unwrap();
    pipe.write_all(replying("read").as_bytes()).unwrap();
    drop(pipe);
    log.until("listening");
}
