//! `weir audit dead-letters`, as an operator uses it.

#![expect(
    clippy::unwrap_used,
    reason = "a broken step of a test is a failed test"
)]

mod harness;

use std::path::Path;
use std::process::Command;

use harness::process::file;
use harness::redis::{Answer, Server};

fn weir(config: &Path, arguments: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_weir"))
        .args(["audit", "dead-letters"])
        .args(arguments)
        .arg("-c")
        .arg(config)
        .output()
        .unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(said).unwrap())
}

#[test]
fn dead_letters_are_listed_replayed_and_dropped() {
    let redis = Server::single();
    let config = file(&format!(
        "listen: 127.0.0.1:0\nupstream: http://127.0.0.1:1\naudit: {{stream: {{shards: 3}}}}\n{}",
        redis.yaml("w")
    ));
    let weir = |arguments: &[&str]| weir(config.path(), arguments);
    assert_eq!(weir(&[]), (Some(0), String::new()));
    let stream = |shard: u16| format!("w:a:{{audit.{shard}}}");
    let bury = |shard: u16, id: &str| {
        let dead = stream(shard) + ":dead";
        let fields = [
            "reason",
            "no\u{1b}good",
            "id",
            "1-1",
            "at",
            "1000",
            "b",
            "damaged",
        ];
        let words = [&["XADD", &dead, id][..], &fields].concat();
        redis.cli(&words);
    };
    bury(0, "5-0");
    bury(2, "6-0");
    bury(2, "7-1");
    let (code, said) = weir(&["list"]);
    let lines: Vec<Vec<_>> = said
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!((code, lines.len()), (Some(0), 4), "{said}");
    assert_eq!(
        lines[0],
        ["ID", "AGE", "INSTANCE", "BOOT", "EVENTS", "REASON"]
    );
    assert_eq!(
        (lines[1][0], lines[2][0], lines[3][0]),
        ("0/5-0", "2/6-0", "2/7-1")
    );
    // Nothing in it drives the terminal.
    assert_eq!(lines[1][2..], ["?", "?", "?", "no\u{fffd}good"]);

    let count = |key: &str| redis.cli(&["XLEN", key]);
    assert_eq!(
        weir(&["replay", "2/6-0"]),
        (Some(0), "replayed 1\n".to_owned())
    );
    assert_eq!(count(&stream(2)), Answer::Int(1));
    let (code, said) = weir(&["drop", "2/6-0", "2/7-1", "9/1-1"]);
    let expected = "2/6-0: not there\n9/1-1: not there\ndropped 1\n";
    assert_eq!((code, said.as_str()), (Some(1), expected));
    assert_eq!(count(&(stream(2) + ":dead")), Answer::Int(0));
    assert_eq!(count(&stream(2)), Answer::Int(1));
    bury(1, "8-0");
    assert_eq!(
        weir(&["replay", "--all"]),
        (Some(0), "replayed 2\n".to_owned())
    );
    assert_eq!(
        (count(&stream(0)), count(&stream(1))),
        (Answer::Int(1), Answer::Int(1))
    );
    assert_eq!(
        weir(&["drop", "--all"]),
        (Some(0), "dropped 0\n".to_owned())
    );
    for bad in [
        &["drop"][..],
        &["replay", "7-1"],
        &["drop", "--all", "2/7-1"],
    ] {
        assert_eq!(weir(bad).0, Some(2), "{bad:?}");
    }
    let alone = file("listen: 127.0.0.1:0\nupstream: http://127.0.0.1:1\n");
    let (code, said) = self::weir(alone.path(), &["list"]);
    assert!(code == Some(1) && said.contains("no redis"), "{said}");
}
