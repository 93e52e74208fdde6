//! The workers' side of the audit's streams: entries are read and taken over, and let go of once they are stored. Must not
//! know what is in them, nor let go of an entry that is not stored or with the dead letters.
//!
//! Commands that block are not used: a connection is shared by many calls.

use std::collections::{BTreeMap, HashMap};
use std::iter::Sum;
use std::sync::Arc;
use std::time::Duration;

use crate::clock::millis;
use crate::config::audit::{MOST_SHARDS, Stream};
use crate::keys::Keys;
use crate::store::redis::{Arg, CallError, Connections, Script, Value, read};

/// For a call. None is on a request's way, so a node under load is given time.
const BUDGET: Duration = Duration::from_secs(3);
/// How long what is done of a boot is kept past the last note of it, in seconds.
const DONE_KEPT: u64 = 3_600;
/// Batches that one call is about.
const AT_ONCE: usize = 2_000;
/// Streams that are asked together, of all that there can be.
const TOGETHER: usize = 32;

/// The streams, with the keys of each.
#[derive(Debug)]
pub struct Streams {
    pub(super) redis: Arc<Connections>,
    keys: Keys,
    /// Of the file, from 0.
    count: u16,
    /// All that there can be.
    pub(super) shards: Vec<Shard>,
    group: String,
    make_group: Script,
    say: Script,
    stored: Script,
    bury: Script,
    lag: Script,
    forget: Script,
    rewind: Script,
    pub(super) replay: Script,
}

#[derive(Debug)]
pub(super) struct Shard {
    pub(super) stream: String,
    pub(super) dead: String,
}

/// An entry of a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub shard: u16,
    pub id: String,
    /// The batch's bytes; empty in an entry that no weir has made.
    pub bytes: Vec<u8>,
}

/// Entries that were taken over, and where to look on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claimed {
    /// With how often each was given to a worker before.
    pub entries: Vec<(Entry, u64)>,
    /// `None`: that was all.
    pub next: Option<String>,
}

/// How far storing is behind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Lag {
    /// Of the oldest entry that is not stored, by the clock of its node; zero without one.
    pub oldest: Duration,
    /// Entries that are not stored,
    pub waiting: u64,
    /// those of them that a worker has.
    pub pending: u64,
    pub dead_letters: u64,
}

/// A batch that is committed: of a boot, by its first and last number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Done {
    pub boot: [u8; 16],
    pub first: u64,
    pub last: u64,
}

impl Streams {
    /// `redis` are the connections of the main client.
    pub fn new(redis: Arc<Connections>, keys: &Keys, stream: &Stream, group: &str) -> Streams {
        let shard = |n| Shard {
            stream: keys.audit_stream(&stream.name, n),
            dead: keys.audit_dead(&stream.name, n),
        };
        Streams {
            redis,
            keys: keys.clone(),
            count: stream.shards,
            shards: (0..MOST_SHARDS).map(shard).collect(),
            group: group.to_owned(),
            make_group: Script::new(include_str!("../../../lua/audit_group.lua")),
            say: Script::new(include_str!("../../../lua/audit_say.lua")),
            stored: Script::new(include_str!("../../../lua/audit_stored.lua")),
            bury: Script::new(include_str!("../../../lua/audit_bury.lua")),
            lag: Script::new(include_str!("../../../lua/audit_lag.lua")),
            forget: Script::new(include_str!("../../../lua/audit_consumers.lua")),
            rewind: Script::new(include_str!("../../../lua/audit_rewind.lua")),
            replay: Script::new(include_str!("../../../lua/audit_replay.lua")),
        }
    }

    /// How many the file says; they count from 0.
    pub fn count(&self) -> u16 {
        self.count
    }

    pub(super) fn shard(&self, shard: u16) -> &Shard {
        &self.shards[usize::from(shard)]
    }

    /// Up to `count` entries that no worker was given.
    pub async fn read(
        &self,
        shard: u16,
        consumer: &str,
        count: usize,
    ) -> Result<Vec<Entry>, CallError> {
        let stream = &self.shard(shard).stream;
        let words = [
            Arg::Text("XREADGROUP"),
            Arg::Text("GROUP"),
            Arg::Text(&self.group),
            Arg::Text(consumer),
            Arg::Text("COUNT"),
            Arg::Int(count as u64),
            Arg::Text("STREAMS"),
            Arg::Text(stream),
            Arg::Text(">"),
        ];
        // A list of streams, of which there is one: its name and entries.
        let streams = match self.in_group(shard, &words).await? {
            Value::Nil => return Ok(Vec::new()),
            streams => read::list(streams)?,
        };
        let stream = streams.into_iter().next().ok_or(CallError::Nonsense)?;
        let entries = read::list(stream)?.into_iter().nth(1);
        read::list(entries.ok_or(CallError::Nonsense)?)?
            .into_iter()
            .filter(|entry| *entry != Value::Nil)
            .map(|value| entry(shard, value))
            .collect()
    }

    /// Takes over up to `count` entries that were given to workers `idle` ago and are not stored yet. `from` is where the last
    /// look ended. That it is given out here counts, but for one that was `counted` times before: see [`Streams::count_try`].
    pub async fn claim(
        &self,
        shard: u16,
        consumer: &str,
        idle: Duration,
        from: Option<&str>,
        count: usize,
        counted: u64,
    ) -> Result<Claimed, CallError> {
        let stream = &self.shard(shard).stream;
        let words = [
            Arg::Text("XAUTOCLAIM"),
            Arg::Text(stream),
            Arg::Text(&self.group),
            Arg::Text(consumer),
            Arg::Int(millis(idle)),
            Arg::Text(from.unwrap_or("0-0")),
            Arg::Text("COUNT"),
            Arg::Int(count as u64),
            Arg::Text("JUSTID"),
        ];
        let answer = self.in_group(shard, &words).await?;
        let parts = read::list(answer)?;
        let [next, Value::Array(ids), ..] = &*parts else {
            return Err(CallError::Nonsense);
        };
        let next = read::text(next)?;
        let ids: Vec<_> = ids.iter().filter_map(|id| read::text(id).ok()).collect();
        let before = match (ids.first(), ids.last()) {
            (Some(first), Some(last)) => self.deliveries(stream, consumer, first, last).await?,
            _ => HashMap::new(),
        };
        // By the count that they come to have: a call sets one for all that it names.
        let mut given: BTreeMap<u64, Vec<&str>> = BTreeMap::new();
        for id in &ids {
            if let Some(before) = before.get(*id) {
                let count = before + u64::from(*before < counted);
                given.entry(count).or_default().push(*id);
            }
        }
        let mut found = HashMap::new();
        for (count, ids) in given {
            let words = [Arg::Text("RETRYCOUNT"), Arg::Int(count)];
            let entries = self.give(shard, consumer, &ids, &words).await?;
            let entries = read::list(entries)?.into_iter();
            // Before 7.0, each that is gone is nil.
            for value in entries.filter(|entry| *entry != Value::Nil) {
                let entry = entry(shard, value)?;
                found.insert(entry.id.clone(), entry);
            }
        }
        let in_order = ids
            .iter()
            .filter_map(|id| Some((found.remove(*id)?, before[*id])));
        Ok(Claimed {
            entries: in_order.collect(),
            next: (next != "0-0").then(|| next.to_owned()),
        })
    }

    /// How often each of the consumer's entries between two was given to a worker.
    async fn deliveries(
        &self,
        stream: &str,
        consumer: &str,
        first: &str,
        last: &str,
    ) -> Result<HashMap<String, u64>, CallError> {
        let words = [
            Arg::Text("XPENDING"),
            Arg::Text(stream),
            Arg::Text(&self.group),
            Arg::Text(first),
            Arg::Text(last),
            Arg::Int(10_000),
            Arg::Text(consumer),
        ];
        let answer = self.redis.command(BUDGET, stream, &words).await?;
        let count = |entry| match &*read::list(entry)? {
            [id, _consumer, _idle, deliveries] => {
                Ok((read::text(id)?.to_owned(), read::number(deliveries)?))
            }
            _ => Err(CallError::Nonsense),
        };
        read::list(answer)?.into_iter().map(count).collect()
    }

    /// Counts a try of an entry that was taken over uncounted. False if it waits no more.
    pub async fn count_try(&self, shard: u16, consumer: &str, id: &str) -> Result<bool, CallError> {
        let entries = self.give(shard, consumer, &[id], &[]).await?;
        // Before 7.0, one that is gone is nil.
        Ok(read::list(entries)?
            .iter()
            .any(|entry| *entry != Value::Nil))
    }

    /// Gives a consumer entries that wait, whoever has them; what is to be other than usual is in `words`.
    async fn give(
        &self,
        shard: u16,
        consumer: &str,
        ids: &[&str],
        words: &[Arg<'_>],
    ) -> Result<Value, CallError> {
        let stream = &self.shard(shard).stream;
        let mut claim = vec![
            Arg::Text("XCLAIM"),
            Arg::Text(stream),
            Arg::Text(&self.group),
            Arg::Text(consumer),
            Arg::Int(0),
        ];
        claim.extend(ids.iter().map(|id| Arg::Text(id)));
        claim.extend(words);
        self.redis.command(BUDGET, stream, &claim).await
    }

    /// Sends a command that needs the group. Where Redis has lost it, or never had it, it is made, and the command sent again.
    async fn in_group(&self, shard: u16, words: &[Arg<'_>]) -> Result<Value, CallError> {
        let stream = &self.shard(shard).stream;
        match self.redis.command(BUDGET, stream, words).await {
            Err(CallError::Refused(said)) if said.contains("NOGROUP") => {
                self.make_group(stream).await?;
                self.redis.command(BUDGET, stream, words).await
            }
            answer => answer,
        }
    }

    async fn make_group(&self, stream: &str) -> Result<(), CallError> {
        let args = [Arg::Text(&self.group)];
        self.redis
            .run_within(BUDGET, &self.make_group, &[stream], &args)
            .await
            .map(drop)
    }

    /// Notes for their boots that these batches are committed. What is not heard is sent again, and found stored.
    pub async fn done(&self, batches: &[Done]) -> Result<(), CallError> {
        let mut boots: HashMap<[u8; 16], Vec<&Done>> = HashMap::new();
        for done in batches {
            boots.entry(done.boot).or_default().push(done);
        }
        let said = boots.iter().map(|(boot, done)| self.say(boot, done));
        let said = futures_util::future::join_all(said).await;
        said.into_iter().collect()
    }

    async fn say(&self, boot: &[u8; 16], done: &[&Done]) -> Result<(), CallError> {
        let key = self
            .keys
            .audit_done(&uuid::Uuid::from_bytes(*boot).to_string());
        for done in done.chunks(AT_ONCE) {
            let mut args = vec![Arg::Int(DONE_KEPT)];
            args.extend(
                done.iter()
                    .flat_map(|done| [done.first, done.last].map(Arg::Int)),
            );
            self.redis
                .run_within(BUDGET, &self.say, &[&key], &args)
                .await?;
        }
        Ok(())
    }

    /// Lets go of entries of one stream whose batches are committed.
    pub async fn let_go(&self, shard: u16, ids: &[&str]) -> Result<(), CallError> {
        let stream = &self.shard(shard).stream;
        for ids in ids.chunks(AT_ONCE) {
            let mut args = vec![Arg::Text(&self.group)];
            args.extend(ids.iter().map(|id| Arg::Text(id)));
            self.redis
                .run_within(BUDGET, &self.stored, &[stream], &args)
                .await?;
        }
        Ok(())
    }

    /// Moves an entry to the dead letters; false if it was not there any more.
    pub async fn bury(&self, shard: u16, id: &str, reason: &str) -> Result<bool, CallError> {
        let Shard { stream, dead } = self.shard(shard);
        let args = [&self.group, id, reason].map(Arg::Text);
        let answer = self
            .redis
            .run_within(BUDGET, &self.bury, &[stream, dead], &args)
            .await?;
        read::is_one(&answer)
    }

    /// Leaves entries that the consumer was given to others, who may take them over at once if they do after `idle`. That it was
    /// given them does not count.
    pub async fn leave(
        &self,
        shard: u16,
        consumer: &str,
        ids: &[&str],
        idle: Duration,
    ) -> Result<(), CallError> {
        let words = [
            Arg::Text("IDLE"),
            Arg::Int(millis(idle)),
            Arg::Text("RETRYCOUNT"),
            Arg::Int(0),
            Arg::Text("JUSTID"),
        ];
        for ids in ids.chunks(AT_ONCE) {
            self.give(shard, consumer, ids, &words).await?;
        }
        Ok(())
    }

    /// Forgets consumers that have asked for nothing for so long and have no entries left; how many.
    pub async fn forget_consumers(&self, shard: u16, idle: Duration) -> Result<u64, CallError> {
        let stream = &self.shard(shard).stream;
        let args = [Arg::Text(&self.group), Arg::Int(millis(idle))];
        let answer = self
            .redis
            .run_within(BUDGET, &self.forget, &[stream], &args)
            .await?;
        read::number(&answer)
    }

    /// Has a stream read from the start again whose oldest entry would be given to no worker any more; whether it had one.
    pub async fn rewind(&self, shard: u16) -> Result<bool, CallError> {
        let stream = &self.shard(shard).stream;
        let args = [Arg::Text(&self.group)];
        let answer = self
            .redis
            .run_within(BUDGET, &self.rewind, &[stream], &args)
            .await?;
        read::is_one(&answer)
    }

    /// How far the storing of all streams is behind, of those beyond the file's as far as they answer. An error if one of the file's does not.
    pub async fn lag(&self) -> Result<Lag, CallError> {
        let lags = self.lags().await.into_iter();
        let own: Lag = lags.sum::<Result<_, _>>()?;
        let beyond = self.lags_beyond().await.into_iter();
        Ok(beyond.map(|(_, lag)| lag).chain([own]).sum())
    }

    /// How far the storing of each stream is behind, as far as they answer.
    pub async fn lags(&self) -> Vec<Result<Lag, CallError>> {
        let each = (0..self.count()).map(|shard| self.lag_of(shard));
        futures_util::future::join_all(each).await
    }

    /// How far the storing is behind of each stream beyond [`Streams::count`], as far as they answer: weirs whose file says more have them, or had
    /// them.
    pub async fn lags_beyond(&self) -> Vec<(u16, Lag)> {
        let beyond: Vec<_> = (self.count..MOST_SHARDS).collect();
        let mut lags = Vec::new();
        for shards in beyond.chunks(TOGETHER) {
            let each = shards
                .iter()
                .map(async |shard| Some((*shard, self.lag_of(*shard).await.ok()?)));
            let said = futures_util::future::join_all(each).await;
            lags.extend(said.into_iter().flatten());
        }
        lags
    }

    async fn lag_of(&self, shard: u16) -> Result<Lag, CallError> {
        let Shard { stream, dead } = self.shard(shard);
        let args = [Arg::Text(&self.group)];
        let answer = self
            .redis
            .run_within(BUDGET, &self.lag, &[stream, dead], &args)
            .await?;
        match &*read::list(answer)? {
            [waiting, pending, age, dead_letters] => Ok(Lag {
                oldest: Duration::from_millis(read::number(age)?),
                waiting: read::number(waiting)?,
                pending: read::number(pending)?,
                dead_letters: read::number(dead_letters)?,
            }),
            _ => Err(CallError::Nonsense),
        }
    }
}

impl Lag {
    /// As it is after that time, where nothing was stored meanwhile.
    pub fn aged(self, by: Duration) -> Lag {
        Lag {
            oldest: self.oldest + by,
            ..self
        }
    }
}

/// Of several streams: the oldest entry of any, and the sums.
impl Sum for Lag {
    fn sum<I: Iterator<Item = Lag>>(lags: I) -> Lag {
        lags.fold(Lag::default(), |all, one| Lag {
            oldest: all.oldest.max(one.oldest),
            waiting: all.waiting + one.waiting,
            pending: all.pending + one.pending,
            dead_letters: all.dead_letters + one.dead_letters,
        })
    }
}

/// Of an entry as streams have it: its id, and its fields each behind its name.
fn entry(shard: u16, value: Value) -> Result<Entry, CallError> {
    let (id, fields) = named(value)?;
    let bytes = fields.into_iter().find(|(name, _)| name == b"b");
    Ok(Entry {
        shard,
        id,
        bytes: bytes.map(|(_, bytes)| bytes).unwrap_or_default(),
    })
}

type Named = (String, Vec<(Vec<u8>, Vec<u8>)>);

pub(super) fn named(value: Value) -> Result<Named, CallError> {
    let mut parts = read::list(value)?.into_iter();
    let (Some(id), Some(fields)) = (parts.next(), parts.next()) else {
        return Err(CallError::Nonsense);
    };
    let id = read::text(&id)?.to_owned();
    let mut fields = read::list(fields)?.into_iter();
    let mut named = Vec::new();
    while let (Some(name), Some(value)) = (fields.next(), fields.next()) {
        named.push((read::bytes(name)?, read::bytes(value)?));
    }
    Ok((id, named))
}
