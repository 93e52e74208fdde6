//! Overrides of shared limits that were set at run time: kept in Redis for all processes, in words, as the admin API takes them. Must
//! not know what the words mean.

use std::sync::LazyLock;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::clock;
use crate::store::fleet::Fleet;
use crate::store::redis::{Arg, CallError, Connections, Script, Value};

/// For which overrides are kept after the last process has looked at them.
const KEPT: Duration = Duration::from_secs(30 * 86_400);
/// What is said on the channel of limits when overrides have changed.
pub const CHANGED: &[u8] = b"changed";
/// The name of their number, beside them: to versions of weir that know none it is the override of a limit that nobody has.
const NUMBER: &str = r#"["","number"]"#;
/// No request waits for it.
const BUDGET: Duration = Duration::from_secs(1);

static PUT: LazyLock<Script> =
    LazyLock::new(|| Script::new(include_str!("../../../lua/override_put.lua")));
static ALL: LazyLock<Script> =
    LazyLock::new(|| Script::new(include_str!("../../../lua/override_all.lua")));
static BACK: LazyLock<Script> =
    LazyLock::new(|| Script::new(include_str!("../../../lua/override_back.lua")));

/// All that are set.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Kept {
    /// Goes up with each change; 0 where there never was one.
    pub number: u64,
    pub words: Vec<Words>,
}

/// A key that an operator has reset, as processes tell each other.
#[derive(Debug, Serialize, Deserialize)]
pub struct Reset {
    pub limit: String,
    pub parts: Vec<String>,
}

/// One that is set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Words {
    pub limit: String,
    /// The parts of the key, joined by `:`.
    pub key: String,
    /// For example `500/s`.
    pub says: String,
}

/// Sets one, or with `None` takes it back, and tells all processes; whether there was one before.
pub async fn put(
    redis: &Connections,
    fleet: &Fleet,
    (limit, key): (&str, &str),
    says: Option<&str>,
) -> Result<bool, CallError> {
    let place = place(limit, key);
    let args = [
        Arg::Text(&place),
        Arg::Text(says.unwrap_or_default()),
        kept(),
        Arg::Text(&fleet.keys.limits_channel()),
        Arg::Text(NUMBER),
    ];
    let hash = fleet.keys.overrides();
    let before = redis.run_within(BUDGET, &PUT, &[&hash], &args).await?;
    Ok(before == Value::Int(1))
}

/// All that are set.
pub async fn all(redis: &Connections, fleet: &Fleet) -> Result<Kept, CallError> {
    let hash = fleet.keys.overrides();
    let args = [kept(), Arg::Text(NUMBER)];
    let all = redis.run_within(BUDGET, &ALL, &[&hash], &args).await?;
    read(&all).ok_or(CallError::Nonsense)
}

/// Tells a Redis that has an older number those that are `known`; what it has then.
pub async fn put_back(redis: &Connections, fleet: &Fleet, known: &Kept) -> Result<Kept, CallError> {
    let (hash, channel) = (fleet.keys.overrides(), fleet.keys.limits_channel());
    let words = known.words.iter();
    let places: Vec<_> = words.map(|it| place(&it.limit, &it.key)).collect();
    let mut args = vec![
        kept(),
        Arg::Text(NUMBER),
        Arg::Int(known.number),
        Arg::Text(&channel),
    ];
    for (place, words) in places.iter().zip(&known.words) {
        args.extend([Arg::Text(place), Arg::Text(&words.says)]);
    }
    let all = redis.run_within(BUDGET, &BACK, &[&hash], &args).await?;
    read(&all).ok_or(CallError::Nonsense)
}

fn place(limit: &str, key: &str) -> String {
    serde_json::json!([limit, key]).to_string()
}

fn read(all: &Value) -> Option<Kept> {
    let Value::Array(all) = all else {
        return None;
    };
    let mut kept = Kept::default();
    for pair in all.chunks(2) {
        let [Value::BulkString(place), Value::BulkString(says)] = pair else {
            return None;
        };
        let says = String::from_utf8(says.clone()).ok()?;
        if place == NUMBER.as_bytes() {
            kept.number = says.parse().ok()?;
            continue;
        }
        let (limit, key) = serde_json::from_slice(place).ok()?;
        kept.words.push(Words { limit, key, says });
    }
    Some(kept)
}

fn kept() -> Arg<'static> {
    Arg::Int(clock::millis(KEPT))
}
