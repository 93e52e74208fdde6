//! Calls of a script that serves many keys at once, joined: what a thread asks within one turn of its runtime goes to the server as one
//! call. Owns who waits for which part of the answer. A cluster has keys in many slots, of which a script may touch one: there, each
//! call goes alone.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use futures_util::future::join_all;
use smallvec::SmallVec;
use tokio::sync::oneshot;
use tokio::time::timeout_at;
use tracing::info;

use super::{Arg, CallError, Connections, Doubles, Script, Value};
use crate::clock;
use crate::config::redis::Mode;
use crate::keys;

/// Calls in one, at most: others of the server wait while it is carried out, some 7 µs each.
const MOST: usize = 32;

/// A call that is to go with others.
#[derive(Debug)]
pub(super) struct Call {
    script: Arc<Script>,
    keys: SmallVec<[String; 1]>,
    arg: Doubles,
    deadline: Instant,
    answer: oneshot::Sender<Result<Value, CallError>>,
}

impl Connections {
    /// Runs a script that has an argument and a part of its reply for each of those who ask: the part for this one, which is waited for
    /// until `deadline`. `keys` are of one slot.
    pub async fn run_joined(
        self: &Arc<Self>,
        script: &Arc<Script>,
        keys: SmallVec<[String; 1]>,
        arg: Doubles,
        deadline: Instant,
    ) -> Result<Value, CallError> {
        let (answer, answered) = oneshot::channel();
        let call = Call {
            script: script.clone(),
            keys,
            arg,
            deadline,
            answer,
        };
        if !self.joins() {
            self.send_joined(vec![call]).await;
            return answered.await.unwrap_or(Err(CallError::Down));
        }
        let is_first = {
            let mut waiting = self.waiting.lock();
            waiting.push(call);
            waiting.len() == 1
        };
        if is_first {
            // It comes to its turn once all that is ready now has asked.
            tokio::spawn(self.clone().send_waiting());
        }
        match timeout_at(deadline.into(), answered).await {
            Ok(answer) => answer.unwrap_or(Err(CallError::Down)),
            Err(_) => Err(CallError::Timeout),
        }
    }

    fn joins(&self) -> bool {
        self.redis.settings.mode != Mode::Cluster && !self.redis.parts_keys.load(Ordering::Relaxed)
    }

    async fn send_waiting(self: Arc<Self>) {
        let mut waiting = std::mem::take(&mut *self.waiting.lock());
        // Those who have left meanwhile are to spend nothing.
        waiting.retain(|call| !call.answer.is_closed());
        let mut calls = Vec::with_capacity(1);
        while let Some(first) = waiting.first() {
            let script = first.script.clone();
            let mut of_script = waiting.extract_if(.., |call| Arc::ptr_eq(&call.script, &script));
            let of_script: Vec<_> = of_script.by_ref().take(MOST).collect();
            calls.push(self.send_joined(of_script));
        }
        join_all(calls).await;
    }

    /// Sends calls of one script as one, and tells each its part.
    async fn send_joined(&self, calls: Vec<Call>) {
        let error = match self.send_as_one(&calls).await {
            Ok(parts) => {
                for (call, part) in calls.into_iter().zip(parts) {
                    let part = self.unless_refused(part, &call.keys);
                    // Nobody hears it whose client has left.
                    let _ = call.answer.send(part);
                }
                return;
            }
            Err(error) => error,
        };
        if error != CallError::CrossSlot || calls.len() == 1 {
            for call in calls {
                let _ = call.answer.send(Err(error.clone()));
            }
            return;
        }
        if !self.redis.parts_keys.swap(true, Ordering::Relaxed) {
            info!(
                client = self.redis.name,
                "redis takes keys of one slot at a time: limits are asked one by one"
            );
        }
        let alone = calls.into_iter().map(|call| self.send_joined(vec![call]));
        Box::pin(join_all(alone)).await;
    }

    /// An array of one text says why the keys of this part could not be read or written, whatever became of the others.
    fn unless_refused(&self, part: Value, keys: &[String]) -> Result<Value, CallError> {
        let Value::Array(refusal) = &part else {
            return Ok(part);
        };
        let [Value::BulkString(said)] = refusal.as_slice() else {
            return Err(CallError::Nonsense);
        };
        let said = String::from_utf8_lossy(said).into_owned();
        let reason = match said.contains("OOM ") {
            true => "OOM",
            false => "WRONGTYPE",
        };
        let owner = keys
            .first()
            .and_then(|key| self.owner(keys::slot(key.as_bytes())));
        if let Some(node) = owner {
            self.redis.note_refused(&node.address, reason, &said);
        }
        Err(CallError::Refused(said))
    }

    async fn send_as_one(&self, calls: &[Call]) -> Result<Vec<Value>, CallError> {
        let [first, ..] = calls else {
            return Ok(Vec::new());
        };
        let keys = calls.iter().flat_map(|call| &call.keys);
        let keys: SmallVec<[&str; 4]> = keys.map(String::as_str).collect();
        let args: SmallVec<[Arg<'_>; 4]> = calls.iter().map(|call| call.arg.as_arg()).collect();
        let latest = calls.iter().map(|call| call.deadline).max();
        let budget = latest.unwrap_or(first.deadline);
        let budget = budget.saturating_duration_since(clock::now());
        match self.run_within(budget, &first.script, &keys, &args).await? {
            Value::Array(parts) if parts.len() == calls.len() => Ok(parts),
            _ => Err(CallError::Nonsense),
        }
    }
}
