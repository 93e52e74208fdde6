//! Which node has which slot, and how that is found out: by `CLUSTER SLOTS`, by a sentinel, or by the file. One task of the
//! process asks; connections follow.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::select_all;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt as _, StreamExt as _};
use redis::{Pipeline, RedisConnectionInfo, RedisError, Value};
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use super::Redis;
use super::push::Speakers;
use crate::config::redis::{Client, Endpoint, Mode};
use crate::keys::SLOTS;
use crate::policy::retry::{Pauses, equal_jitter};

/// Between looks at a cluster that gives no reason to look.
const LOOK_EVERY: Duration = Duration::from_secs(30);
/// Between looks at one that does, while nothing changes. An election takes seconds, and who won is to be known soon after.
const LOOK_AGAIN: Pauses = Pauses {
    first: Duration::from_millis(150),
    longest: Duration::from_millis(750),
};
/// A node that has not answered by then is not waited for before the next one is asked, too.
const ASK_NEXT: Duration = Duration::from_millis(50);
/// In place of a node: no one has the slot.
const NOBODY: u16 = u16::MAX;

/// Where a node listens.
pub type Address = Endpoint;

impl Address {
    fn new(host: &str, port: u16) -> Address {
        Address {
            host: host.to_owned(),
            port,
        }
    }

    /// `HOST:PORT`, as redirections have it; a node that does not know its own host leaves it out, and means the one that
    /// it was `asked` by.
    pub(super) fn parse(text: &str, asked: &str) -> Option<Address> {
        let (host, port) = text.rsplit_once(':')?;
        let host = if host.is_empty() { asked } else { host };
        Some(Address::new(host, port.parse().ok()?))
    }
}

/// Which node has which slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Topology {
    nodes: Vec<Address>,
    /// Of each slot an index into `nodes`, or [`NOBODY`].
    owners: Vec<u16>,
}

impl Default for Topology {
    /// Nobody has anything.
    fn default() -> Topology {
        Topology {
            nodes: Vec::new(),
            owners: vec![NOBODY; usize::from(SLOTS)],
        }
    }
}

impl Topology {
    /// What is known before anyone is asked: where a single server is, and nothing of others.
    pub(super) fn before_asking(settings: &Client) -> Topology {
        match (&settings.mode, settings.endpoints.first()) {
            (Mode::Single { .. }, Some(endpoint)) => Topology::of_one(endpoint.clone()),
            (Mode::Single { .. } | Mode::Sentinel { .. } | Mode::Cluster, _) => Topology::default(),
        }
    }

    fn of_one(address: Address) -> Topology {
        Topology {
            nodes: vec![address],
            owners: vec![0; usize::from(SLOTS)],
        }
    }

    pub(super) fn owner(&self, slot: u16) -> Option<&Address> {
        let owner = self.owners.get(usize::from(slot))?;
        self.nodes.get(usize::from(*owner))
    }

    /// Those that have slots.
    pub(super) fn nodes(&self) -> impl Iterator<Item = &Address> {
        self.nodes.iter()
    }

    /// Whether every slot has an owner.
    pub(super) fn is_whole(&self) -> bool {
        !self.owners.contains(&NOBODY)
    }

    fn give(&mut self, slots: std::ops::RangeInclusive<u16>, address: Address) {
        let known = self.nodes.iter().position(|node| *node == address);
        let index = known.unwrap_or_else(|| {
            self.nodes.push(address);
            self.nodes.len() - 1
        });
        let index = u16::try_from(index).unwrap_or(NOBODY);
        for slot in slots {
            if let Some(owner) = self.owners.get_mut(usize::from(slot)) {
                *owner = index;
            }
        }
    }

    /// From the answer to `CLUSTER SLOTS` of the node at `asked`: `[[from, to, [host, port, …], …], …]`.
    fn from_slots(answer: &Value, asked: &str) -> Option<Topology> {
        let mut topology = Topology::default();
        for range in array(answer)? {
            let [from, to, master, ..] = array(range)? else {
                return None;
            };
            let [host, port, ..] = array(master)? else {
                return None;
            };
            let host = text(host).filter(|host| !host.is_empty() && host != "?");
            let address = Address::new(
                host.as_deref().unwrap_or(asked),
                u16::try_from(number(port)?).ok()?,
            );
            let (from, to) = (number(from)?, number(to)?);
            topology.give(u16::try_from(from).ok()?..=u16::try_from(to).ok()?, address);
        }
        // One that knows of no slot is not of the cluster, or not yet.
        (!topology.nodes.is_empty()).then_some(topology)
    }
}

impl Redis {
    /// Keeps the map of slots right, for ever.
    pub async fn keep_topology(self: Arc<Self>) -> Infallible {
        tokio::select! {
            never = self.look_for_ever() => never,
            never = self.hear_of_failovers() => never,
        }
    }

    /// A sentinel tells of a failover long before the master of before knows: what that one takes meanwhile is lost. All are
    /// heard, since one that is cut off from the others knows of none.
    async fn hear_of_failovers(&self) -> Infallible {
        match self.settings.mode {
            Mode::Sentinel { .. } => {
                let hear = |sentinel: &Address| {
                    let channels = vec!["+switch-master".to_owned()];
                    let look = |_| self.suspect_topology();
                    let speaker = Speakers::Sentinel(sentinel.clone());
                    Box::pin(self.listen_to(speaker, channels, look, || {}))
                };
                select_all(self.settings.endpoints.iter().map(hear)).await.0
            }
            Mode::Single { .. } | Mode::Cluster => pending().await,
        }
    }

    async fn look_for_ever(&self) -> Infallible {
        let mut trouble = false;
        let mut pause = LOOK_AGAIN.first;
        let mut epoch = 0;
        loop {
            match self.look(&mut epoch).await {
                Ok(topology) => {
                    if std::mem::take(&mut trouble) {
                        info!(client = self.name, "redis tells its topology again");
                    }
                    let changed = self.topology.send_if_modified(|known| {
                        let changed = **known != topology;
                        if changed {
                            *known = Arc::new(topology);
                        }
                        changed
                    });
                    if changed {
                        pause = LOOK_AGAIN.first;
                    }
                    if !self.topology.borrow().is_whole() {
                        // A cluster that is being formed, or has lost a part: what is missing comes without anyone's asking.
                        self.suspect_topology();
                    }
                }
                Err(error) => {
                    // Once: which node says what changes from look to look.
                    if !std::mem::replace(&mut trouble, true) {
                        warn!(
                            client = self.name,
                            error, "redis tells no topology; asked again"
                        );
                    }
                    // There may be no one else who asks.
                    self.suspect_topology();
                }
            }
            sleep(equal_jitter(pause, fastrand::f64())).await;
            pause = match self.stale.notified().now_or_never() {
                Some(()) => LOOK_AGAIN.after(pause),
                None => {
                    let _ = timeout(LOOK_EVERY, self.stale.notified()).await;
                    LOOK_AGAIN.first
                }
            };
        }
    }

    /// Notes what a node said of one slot, until the whole is looked at again.
    pub(super) fn moved(&self, slot: u16, to: &Address) {
        self.topology.send_if_modified(|known| {
            let moved = known.owner(slot) != Some(to);
            if moved {
                Arc::make_mut(known).give(slot..=slot, to.clone());
            }
            moved
        });
        self.suspect_topology();
    }

    /// `epoch`: of the newest master that was heard of.
    async fn look(&self, epoch: &mut i64) -> Result<Topology, String> {
        match &self.settings.mode {
            Mode::Single { .. } => Ok(Topology::before_asking(&self.settings)),
            Mode::Sentinel { master_name } => self.ask_sentinels(master_name, epoch).await,
            Mode::Cluster => self.ask_nodes().await,
        }
    }

    /// The map of a node for which the cluster is well. One that is cut off from the others has the map of before, in which it has
    /// slots that it serves no more: it is believed where there is no other.
    async fn ask_nodes(&self) -> Result<Topology, String> {
        let mut ask = redis::pipe();
        ask.cmd("CLUSTER").arg("INFO");
        ask.cmd("CLUSTER").arg("SLOTS");
        // The file's may be gone by now.
        let known = self.topology.borrow().clone();
        let seeds = self.settings.endpoints.iter();
        let candidates: BTreeSet<_> = known.nodes().chain(seeds).cloned().collect();
        let candidates = candidates.into_iter().collect();
        let mut failing = None;
        let read = |answers: &[Value], asked: &Address| {
            let odd = || format!("{answers:?}");
            let [info, slots] = answers else {
                return Err(odd());
            };
            let topology = Topology::from_slots(slots, &asked.host).ok_or_else(odd)?;
            let fails = text(info).is_some_and(|info| info.contains("cluster_state:fail"));
            match fails {
                true => {
                    failing.get_or_insert(topology);
                    Ok(None)
                }
                false => Ok(Some(topology)),
            }
        };
        let answer = self.ask_each(candidates, &ask, read).await;
        answer.or_else(|error| failing.ok_or(error))
    }

    /// The master of the newest epoch: a sentinel that is cut off from the others still names the one of before, which loses what
    /// it takes. One that is older than the newest heard of is believed where most sentinels name it: they were set up anew.
    async fn ask_sentinels(&self, name: &str, epoch: &mut i64) -> Result<Topology, String> {
        let sentinels = self.settings.endpoints.clone();
        let most = sentinels.len() / 2 + 1;
        let mut ask = redis::pipe();
        // In this order: what changes in between leads to an address that is newer than its epoch, never to one that is older.
        ask.cmd("SENTINEL").arg("MASTER").arg(name);
        ask.cmd("SENTINEL").arg("GET-MASTER-ADDR-BY-NAME").arg(name);
        let mut newest: Option<(Master, usize)> = None;
        let read = |answers: &[Value], _: &Address| {
            let master = Master::read(answers).ok_or_else(|| format!("{answers:?}"))?;
            let named = match newest.take() {
                Some((before, _)) if before.epoch < master.epoch => (master, 1),
                Some((before, named)) => {
                    let same = usize::from(before == master);
                    (before, named + same)
                }
                None => (master, 1),
            };
            let (master, by) = newest.insert(named);
            let is_known = *by >= most && master.epoch >= *epoch;
            Ok(is_known.then(|| Topology::of_one(master.address.clone())))
        };
        let answer = self.ask_each(sentinels, &ask, read).await;
        let Some((master, by)) = newest else {
            return answer;
        };
        if master.epoch < *epoch && by < most {
            let (address, old) = (master.address, master.epoch);
            return Err(format!(
                "sentinels name {address}, which was the master before another was elected (epoch {old} of {epoch})"
            ));
        }
        *epoch = master.epoch;
        Ok(Topology::of_one(master.address))
    }

    /// The first map that `read` makes of answers, from candidates in an order drawn anew each time; it may want to see more of
    /// them, or have something against one. One that hangs holds up the next for a moment alone: who has a dead node's slots is to
    /// be known soon, and it may be one of several.
    async fn ask_each(
        &self,
        mut candidates: Vec<Address>,
        ask: &Pipeline,
        mut read: impl FnMut(&[Value], &Address) -> Result<Option<Topology>, String>,
    ) -> Result<Topology, String> {
        fastrand::shuffle(&mut candidates);
        let mut candidates = candidates.into_iter();
        let mut asked = FuturesUnordered::new();
        let mut last = "no node is known".to_owned();
        loop {
            let next = candidates.next();
            let more = next.is_some();
            asked.extend(next.map(|candidate| self.ask_in_time(candidate, ask)));
            let answer = match more {
                true => timeout(ASK_NEXT, asked.next()).await,
                false => Ok(asked.next().await),
            };
            match answer {
                // Not yet: the next one is asked beside it.
                Err(_) => {}
                Ok(Some((candidate, Ok(answers)))) => match read(&answers, &candidate) {
                    Ok(Some(topology)) => return Ok(topology),
                    Ok(None) => {}
                    Err(odd) => last = format!("{candidate} answers {odd}"),
                },
                Ok(Some((candidate, Err(error)))) => last = format!("{candidate}: {error}"),
                Ok(None) => return Err(last),
            }
        }
    }

    async fn ask_in_time(
        &self,
        candidate: Address,
        ask: &Pipeline,
    ) -> (Address, Result<Vec<Value>, String>) {
        let within = self.connect_timeout;
        let answer = match timeout(within, self.ask(&candidate, ask)).await {
            Ok(answer) => answer.map_err(|error| error.to_string()),
            Err(_) => Err(format!("no answer within {within:?}")),
        };
        (candidate, answer)
    }

    async fn ask(&self, address: &Address, commands: &Pipeline) -> Result<Vec<Value>, RedisError> {
        let who = match self.settings.mode {
            // The credentials are those of the servers that the sentinels watch.
            Mode::Sentinel { .. } => RedisConnectionInfo::default(),
            Mode::Single { .. } | Mode::Cluster => self.who(),
        };
        let (mut connection, _driver) = self.connect(address, &who).await?;
        commands.query_async(&mut connection).await
    }
}

/// As a sentinel names it.
#[derive(Debug, PartialEq, Eq)]
struct Master {
    /// Counts the elections.
    epoch: i64,
    address: Address,
}

impl Master {
    /// From the answers to `SENTINEL MASTER`, which alone has the epoch, and `SENTINEL GET-MASTER-ADDR-BY-NAME`, which has the new
    /// address as soon as the epoch counts: `[name, value, …]` and `[host, port]`.
    fn read(answers: &[Value]) -> Option<Master> {
        let [fields, address] = answers else {
            return None;
        };
        let mut fields = array(fields)?.chunks_exact(2);
        let epoch = fields.find(|field| text(&field[0]).as_deref() == Some("config-epoch"))?;
        let [host, port] = array(address)? else {
            return None;
        };
        Some(Master {
            epoch: text(&epoch[1])?.parse().ok()?,
            address: Address::new(&text(host)?, text(port)?.parse().ok()?),
        })
    }
}

fn array(value: &Value) -> Option<&[Value]> {
    match value {
        Value::Array(values) => Some(values),
        _ => None,
    }
}

fn number(value: &Value) -> Option<i64> {
    match value {
        Value::Int(number) => Some(*number),
        _ => None,
    }
}

fn text(value: &Value) -> Option<String> {
    redis::from_redis_value_ref(value).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(host: &str, port: i64) -> Value {
        Value::Array(vec![
            Value::BulkString(host.into()),
            Value::Int(port),
            Value::BulkString("id".into()),
        ])
    }

    #[test]
    fn slots_go_to_the_masters_that_the_cluster_names() {
        let range = |from, to, master| {
            let replica = node("replica", 1);
            Value::Array(vec![Value::Int(from), Value::Int(to), master, replica])
        };
        let answer = Value::Array(vec![
            range(0, 99, node("a", 6379)),
            range(100, 16_382, node("", 6380)),
        ]);
        let topology = Topology::from_slots(&answer, "asked").unwrap();
        let owner = |slot| topology.owner(slot).map(ToString::to_string);
        assert_eq!(owner(0).as_deref(), Some("a:6379"));
        assert_eq!(owner(99).as_deref(), Some("a:6379"));
        assert_eq!(owner(100).as_deref(), Some("asked:6380"));
        assert_eq!(owner(16_383), None);
        assert!(!topology.is_whole());
        assert_eq!(Topology::from_slots(&Value::Int(1), "asked"), None);
    }

    #[test]
    fn redirections_name_an_address() {
        let check = |text: &str, expected: Option<&str>| {
            let address = Address::parse(text, "asked").map(|address| address.to_string());
            assert_eq!(address.as_deref(), expected, "{text}");
        };
        check("10.0.0.1:6379", Some("10.0.0.1:6379"));
        check(":6379", Some("asked:6379"));
        check("::1:6379", Some("[::1]:6379"));
        check("10.0.0.1", None);
        check("10.0.0.1:66666", None);
    }
}
