//! The proxy's end of the audit's streams: batches are added, and it is learnt which are committed and which were lost. Must not
//! know what is in a batch.

use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

use crate::config::audit::Stream;
use crate::keys::Keys;
use crate::store::redis::{Arg, CallError, Connections, Script, Value};

/// No request waits for these calls.
const BUDGET: Duration = Duration::from_secs(1);

/// Why a batch is not in a stream for sure.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum AddError {
    #[error(
        "stream of the audit has as many entries as audit.stream.max_length lets it: is a worker running?"
    )]
    Full,
    #[error(transparent)]
    Call(#[from] CallError),
}

/// One thread's way to the streams.
pub struct Producer {
    redis: Arc<Connections>,
    keys: Keys,
    stream: Stream,
    add: Script,
    done: Script,
    missing: Script,
}

impl Producer {
    pub fn new(redis: Arc<Connections>, keys: Keys, stream: Stream) -> Producer {
        Producer {
            redis,
            keys,
            stream,
            add: Script::new(include_str!("../../../lua/audit_add.lua")),
            done: Script::new(include_str!("../../../lua/audit_done.lua")),
            missing: Script::new(include_str!("../../../lua/audit_missing.lua")),
        }
    }

    /// Adds a batch; the entry's id. After an error other than [`AddError::Full`] it may be there all the same.
    pub async fn add(&self, shard: u16, batch: &[u8]) -> Result<String, AddError> {
        let stream = self.keys.audit_stream(&self.stream.name, shard);
        let args = [Arg::Int(self.stream.max_length), Arg::Bytes(batch)];
        match self.run(&self.add, &stream, &args).await? {
            Value::BulkString(id) => Ok(String::from_utf8(id).map_err(|_| CallError::Nonsense)?),
            Value::Nil => Err(AddError::Full),
            _ => Err(CallError::Nonsense.into()),
        }
    }

    /// The first and last numbers of batches that workers say are committed, but for those whose first numbers are `known`:
    /// they are said no more.
    pub async fn done(&self, boot: &str, known: &[u64]) -> Result<Vec<(u64, u64)>, CallError> {
        let key = self.keys.audit_done(boot);
        let known: Vec<_> = known.iter().map(|first| Arg::Int(*first)).collect();
        let Value::Array(said) = self.run(&self.done, &key, &known).await? else {
            return Err(CallError::Nonsense);
        };
        let numbers = said
            .iter()
            .map(|value| number(value).ok_or(CallError::Nonsense));
        let numbers = numbers.collect::<Result<Vec<_>, _>>()?;
        let (pairs, _) = numbers.as_chunks();
        Ok(pairs.iter().map(|[first, last]| (*first, *last)).collect())
    }

    /// Which of the entries, by index, the stream no longer has.
    pub async fn missing(&self, shard: u16, ids: &[&str]) -> Result<Vec<usize>, CallError> {
        let stream = self.keys.audit_stream(&self.stream.name, shard);
        let args: Vec<_> = ids.iter().map(|id| Arg::Text(id)).collect();
        let Value::Array(said) = self.run(&self.missing, &stream, &args).await? else {
            return Err(CallError::Nonsense);
        };
        let index = |value: &Value| {
            let index = usize::try_from(number(value)?.checked_sub(1)?).ok()?;
            (index < ids.len()).then_some(index)
        };
        said.iter()
            .map(|value| index(value).ok_or(CallError::Nonsense))
            .collect()
    }

    async fn run(&self, script: &Script, key: &str, args: &[Arg<'_>]) -> Result<Value, CallError> {
        self.redis.run_within(BUDGET, script, &[key], args).await
    }
}

fn number(value: &Value) -> Option<u64> {
    match value {
        Value::Int(number) => u64::try_from(*number).ok(),
        Value::BulkString(text) => std::str::from_utf8(text).ok()?.parse().ok(),
        _ => None,
    }
}
