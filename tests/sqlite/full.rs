//! Retention of the audit in SQLite on a disk that is full to the last byte: the days that it removes are what makes room.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::harness::process::{Running, faketime, file};
use super::harness::sqlite::{DAY, batch, today};
use super::harness::stack::fill;
use super::harness::{PATIENCE, Upstream, eventually_within};
use tempfile::{NamedTempFile, TempDir};
use weir::clock;
use weir::store::sqlite::{Files, Writer};

/// A disk of its own, for a weir that keeps three days there.
struct Disk {
    folder: TempDir,
    config: NamedTempFile,
    _upstream: Upstream,
}

impl Disk {
    /// With files of days so long before `now`, the newest last.
    fn with(ago: &[u32], now: Duration) -> Disk {
        let folder = tempfile::tempdir().unwrap();
        for name in ["disk", "made"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        let upstream = Upstream::answering("");
        let config = file(&format!(
            "listen: 127.0.0.1:0\nupstream: {}\nadmin: {{address: 127.0.0.1:0}}\n\
             audit: {{sqlite: {{path: {}, retention: 3d}}}}\n",
            upstream.url(),
            folder.path().join("disk/audit.db").display()
        ));
        let made = folder.path().join("made/audit.db");
        let day = |ago: u32| now - DAY * ago;
        let mut writer = Writer::open(&made, "a", None, day(ago[0])).unwrap();
        for ago in ago {
            writer.append(&mut [batch(1..=2_000)], day(*ago)).unwrap();
        }
        drop(writer);
        let files = Files::new(&made, None);
        files.close_days(|_| {}).unwrap();
        files.keep_reserve();
        Disk {
            folder,
            config,
            _upstream: upstream,
        }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("disk")
    }

    /// Starts weir on it, once `more` is done there. Nobody has left a log beside the files.
    fn start(&self, more: &str, environment: &[(&str, &str)]) -> Running {
        let script = format!(
            "cd {}; mount -t tmpfs -o size=6m tmpfs disk; cp -p made/*.db made/*.reserve disk/; {more}",
            self.folder.path().display()
        );
        Running::start_after(&script, self.config.path(), environment)
    }

    /// Sends requests until one more is on record.
    fn until_written(&self, weir: &Running) {
        let before = written(weir);
        eventually_within(PATIENCE, || {
            assert_eq!(weir.client().get("/").status, 200);
            written(weir) > before
        });
    }

    /// By weir's own proof, of what that process sees.
    fn is_whole(&self, weir: &Running) {
        let output = Command::new("nsenter")
            .args(["-m", "-t", &weir.child.id().to_string()])
            .args([env!("CARGO_BIN_EXE_weir"), "audit", "verify", "--database"])
            .arg(self.path().join("audit.db"))
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
    }
}

fn written(weir: &Running) -> u64 {
    weir.metric("weir_audit_events_total{result=\"written\"}")
}

fn removed(weir: &Running) -> u64 {
    weir.metric("weir_audit_files_removed_total")
}

fn has_reserve(weir: &Running, disk: &Path) -> bool {
    let reserve = weir.sees(&disk.join("audit.db.reserve"));
    fs::metadata(reserve).is_ok_and(|reserve| reserve.len() > 0)
}

#[test]
fn a_day_is_removed_from_a_disk_that_is_full_at_the_start() {
    let disk = Disk::with(&[5, 1], today());
    let weir = disk.start("cat /dev/zero > disk/filler 2> /dev/null || true", &[]);
    disk.until_written(&weir);
    assert_eq!(removed(&weir), 1);
    eventually_within(PATIENCE, || has_reserve(&weir, &disk.path()));
    disk.is_whole(&weir);
}

#[test]
fn a_day_is_removed_from_a_disk_that_has_become_full() {
    // By a clock that is far from midnight.
    let now = clock::wall();
    let noon = Duration::from_secs(now.as_secs() / 86_400 * 86_400 + 43_200);
    let disk = Disk::with(&[3, 1, 0], noon);
    let offset = disk.folder.path().join("offset");
    let set_to = |time: Duration| {
        let ahead = time.as_secs() as i64 - now.as_secs() as i64;
        fs::write(&offset, format!("{ahead:+}\n")).unwrap();
    };
    set_to(noon);
    let library = faketime();
    let environment = [
        ("LD_PRELOAD", library.as_str()),
        ("FAKETIME_TIMESTAMP_FILE", offset.to_str().unwrap()),
        ("FAKETIME_NO_CACHE", "1"),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
    ];
    let weir = disk.start("rm disk/audit.db.reserve", &environment);
    eventually_within(PATIENCE, || has_reserve(&weir, &disk.path()));
    disk.until_written(&weir);
    assert_eq!(removed(&weir), 0);
    let filler = weir.sees(&disk.path().join("filler"));
    eventually_within(PATIENCE, || {
        fill(&filler);
        assert_eq!(weir.client().get("/").status, 200);
        weir.metric("weir_audit_events_total{result=\"failed_write\"}") > 3
    });
    set_to(noon + DAY);
    disk.until_written(&weir);
    assert_eq!(removed(&weir), 1);
    eventually_within(PATIENCE, || has_reserve(&weir, &disk.path()));
    disk.is_whole(&weir);
}
