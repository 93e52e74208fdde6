//! Calls of a script that serves many keys at once: what is asked within one turn is one call, and each who asked gets the part that is its own.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use weir::clock;
use weir::store::redis::{CallError, Connections, Doubles, Script, Value};

use super::harness::DEADLINE;
use super::harness::calls::on_a_lane;
use super::harness::redis::{Server, key_prefix};

/// For each key: its argument behind how often it was asked for.
const EACH: &str = "local replies = {}
for i = 1, #KEYS do replies[i] = redis.call('INCR', KEYS[i]) .. ARGV[i] end
return replies";
const AT_A_TIME: usize = 100;

/// Asks for so many keys within one turn; what each is answered, by its number.
async fn ask(
    redis: &Arc<Connections>,
    script: &Arc<Script>,
    at_a_time: usize,
    patience: Duration,
) -> Vec<Result<Value, CallError>> {
    let prefix = key_prefix();
    let one = |number: usize| {
        let mut arg = Doubles::default();
        arg.push(number as f64);
        let keys = [format!("{{{prefix}{number}}}")].into_iter().collect();
        redis.run_joined(script, keys, arg, clock::now() + patience)
    };
    join_all((0..at_a_time).map(one)).await
}

/// Each was asked for once, and hears its own part.
#[track_caller]
fn each_has_its_own(answers: Vec<Result<Value, CallError>>) {
    for (number, answer) in answers.into_iter().enumerate() {
        let expected = [&b"1"[..], &(number as f64).to_le_bytes()].concat();
        assert_eq!(answer, Ok(Value::BulkString(expected)), "{number}");
    }
}

/// How often a server has run scripts by their hash.
fn calls(server: &Server) -> u64 {
    let said = server.cli(&["INFO", "commandstats"]);
    let of_hash = |line: &str| Some(line.strip_prefix("cmdstat_evalsha:calls=")?.to_owned());
    let line = said.text().lines().find_map(of_hash);
    let count = line.as_deref().and_then(|line| line.split(',').next());
    count.map_or(0, |count| count.parse().unwrap())
}

fn yaml(server: &Server) -> String {
    let yaml = server.yaml("t");
    yaml.replace("{urls", "{timeout: 5s, urls")
}

#[test]
fn what_is_asked_within_one_turn_is_a_few_calls() {
    let server = Server::single();
    on_a_lane(&yaml(&server), async |redis| {
        assert!(redis.ready(DEADLINE).await);
        let script = Arc::new(Script::new(EACH));
        each_has_its_own(ask(&redis, &script, AT_A_TIME, DEADLINE).await);
        let before = calls(&server);
        each_has_its_own(ask(&redis, &script, AT_A_TIME, DEADLINE).await);
        let calls = calls(&server) - before;
        println!("{AT_A_TIME} asked, for {calls} calls");
        // At most 32 in one.
        assert_eq!(calls, 4);
    });
}

/// As a proxy in front of a cluster has, which weir was told of as of one server.
#[test]
fn a_server_that_parts_keys_by_slots_is_asked_one_by_one() {
    let server = Server::with(|_, _| "cluster-enabled yes\n".to_owned());
    let slots: Vec<_> = (0..16384).map(|slot| slot.to_string()).collect();
    let slots = slots.iter().map(String::as_str);
    server.cli(
        &["CLUSTER", "ADDSLOTS"]
            .into_iter()
            .chain(slots)
            .collect::<Vec<_>>(),
    );
    super::harness::eventually(|| server.says(&["CLUSTER", "INFO"], "cluster_state", "ok"));
    on_a_lane(&yaml(&server), async |redis| {
        assert!(redis.ready(DEADLINE).await);
        let script = Arc::new(Script::new(EACH));
        each_has_its_own(ask(&redis, &script, AT_A_TIME, DEADLINE).await);
        let before = calls(&server);
        each_has_its_own(ask(&redis, &script, AT_A_TIME, DEADLINE).await);
        assert_eq!(calls(&server) - before, AT_A_TIME as u64);
    });
}

#[test]
fn each_who_asked_hears_that_there_is_no_answer() {
    let server = Server::single();
    on_a_lane(&yaml(&server), async |redis| {
        assert!(redis.ready(DEADLINE).await);
        let script = Arc::new(Script::new(EACH));
        server.pause();
        let answers = ask(&redis, &script, AT_A_TIME, Duration::from_millis(50)).await;
        assert_eq!(answers, vec![Err(CallError::Timeout); AT_A_TIME]);
        server.resume();
        let broken = Arc::new(Script::new("return 1"));
        let answers = ask(&redis, &broken, AT_A_TIME, DEADLINE).await;
        assert_eq!(answers, vec![Err(CallError::Nonsense); AT_A_TIME]);
        each_has_its_own(ask(&redis, &script, AT_A_TIME, DEADLINE).await);
    });
}

/// Of one key, whose type is another, or of those that have something to write where nothing more may be written.
#[test]
fn a_key_that_cannot_be_written_spoils_no_other() {
    let server = Server::single();
    let said = "return {ARGV[1], {'WRONGTYPE it is a list'}, ARGV[3]}";
    on_a_lane(&yaml(&server), async |redis| {
        assert!(redis.ready(DEADLINE).await);
        let script = Arc::new(Script::new(said));
        let [first, second, third] = &ask(&redis, &script, 3, DEADLINE).await[..] else {
            unreachable!("three were asked");
        };
        let own = |number: f64| Ok(Value::BulkString(number.to_le_bytes().to_vec()));
        assert_eq!((first, third), (&own(0.0), &own(2.0)));
        let refused = CallError::Refused("WRONGTYPE it is a list".to_owned());
        assert_eq!(second, &Err(refused));
        assert_eq!(
            redis.client().refuses().as_deref(),
            Some("WRONGTYPE it is a list")
        );
    });
}
