//! The audit's files where something is wrong with one, with the disk or with where they were copied: what is sound is read, and what is not is
//! named.

use std::fs;
use std::io::Read as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::harness::process::{Running, file, weir};
use super::harness::sqlite::{Audit, DAY, KEY, NOW, batch, today};
use super::harness::{PATIENCE, Upstream, eventually, eventually_within};
use weir::clock;
use weir::store::audit::chain::Keys;
use weir::store::audit::days::{self, Day};
use weir::store::audit::{Filter, Order};
use weir::store::sqlite::Writer;

/// Three days of 1,000 events each.
fn three_days() -> Audit {
    let audit = Audit::empty();
    let mut writer = audit.writer();
    for day in 0..3 {
        let first = u64::from(day) * 1_000 + 1;
        let mut events = [batch(first..=first + 999)];
        writer.append(&mut events, NOW + day * DAY).unwrap();
    }
    audit
}

/// Of all that a file can suffer.
fn damages() -> [fn(&mut Vec<u8>); 2] {
    [
        |bytes| bytes[20 * 8_192..21 * 8_192].fill(0xff),
        |bytes| *bytes = b"no database at all".repeat(1_000),
    ]
}

fn damage(file: &Path, how: fn(&mut Vec<u8>)) {
    let mut bytes = fs::read(file).unwrap();
    how(&mut bytes);
    fs::write(file, bytes).unwrap();
}

#[test]
fn a_damaged_day_is_a_fault_of_its_own_and_the_others_are_checked() {
    for how in damages() {
        let audit = three_days();
        audit.sql("DELETE FROM events WHERE seq = 7");
        damage(&audit.file(NOW + DAY), how);
        let report = audit.reader().verify(&Keys::new(&[KEY])).unwrap();
        let said: Vec<_> = report.faults.iter().map(ToString::to_string).collect();
        assert_eq!(said.len(), 2, "{said:#?}");
        assert!(said[0].ends_with("event 7: missing"), "{said:#?}");
        assert!(said[1].starts_with("2023-11-16: a/"), "{said:#?}");
        assert!(
            said[1].ends_with("events 1001 to 2000: cannot be read"),
            "{said:#?}"
        );
        assert!(report.events >= 1_999, "{report:?}");

        // The newest, of which no other file tells.
        let audit = three_days();
        damage(&audit.file(NOW + 2 * DAY), how);
        let (code, said) = weir(&["audit", "verify", "--database"], &audit.path);
        assert_eq!(code, Some(1));
        assert!(said.contains("2023-11-17: cannot be read\n"), "{said}");
    }
}

#[test]
fn what_comes_before_a_damaged_day_is_exported() {
    for (day, lines) in [(1, 1_000), (2, 2_000)] {
        let audit = three_days();
        damage(&audit.file(NOW + day * DAY), damages()[1]);
        let mut weir = Command::new(env!("CARGO_BIN_EXE_weir"));
        let output = weir
            .args(["audit", "export", "--database"])
            .arg(&audit.path)
            .output()
            .unwrap();
        let exported = String::from_utf8(output.stdout).unwrap();
        assert_eq!(exported.lines().count(), lines, "{day}");
        let said = String::from_utf8(output.stderr).unwrap();
        let damaged = ["2023-11-16", "2023-11-17"][day as usize - 1];
        assert!(!output.status.success() && said.contains(damaged), "{said}");
    }
}

#[test]
fn a_query_names_the_day_that_it_cannot_read() {
    for how in damages() {
        let audit = three_days();
        damage(&audit.file(NOW), how);
        let reader = audit.reader();
        let rare = Filter {
            user: Some("nobody".to_owned()),
            ..Filter::default()
        };
        let said = reader.query(&rare).unwrap_err().to_string();
        assert!(said.contains("2023-11-15"), "{said}");
        let sound = Filter {
            limit: Some(2_000),
            order: Order::NewestFirst,
            ..Filter::default()
        };
        assert_eq!(reader.query(&sound).unwrap().len(), 2_000);
        // Not an answer that looks whole.
        let more = Filter {
            limit: Some(3_000),
            ..sound
        };
        let said = reader.query(&more).map(|all| all.len());
        let said = said.unwrap_err().to_string();
        assert!(said.contains("2023-11-15"), "{said}");
    }
}

/// Of a later weir, by SQLite's `user_version`.
fn of_another_version() -> fn(&mut Vec<u8>) {
    |bytes| bytes[60..64].copy_from_slice(&[0, 0, 0, 99])
}

/// A weir whose audit has a damaged file of yesterday, with this delivery.
fn damaged_yesterday(delivery: &str) -> (Audit, Upstream, tempfile::NamedTempFile) {
    beside(delivery, DAY, damages()[1])
}

/// A weir whose audit has a file of so long ago to which this was done, with this delivery.
fn beside(
    delivery: &str,
    ago: Duration,
    how: fn(&mut Vec<u8>),
) -> (Audit, Upstream, tempfile::NamedTempFile) {
    let audit = Audit::empty();
    let then = today() - ago;
    let mut writer = Writer::open(&audit.path, "a", None, then).unwrap();
    writer.append(&mut [batch(1..=1_000)], then).unwrap();
    drop(writer);
    damage(&audit.file(then), how);
    let app = Upstream::answering("hi");
    let config = file(&format!(
        "listen: 127.0.0.1:0\nupstream: {}\nadmin: {{address: 127.0.0.1:0}}\nruntime: {{lanes: 1}}\n\
         audit: {{delivery: {delivery}, sqlite: {{path: {}}}}}\n",
        app.url(),
        audit.path.display()
    ));
    (audit, app, config)
}

#[test]
fn weir_starts_beside_a_damaged_day_and_writes_once_that_is_moved_away() {
    let (audit, _app, config) = damaged_yesterday("best_effort");
    let yesterday = Day::of(clock::wall() - DAY);
    let running = Running::start(config.path());
    assert_eq!(running.client().get("/").status, 200);
    eventually(|| running.metric("weir_audit_events_total{result=\"failed_write\"}") > 0);
    fs::remove_file(days::file(&audit.path, yesterday)).unwrap();
    eventually_within(PATIENCE, || {
        running.metric("weir_audit_events_total{result=\"written\"}") == 1
    });
}

/// The audit is to keep nobody from going back to the version before.
#[test]
fn weir_serves_beside_files_of_a_later_one_and_writes_once_they_are_moved_away() {
    for ago in [Duration::ZERO, DAY] {
        let (audit, _app, config) = beside("best_effort", ago, of_another_version());
        let file = days::file(&audit.path, Day::of(clock::wall() - ago));
        let running = Running::start(config.path());
        assert_eq!(running.client().get("/").status, 200);
        eventually(|| running.metric("weir_audit_events_total{result=\"failed_write\"}") > 0);
        let health = running.admin().get("/health");
        let checks: serde_json::Value = serde_json::from_str(&health.body).unwrap();
        let audit = &checks["checks"]["audit"];
        assert_eq!(audit["status"], "degraded", "{audit}");
        let told = audit["unwritten"].as_str().unwrap();
        assert!(told.contains("its version is 99, not 3)"), "{told}");
        fs::remove_file(file).unwrap();
        eventually_within(PATIENCE, || {
            running.metric("weir_audit_events_total{result=\"written\"}") == 1
        });
    }
    let (_audit, _app, config) = beside("guaranteed", Duration::ZERO, of_another_version());
    let (code, said) = weir(&["run", "-c"], config.path());
    assert_eq!(code, Some(1), "{said}");
    let mend = "its version is 99, not 3): run the weir that made it";
    assert!(said.contains(mend), "{said}");
}

#[test]
fn guaranteed_delivery_does_not_begin_beside_a_damaged_day_and_names_the_file() {
    let (audit, _app, config) = damaged_yesterday("guaranteed");
    let (code, said) = weir(&["run", "-c"], config.path());
    assert_eq!(code, Some(1), "{said}");
    let yesterday = days::file(&audit.path, Day::of(clock::wall() - DAY));
    assert!(
        said.contains(&format!("{}", yesterday.display())) && said.contains("move it away"),
        "{said}"
    );
}

/// `weir audit` with these arguments where no folder can be written to but that of `audit`, or not even that.
fn where_nothing_can_be_written(arguments: &[&str], audit: &Audit, options: &str) -> String {
    let folder = audit.path.parent().unwrap().display();
    let script = format!(
        "set -e; \
         for each in /tmp /var/tmp /usr/tmp; do \
         if test -d $each; then mount --bind $each $each; mount -o remount,bind,ro $each; fi; \
         done; \
         mount --bind {folder} {folder}; mount -o remount,bind,{options} {folder}; \
         cd /proc; exec \"$@\""
    );
    let output = Command::new("unshare")
        .args(["-m", "sh", "-c", &script, "sh"])
        .args([env!("CARGO_BIN_EXE_weir"), "audit"])
        .args(arguments)
        .arg("--database")
        .arg(&audit.path)
        .env_remove("TMPDIR")
        .output()
        .unwrap();
    String::from_utf8([output.stdout, output.stderr].concat()).unwrap()
}

/// In a folder that is not in /tmp.
fn beside_tmp() -> Audit {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = directory.path().join("audit.db");
    Audit { directory, path }
}

#[test]
fn a_large_day_is_verified_where_only_its_folder_can_be_written() {
    let audit = beside_tmp();
    let mut writer = Writer::open(&audit.path, "a", None, NOW).unwrap();
    for part in 0..20 {
        let first = part * 1_000 + 1;
        let mut events = [batch(first..=first + 999)];
        writer.append(&mut events, NOW).unwrap();
    }
    drop(writer);
    let said = where_nothing_can_be_written(&["verify"], &audit, "rw");
    assert!(
        said.contains("20000 events, 1 boots, 1 files: nothing"),
        "{said}"
    );
}

#[test]
fn a_day_that_was_not_closed_is_read_from_a_folder_that_cannot_be_written() {
    let audit = beside_tmp();
    let mut writer = Writer::open(&audit.path, "a b%?#", None, NOW).unwrap();
    writer.append(&mut [batch(1..=5)], NOW).unwrap();
    drop(writer);
    let said = where_nothing_can_be_written(&["export"], &audit, "ro");
    assert_eq!(said.lines().count(), 5, "{said}");
    let said = where_nothing_can_be_written(&["verify"], &audit, "ro");
    assert!(
        said.contains("5 events, 1 boots, 1 files: nothing"),
        "{said}"
    );
}

#[test]
fn an_export_ends_with_what_was_there_when_it_began() {
    let audit = Audit::empty();
    let mut writer = audit.writer();
    writer.append(&mut [batch(1..=6_000)], NOW).unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_weir"))
        .args(["audit", "export", "--database"])
        .arg(&audit.path)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = child.stdout.take().unwrap();
    let mut said = vec![0];
    // It has begun, and waits for its reader long before the end of its first page.
    out.read_exact(&mut said).unwrap();
    writer.append(&mut [batch(6_001..=9_000)], NOW).unwrap();
    writer
        .append(&mut [batch(9_001..=9_500)], NOW + DAY)
        .unwrap();
    out.read_to_end(&mut said).unwrap();
    assert!(child.wait().unwrap().success());
    let lines = String::from_utf8(said).unwrap();
    assert_eq!(lines.lines().count(), 6_000);
}

/// As by the retention, which may remove the very day that is saved from it.
#[test]
fn an_export_tells_of_a_day_that_is_removed_while_it_is_read() {
    let audit = Audit::empty();
    let mut writer = audit.writer();
    writer.append(&mut [batch(1..=6_000)], NOW).unwrap();
    let tomorrow = NOW + DAY;
    writer
        .append(&mut [batch(6_001..=6_100)], tomorrow)
        .unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_weir"))
        .args(["audit", "export", "--database"])
        .arg(&audit.path)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = child.stdout.take().unwrap();
    let mut said = vec![0];
    out.read_exact(&mut said).unwrap();
    fs::remove_file(audit.file(NOW)).unwrap();
    out.read_to_end(&mut said).unwrap();
    let ended = child.wait_with_output().unwrap();
    let lines = String::from_utf8(said).unwrap();
    assert_eq!(lines.lines().count(), 5_100);
    let error = String::from_utf8(ended.stderr).unwrap();
    assert_eq!(ended.status.code(), Some(1), "{error}");
    assert!(
        error.contains("day 2023-11-15 was removed while"),
        "{error}"
    );
}

#[test]
fn what_verify_of_files_cannot_know_is_told() {
    let audit = Audit::with(10);
    let (_, said) = weir(&["audit", "verify", "--database"], &audit.path);
    assert!(said.contains("how many events were dropped"), "{said}");
}
