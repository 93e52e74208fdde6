//! The dead letters of the audit: batches that could not be stored, each with the reason, for an operator to look at, try anew
//! or drop.

use std::time::Duration;

use super::consume::{Shard, Streams, named};
use crate::event::Micros;
use crate::store::redis::{Arg, CallError, read};

/// For a call, which whoever has typed the command waits for.
const BUDGET: Duration = Duration::from_secs(5);

/// A batch that could not be stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetter {
    pub shard: u16,
    /// Its own, among the dead letters of its stream.
    pub id: String,
    /// Of the entry that it was.
    pub entry: String,
    pub reason: String,
    /// When it was given up.
    pub at: Micros,
    /// The batch.
    pub bytes: Vec<u8>,
}

impl Streams {
    /// The dead letters of a stream behind the one of this id, the oldest first; at most `count`. `to` is the last of them that is
    /// asked for.
    pub async fn dead_letters(
        &self,
        shard: u16,
        after: Option<&str>,
        to: Option<&str>,
        count: usize,
    ) -> Result<Vec<DeadLetter>, CallError> {
        let from = after.map_or("-".to_owned(), |id| format!("({id}"));
        self.letters(shard, "XRANGE", &from, to.unwrap_or("+"), count)
            .await
    }

    /// The id of the newest dead letter of a stream.
    pub async fn newest_dead_letter(&self, shard: u16) -> Result<Option<String>, CallError> {
        let newest = self.letters(shard, "XREVRANGE", "+", "-", 1).await?.pop();
        Ok(newest.map(|letter| letter.id))
    }

    async fn letters(
        &self,
        shard: u16,
        command: &str,
        from: &str,
        to: &str,
        count: usize,
    ) -> Result<Vec<DeadLetter>, CallError> {
        let Shard { dead, .. } = self.shard(shard);
        let words = [
            Arg::Text(command),
            Arg::Text(dead),
            Arg::Text(from),
            Arg::Text(to),
            Arg::Text("COUNT"),
            Arg::Int(count as u64),
        ];
        let answer = self.redis.command(BUDGET, dead, &words).await?;
        let letter = |value| {
            let (id, fields) = named(value)?;
            let mut letter = DeadLetter {
                shard,
                id,
                entry: String::new(),
                reason: String::new(),
                at: Micros(0),
                bytes: Vec::new(),
            };
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            for (name, value) in fields {
                match name.as_slice() {
                    b"b" => letter.bytes = value,
                    b"reason" => letter.reason = text(&value),
                    b"id" => letter.entry = text(&value),
                    b"at" => {
                        let millis = text(&value).parse().unwrap_or_default();
                        letter.at = Duration::from_millis(millis).into();
                    }
                    _ => {}
                }
            }
            Ok(letter)
        };
        read::list(answer)?.into_iter().map(letter).collect()
    }

    /// Puts a dead letter back into its stream; false if there is none of this id.
    pub async fn replay(&self, shard: u16, id: &str) -> Result<bool, CallError> {
        let Shard { stream, dead } = self.shard(shard);
        let answer = self
            .redis
            .run_within(BUDGET, &self.replay, &[dead, stream], &[Arg::Text(id)])
            .await?;
        read::is_one(&answer)
    }

    /// Drops a dead letter: its events are lost. False if there is none of this id.
    pub async fn drop_dead_letter(&self, shard: u16, id: &str) -> Result<bool, CallError> {
        let Shard { dead, .. } = self.shard(shard);
        let words = ["XDEL", dead, id].map(Arg::Text);
        let answer = self.redis.command(BUDGET, dead, &words).await?;
        read::is_one(&answer)
    }
}
