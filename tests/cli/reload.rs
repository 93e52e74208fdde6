//! When a running weir takes its file up again, and what it says of that.

use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use super::harness::eventually;
use super::harness::process::Running;

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
