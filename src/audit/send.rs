//! Sends batches to the streams, learns which are committed, and sends again what Redis has lost. On a thread of its own.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::task::LocalSet;
use tokio::time::sleep;
use tracing::{error, info, warn};

use super::outgoing::{Entry, Outgoing, Released, Source};
use super::ship::Common;
use crate::clock;
use crate::config::audit::{Delivery, Stream};
use crate::store::batch::{self, Boot};
use crate::store::chain::Hasher;
use crate::store::fleet::Fleet;
use crate::store::spool::{Abandoned, Spool};
use crate::store::streams::produce::{AddError, Producer};

/// Batches on their way to one stream, at most.
const WINDOW: usize = 16;
/// Before a stream that has not taken a batch is tried again: from the first to the last, doubled each time.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));
/// Between looks at what is committed.
const POLL: Duration = Duration::from_millis(100);
/// Between looks at what is missing, and how old an entry is that is looked for. Longer where many are.
const LOOK: Duration = Duration::from_secs(1);
/// Entries that are looked for in a second, about, and in one call.
const LOOKS: (usize, usize) = (10_000, 1_000);
/// Batches of a boot that is gone that are under way at a time.
const ADOPTED: usize = 64;

/// Between looks at what processes have left.
const ADOPT_EVERY: Duration = Duration::from_secs(30);

/// What the thread begins with.
pub(super) struct Sending {
    pub boot: String,
    pub hasher: Hasher,
    pub stream: Stream,
    pub abandoned: Vec<Abandoned>,
    pub fleet: Arc<Fleet>,
    pub common: Arc<Common>,
}

/// The way to the streams, which all boots share.
struct Link {
    producer: Producer,
    shards: Vec<Shard>,
    next: Cell<usize>,
    /// Whether it was said that batches are not taken.
    told: Cell<bool>,
    common: Arc<Common>,
}

/// What is known of one stream.
struct Shard {
    sending: Cell<usize>,
    /// No batch is sent before; and the pause that led to it.
    not_before: Cell<Option<(Instant, Duration)>>,
}

/// The batches of a boot, as the tasks that send them share them.
struct Load<'a> {
    boot: &'a str,
    outgoing: &'a Mutex<Outgoing>,
    /// Told when there is something to send.
    work: &'a Notify,
}

pub(super) fn run(sending: Sending) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    match runtime {
        Ok(runtime) => LocalSet::new().block_on(&runtime, serve(sending)),
        Err(error) => error!(%error, "no runtime to send audit events by"),
    }
}

async fn serve(sending: Sending) {
    let Sending {
        boot,
        hasher,
        stream,
        abandoned,
        fleet,
        common,
    } = sending;
    let redis = fleet.connect(false).main;
    let shards = (0..stream.shards.max(1)).map(|_| Shard {
        sending: Cell::new(0),
        not_before: Cell::new(None),
    });
    let link = Rc::new(Link {
        shards: shards.collect(),
        next: Cell::new(fastrand::usize(..usize::from(stream.shards.max(1)))),
        producer: Producer::new(redis, fleet.keys.clone(), stream),
        told: Cell::new(false),
        common: common.clone(),
    });
    let adopting = tokio::task::spawn_local(adopt_all(link.clone(), abandoned, hasher));
    let own = Load {
        boot: &boot,
        outgoing: &common.outgoing,
        work: &common.work,
    };
    tokio::select! {
        () = follow(&link, &own) => {}
        () = send(&link, &own, || is_over(&common)) => {}
    }
    adopting.abort();
    end(&common);
}

/// Whether nothing is to be sent any more, or the time for it is over.
fn is_over(common: &Common) -> bool {
    if !common.packed_all.load(Ordering::Acquire) {
        return false;
    }
    let outgoing = common.outgoing.lock();
    let done = match common.delivery {
        Delivery::BestEffort => !outgoing.has_unadded(),
        // What is committed need not be adopted.
        Delivery::Guaranteed => outgoing.is_empty(),
    };
    done || common.shared.is_late()
}

/// What could not be sent goes to the spool, or is lost.
fn end(common: &Common) {
    if let Err(error) = common.secure(None) {
        error!(%error, "the last audit events cannot be spooled");
    }
    let mut outgoing = common.outgoing.lock();
    let at_risk: Vec<_> = outgoing
        .at_risk()
        .into_iter()
        .map(|(first, _)| first)
        .collect();
    let lost: u64 = at_risk
        .iter()
        .map(|first| outgoing.remove(*first).events)
        .sum();
    if lost > 0 {
        error!(lost, "audit events were lost at the end");
        common.shared.dropped.fetch_add(lost, Ordering::Relaxed);
    }
    if outgoing.is_spooled() {
        info!(
            batches = outgoing.len(),
            "audit events wait in the spool for the next start"
        );
        return;
    }
    drop(outgoing);
    if let Some(spool) = common.spool.lock().take()
        && let Err(error) = spool.remove()
    {
        warn!(%error, "the audit's empty spool cannot be removed");
    }
}

/// Sends the batches as they come, each to a stream that takes them, until it is `over`.
async fn send(link: &Link, load: &Load<'_>, over: impl Fn() -> bool) {
    let mut sending = FuturesUnordered::new();
    loop {
        let mut waits = Duration::from_millis(500);
        loop {
            let shard = match link.shard() {
                Ok(shard) => shard,
                Err(pause) => {
                    waits = pause;
                    break;
                }
            };
            let Some((first, bytes)) = link.next(load) else {
                break;
            };
            link.shards[usize::from(shard)].begin();
            sending.push(async move { (first, shard, link.producer.add(shard, &bytes).await) });
        }
        if over() {
            return;
        }
        tokio::select! {
            Some((first, shard, added)) = sending.next(), if !sending.is_empty() => {
                link.sent(load, first, shard, added);
            }
            () = load.work.notified() => {}
            () = sleep(waits) => {}
        }
    }
}

/// Learns for ever what is committed and what is missing.
async fn follow(link: &Link, load: &Load<'_>) {
    let mut known = Vec::new();
    let mut look_at = clock::now() + LOOK;
    loop {
        sleep(POLL).await;
        if load.outgoing.lock().is_empty() && known.is_empty() {
            continue;
        }
        // Asked before what is committed: what is stored between the two questions is not taken for lost.
        let mut missing = Vec::new();
        if clock::now() >= look_at {
            let batches;
            (missing, batches) = link.missing(load).await;
            look_at = clock::now() + LOOK + LOOK * u32::try_from(batches / LOOKS.0).unwrap_or(1);
        }
        let Ok(done) = link.producer.done(load.boot, &known).await else {
            continue;
        };
        let mut outgoing = load.outgoing.lock();
        let released = outgoing.committed(&done);
        // Those of batches that are still to come here stay said.
        let said = done.iter().map(|(first, _)| *first);
        known = said.filter(|first| *first <= outgoing.newest).collect();
        drop(outgoing);
        link.common.release(released);
        link.again(load, &missing);
        link.common.tell();
    }
}

impl Link {
    /// A stream to send to, or how long to wait for one.
    fn shard(&self) -> Result<u16, Duration> {
        let now = clock::now();
        let mut wait = Duration::from_millis(500);
        for step in 0..self.shards.len() {
            let index = (self.next.get() + step) % self.shards.len();
            let shard = &self.shards[index];
            if let Some((not_before, _)) = shard.not_before.get()
                && not_before > now
            {
                wait = wait.min(not_before - now);
                continue;
            }
            // One that has failed is tried with a single batch.
            let window = shard.not_before.get().map_or(WINDOW, |_| 1);
            if shard.sending.get() < window {
                self.next.set(index + 1);
                return Ok(u16::try_from(index).unwrap_or(0));
            }
        }
        Err(wait)
    }

    /// The next batch to send. One that the spool cannot give back is lost.
    fn next(&self, load: &Load<'_>) -> Option<(u64, Arc<[u8]>)> {
        loop {
            let first = match load.outgoing.lock().next()? {
                (first, Source::Memory(bytes)) => return Some((first, bytes.clone())),
                (first, Source::Spool) => first,
            };
            let (error, Released { events, places }) = {
                let spool = self.common.spool.lock();
                let mut outgoing = load.outgoing.lock();
                let (Some(spool), Some(place)) = (&*spool, outgoing.place(first)) else {
                    continue;
                };
                match spool.read(place) {
                    Ok(bytes) => return Some((first, bytes.into())),
                    Err(error) => (error, outgoing.remove(first)),
                }
            };
            error!(%error, events, "audit events cannot be read back from the spool: they are lost");
            self.common
                .shared
                .dropped
                .fetch_add(events, Ordering::Relaxed);
            self.common.release(Released { events: 0, places });
        }
    }

    fn sent(&self, load: &Load<'_>, first: u64, shard: u16, added: Result<String, AddError>) {
        let state = &self.shards[usize::from(shard)];
        state.sending.set(state.sending.get() - 1);
        let now = clock::now();
        match added {
            Ok(id) => {
                state.not_before.set(None);
                let added = now;
                load.outgoing
                    .lock()
                    .added(first, Entry { shard, id, added });
                if self.told.replace(false) {
                    info!("redis takes audit events again");
                }
            }
            Err(error) => {
                state.fail(now);
                load.outgoing.lock().again(first);
                self.common.shared.errors.fetch_add(1, Ordering::Relaxed);
                if !self.told.replace(true) {
                    warn!(%error, "redis does not take audit events; they are held and sent again");
                }
            }
        }
    }

    /// The batches that are no longer in their streams, with the ids that they had; and how many were looked for.
    async fn missing(&self, load: &Load<'_>) -> (Vec<(u64, String)>, usize) {
        let waiting = load.outgoing.lock().waiting(clock::now(), LOOK);
        let count = waiting.values().map(Vec::len).sum();
        let mut missing = Vec::new();
        for (shard, batches) in waiting {
            for some in batches.chunks(LOOKS.1) {
                let ids: Vec<_> = some.iter().map(|(_, id)| id.as_str()).collect();
                let Ok(gone) = self.producer.missing(shard, &ids).await else {
                    break;
                };
                missing.extend(gone.into_iter().map(|index| some[index].clone()));
            }
        }
        (missing, count)
    }

    /// Has those of the missing batches sent again that have not turned out to be committed.
    fn again(&self, load: &Load<'_>, missing: &[(u64, String)]) {
        let mut outgoing = load.outgoing.lock();
        let lost = missing
            .iter()
            .filter(|(first, id)| outgoing.is_in(*first, id))
            .map(|(first, _)| *first)
            .collect::<Vec<_>>();
        lost.iter().for_each(|first| outgoing.again(*first));
        drop(outgoing);
        if !lost.is_empty() {
            warn!(
                batches = lost.len(),
                "redis has lost audit events; they are sent again"
            );
            let count = u64::try_from(lost.len()).unwrap_or(u64::MAX);
            self.common
                .shared
                .resent
                .fetch_add(count, Ordering::Relaxed);
            load.work.notify_one();
        }
    }
}

impl Shard {
    fn begin(&self) {
        self.sending.set(self.sending.get() + 1);
    }

    fn fail(&self, now: Instant) {
        let (first, longest) = BACK_OFF;
        let pause = match self.not_before.get() {
            // Those that were under way together count as one.
            Some((not_before, _)) if not_before > now => return,
            Some((_, pause)) => (pause * 2).min(longest),
            None => first,
        };
        self.not_before.set(Some((now + pause, pause)));
    }
}

/// Sends what processes have left that are gone, one after the other.
async fn adopt_all(link: Rc<Link>, mut abandoned: Vec<Abandoned>, hasher: Hasher) {
    loop {
        for left in abandoned {
            adopt(&link, left, &hasher).await;
        }
        // Others may share the folder, and end.
        sleep(ADOPT_EVERY).await;
        let adopted = link.common.spool.lock().as_ref().map(Spool::adopt);
        abandoned = adopted.and_then(Result::ok).unwrap_or_default();
    }
}

async fn adopt(link: &Link, mut left: Abandoned, hasher: &Hasher) {
    let boot = left.boot.to_string();
    let (outgoing, work) = (Mutex::new(Outgoing::default()), Notify::new());
    let load = Load {
        boot: &boot,
        outgoing: &outgoing,
        work: &work,
    };
    let sent = RefCell::new(0_u64);
    let feeding = async {
        let mut newest: Option<batch::Header> = None;
        loop {
            let bytes = match left.next_record() {
                Ok(Some((_, bytes))) => bytes,
                Ok(None) => break,
                Err(error) => {
                    error!(%error, boot, "what a process has left in the audit's spool cannot be read; tried again at the next start");
                    return false;
                }
            };
            let Ok(header) = batch::peek(&bytes) else {
                error!(
                    boot,
                    "a record of the audit's spool is no batch of events: left out"
                );
                continue;
            };
            room(&outgoing).await;
            *sent.borrow_mut() += header.count;
            let numbers = (header.first, header.last());
            outgoing
                .lock()
                .push(numbers, bytes.into(), None, Vec::new());
            work.notify_one();
            if newest
                .as_ref()
                .is_none_or(|newest| newest.first < header.first)
            {
                newest = Some(header);
            }
        }
        if let Some(newest) = newest.filter(|newest| newest.is_spooled)
            && let Some(mut ended) = Boot::resume(&newest, hasher.clone())
        {
            // Of the time of the last batch, so that another that does this makes the same end mark.
            let (end, bytes) = ended.end(newest.sealed, newest.dropped);
            outgoing
                .lock()
                .push((end.first, end.last()), bytes.into(), None, Vec::new());
            work.notify_one();
        }
        while !outgoing.lock().is_empty() {
            sleep(POLL).await;
        }
        true
    };
    let whole = tokio::select! {
        whole = feeding => whole,
        () = follow(link, &load) => false,
        () = send(link, &load, || false) => false,
    };
    let damage = left.damage.stretches;
    link.common
        .shared
        .spool_corrupt
        .fetch_add(damage, Ordering::Relaxed);
    if whole {
        info!(
            boot,
            events = sent.take(),
            "what a process has left in the audit's spool is stored"
        );
        if let Err(error) = left.remove() {
            warn!(%error, boot, "what is stored cannot be removed from the audit's spool");
        }
    }
}

/// Waits until few batches are under way.
async fn room(outgoing: &Mutex<Outgoing>) {
    while outgoing.lock().len() >= ADOPTED {
        sleep(POLL / 4).await;
    }
}
