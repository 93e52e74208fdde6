//! Overrides of shared limits that were set at run time: kept in Redis for all processes, in words, as the admin API takes them. Must
//! not know what the words mean.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::store::fleet::Fleet;
use crate::store::redis::{Arg, CallError, Connections, Script, Value};

/// For which overrides are kept after the last process has looked at them.
const KEPT: Duration = Duration::from_secs(30 * 86_400);
/// What is said on the channel of limits when overrides have changed.
pub const CHANGED: &[u8] = b"changed";
/// No request waits for it.
const BUDGET: Duration = Duration::from_secs(1);

/// The scripts of overrides.
#[derive(Debug)]
pub struct Overrides {
    put: Script,
    all: Script,
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

impl Default for Overrides {
    fn default() -> Overrides {
        Overrides {
            put: Script::new(include_str!("../../../lua/override_put.lua")),
            all: Script::new(include_str!("../../../lua/override_all.lua")),
        }
    }
}

impl Overrides {
    /// Sets one, or with `None` takes it back, and tells all processes; whether there was one before.
    pub async fn put(
        &self,
        redis: &Connections,
        fleet: &Fleet,
        (limit, key): (&str, &str),
        says: Option<&str>,
    ) -> Result<bool, CallError> {
        let place = serde_json::json!([limit, key]).to_string();
        let args = [
            Arg::Text(&place),
            Arg::Text(says.unwrap_or_default()),
            kept(),
            Arg::Text(&fleet.keys.limits_channel()),
        ];
        let hash = fleet.keys.overrides();
        let before = redis.run_within(BUDGET, &self.put, &[&hash], &args).await?;
        Ok(before == Value::Int(1))
    }

    /// All that are set.
    pub async fn all(&self, redis: &Connections, fleet: &Fleet) -> Result<Vec<Words>, CallError> {
        let hash = fleet.keys.overrides();
        let (keys, args) = ([hash.as_str()], [kept()]);
        let all = redis.run_within(BUDGET, &self.all, &keys, &args).await?;
        let Value::Array(all) = all else {
            return Err(CallError::Nonsense);
        };
        let words = all.chunks(2).map(|pair| {
            let [Value::BulkString(place), Value::BulkString(says)] = pair else {
                return None;
            };
            let (limit, key) = serde_json::from_slice(place).ok()?;
            let says = String::from_utf8(says.clone()).ok()?;
            Some(Words { limit, key, says })
        });
        words.collect::<Option<_>>().ok_or(CallError::Nonsense)
    }
}

fn kept() -> Arg<'static> {
    Arg::Int(u64::try_from(KEPT.as_millis()).unwrap_or(u64::MAX))
}
