//! Sends batches to the streams, learns which are committed, and sends again what Redis has lost. On a thread of its own,
//! which also ends what other processes left in the spool. Must not pack.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use parking_lot::Mutex;
use tokio::runtime::LocalOptions;
use tokio::sync::Notify;
use tokio::time::sleep;
use tracing::{error, info, warn};

use super::ship::Common;
use super::uncommitted::{Entry, Released, Source, Uncommitted};
use crate::clock;
use crate::config::audit::{Delivery, Stream};
use crate::policy::retry::Pauses;
use crate::store::audit::batch::{self, BatchError, Boot};
use crate::store::audit::chain::Hasher;
use crate::store::fleet::Fleet;
use crate::store::spool::{Abandoned, Place, Spool};
use crate::store::streams::produce::{AddError, Producer};

/// Batches on their way to one stream, at most.
const WINDOW: usize = 16;
/// Before a stream that has not taken a batch is tried again.
const PAUSES: Pauses = Pauses {
    first: Duration::from_millis(20),
    longest: Duration::from_secs(1),
};
/// Between looks at what is committed.
const POLL: Duration = Duration::from_millis(100);
/// How old an entry is that is looked for, and between two looks at all of them where they are few.
const LOOK: Duration = Duration::from_secs(1);
/// Entries that are looked for at each poll: Redis copies each of them, so that a thousand in one call would hold up others for
/// 30 ms.
const LOOKS: usize = 50;
/// Batches of a boot that is gone that are under way at a time.
const ADOPTED: usize = 4_096;
const ADOPTED_BYTES: usize = 8 << 20;

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
    linger: Duration,
    /// Whether it was said that batches are not taken.
    told: Cell<bool>,
    /// Whether it was said that the spool cannot be read.
    told_unread: Cell<bool>,
    /// Whether it is under way to send what a process has left.
    adopts: Cell<bool>,
    common: Arc<Common>,
}

/// What is known of one stream.
struct Shard {
    sending: Cell<usize>,
    /// No batch is sent before; and the pause that led to it.
    not_before: Cell<Option<(Instant, Duration)>>,
}

/// A batch on its way to a stream, until it is known what became of it, or nobody waits for that any more.
struct Underway<'a>(&'a Shard);

impl Drop for Underway<'_> {
    fn drop(&mut self) {
        self.0.sending.set(self.0.sending.get() - 1);
    }
}

/// The batches of a boot, as the tasks that send them share them.
struct Load<'a> {
    boot: &'a str,
    uncommitted: &'a Mutex<Uncommitted>,
    /// Told when there is something to send.
    work: &'a Notify,
    /// Where batches that are done with are to be released, if not in the process's own spool.
    released: Option<&'a Mutex<Vec<Place>>>,
}

pub(super) fn run(sending: Sending) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build_local(LocalOptions::default());
    match runtime {
        Ok(runtime) => {
            runtime.block_on(serve(sending));
            // As a lane's.
            runtime.shutdown_background();
        }
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
    let redis = fleet.connect().main;
    let shards = (0..stream.shards.max(1)).map(|_| Shard {
        sending: Cell::new(0),
        not_before: Cell::new(None),
    });
    let link = Rc::new(Link {
        shards: shards.collect(),
        next: Cell::new(fastrand::usize(..usize::from(stream.shards.max(1)))),
        linger: stream.batch_wait,
        producer: Producer::new(redis, fleet.keys.clone(), stream),
        told: Cell::new(false),
        told_unread: Cell::new(false),
        adopts: Cell::new(false),
        common: common.clone(),
    });
    let adopting = tokio::task::spawn_local(adopt_all(link.clone(), abandoned, hasher));
    let own = Load {
        boot: &boot,
        uncommitted: &common.uncommitted,
        work: &common.work,
        released: None,
    };
    tokio::select! {
        () = learn(&link, &own) => {}
        () = send(&link, &own, || is_over(&common)) => {}
    }
    // The disk may end with the process; a Redis that takes nothing now will not do so in time.
    let adopts = || link.adopts.get() && !adopting.is_finished();
    while adopts() && !link.told.get() && !common.shared.is_late() {
        sleep(POLL / 4).await;
    }
    adopting.abort();
}

/// Whether nothing is to be sent any more, or the time for it is over.
fn is_over(common: &Common) -> bool {
    // The thread that packs may be gone.
    if common.shared.is_late() {
        return true;
    }
    if !common.packed_all.load(Ordering::Acquire) {
        return false;
    }
    let uncommitted = common.uncommitted.lock();
    match common.delivery {
        Delivery::BestEffort if !common.is_stored_here => !uncommitted.has_unadded(),
        // What is committed need not be adopted, and there may be no other worker.
        Delivery::BestEffort | Delivery::Guaranteed => uncommitted.is_empty(),
    }
}

/// What could not be sent goes to the spool, or is lost. To be called once both threads have ended.
pub(super) fn end(common: &Common) {
    if let Err(error) = common.persist(None) {
        error!(%error, "the last audit events cannot be spooled");
    }
    let mut uncommitted = common.uncommitted.lock();
    let at_risk: Vec<_> = uncommitted
        .at_risk()
        .into_iter()
        .map(|(first, _)| first)
        .collect();
    let lost: u64 = at_risk
        .iter()
        .map(|first| uncommitted.remove(*first).events)
        .sum();
    if lost > 0 {
        error!(lost, "audit events were lost at the end");
        common.shared.dropped.fetch_add(lost, Ordering::Relaxed);
    }
    let underway = uncommitted.events();
    common.shared.underway.store(underway, Ordering::Relaxed);
    let (batches, is_spooled) = (uncommitted.len(), uncommitted.is_spooled());
    drop(uncommitted);
    if is_spooled {
        match common.spool.lock().as_ref().is_some_and(Spool::is_there) {
            true => info!(batches, "audit events wait in the spool for the next start"),
            false => error!(
                batches,
                "audit events were in a folder of the spool that was moved or removed: they are lost unless it is brought back"
            ),
        }
        return;
    }
    if let Some(spool) = common.spool.lock().take()
        && let Err(error) = spool.remove()
    {
        warn!(%error, "the audit's empty spool cannot be removed");
    }
}

/// Sends the batches as they come, each to a stream that takes them, until it is `over`.
async fn send(link: &Link, load: &Load<'_>, over: impl Fn() -> bool) {
    let mut sending = FuturesUnordered::new();
    // Until when batches wait for others.
    let mut held: Option<Instant> = None;
    loop {
        let now = clock::now();
        held = held.filter(|until| *until > now && link.may_hold(load));
        let mut waits = held.map_or(Duration::from_millis(500), |until| until - now);
        while held.is_none() {
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
            let underway = link.shards[usize::from(shard)].begin();
            sending.push(async move {
                let added = link.producer.add(shard, &bytes).await;
                drop(underway);
                (first, shard, added)
            });
        }
        if over() {
            return;
        }
        tokio::select! {
            Some((first, shard, added)) = sending.next(), if !sending.is_empty() => {
                link.sent(load, first, shard, added);
            }
            () = load.work.notified(), if held.is_none() => held = Some(clock::now() + link.linger),
            () = sleep(waits) => {}
        }
    }
}

/// Learns for ever what is committed and what is missing.
async fn learn(link: &Link, load: &Load<'_>) {
    let mut known = Vec::new();
    let (mut look_at, mut looked_to) = (clock::now() + LOOK, 0);
    loop {
        sleep(POLL).await;
        // What others have left is not read back here.
        if load.released.is_none() && !load.uncommitted.lock().is_unread() {
            link.told_unread.set(false);
        }
        if load.uncommitted.lock().is_empty() && known.is_empty() {
            continue;
        }
        if load.uncommitted.lock().bring_back() {
            load.work.notify_one();
        }
        // Asked before what is committed: what is stored between the two questions is not taken for lost.
        let mut missing = Vec::new();
        if clock::now() >= look_at {
            let last;
            (missing, last) = link.missing(load, looked_to).await;
            looked_to = last.unwrap_or(0);
            if last.is_none() {
                look_at = clock::now() + LOOK;
            }
        }
        let Ok(done) = link.producer.done(load.boot, &known).await else {
            continue;
        };
        let mut uncommitted = load.uncommitted.lock();
        let released = uncommitted.committed(&done);
        // Those of batches that are still to come here stay said.
        let said = done.iter().map(|(first, _)| *first);
        known = said.filter(|first| *first <= uncommitted.newest).collect();
        drop(uncommitted);
        link.release(load, released);
        link.again(load, &missing);
        link.common.tell();
    }
}

impl Link {
    /// Whether batches may wait for others, so that fewer calls take them to Redis: those that are safe, while they are few.
    fn may_hold(&self, load: &Load<'_>) -> bool {
        let uncommitted = load.uncommitted.lock();
        uncommitted.spool_first && uncommitted.unsent() < WINDOW
    }

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

    /// What a boot's batches had in its spool is done with.
    fn release(&self, load: &Load<'_>, mut released: Released) {
        if let Some(of_boot) = load.released {
            of_boot.lock().append(&mut released.places);
        }
        self.common.release(released);
    }

    /// Once the process ends, what both the spool and a stream have is not waited for, and stays in the spool for the next start; whether
    /// it is so.
    fn forget_at_the_end(&self, load: &Load<'_>) -> bool {
        let ends = self.common.shared.is_stopping();
        if ends {
            load.uncommitted.lock().shed_spooled();
        }
        ends
    }

    /// The next batch to send. One that the spool cannot give back is lost.
    fn next(&self, load: &Load<'_>) -> Option<(u64, Arc<[u8]>)> {
        loop {
            let first = match load.uncommitted.lock().next()? {
                (first, Source::Memory(bytes)) => return Some((first, bytes.clone())),
                (first, Source::Spool) => first,
            };
            let (error, Released { events, places }) = {
                let spool = self.common.spool.lock();
                let mut uncommitted = load.uncommitted.lock();
                let (Some(spool), Some(place)) = (&*spool, uncommitted.place(first)) else {
                    continue;
                };
                match spool.read(place) {
                    Ok(bytes) => {
                        if self.told_unread.replace(false) {
                            info!("audit events are read back from the spool again");
                        }
                        return Some((first, bytes.into()));
                    }
                    Err(error) if error.is_lost() => (error, uncommitted.remove(first)),
                    Err(error) => {
                        uncommitted.again(first, clock::now());
                        uncommitted.set_aside();
                        self.common.shared.errors.fetch_add(1, Ordering::Relaxed);
                        if !self.told_unread.replace(true) {
                            warn!(%error, "audit events cannot be read back from the spool now; tried again");
                        }
                        continue;
                    }
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
        let now = clock::now();
        match added {
            Ok(id) => {
                state.not_before.set(None);
                let added = now;
                load.uncommitted
                    .lock()
                    .added(first, Entry { shard, id, added });
                // Beside a stream that takes none, others go on.
                if self.shards.iter().all(Shard::takes) && self.told.replace(false) {
                    info!("redis takes audit events again");
                }
            }
            Err(error) => {
                state.fail(now);
                load.uncommitted.lock().again(first, now);
                self.common.shared.errors.fetch_add(1, Ordering::Relaxed);
                if !self.told.replace(true) {
                    warn!(shard, %error, "redis does not take audit events; they are held and sent again");
                }
            }
        }
    }

    /// Of the next batches behind `after` those that are no longer in their streams, with the ids that they had; and where to go on
    /// from.
    async fn missing(&self, load: &Load<'_>, after: u64) -> (Vec<(u64, String)>, Option<u64>) {
        let now = clock::now();
        let (waiting, last) = load.uncommitted.lock().waiting(now, LOOK, after, LOOKS);
        let asked = waiting.iter().map(|(shard, batches)| async move {
            let ids: Vec<_> = batches.iter().map(|(_, id)| id.as_str()).collect();
            // Those of a stream that does not answer are asked about in the next round.
            let gone = self.producer.missing(*shard, &ids).await;
            let gone = gone.unwrap_or_default().into_iter();
            gone.map(|index| batches[index].clone()).collect::<Vec<_>>()
        });
        let missing = futures_util::future::join_all(asked).await;
        (missing.concat(), last)
    }

    /// Has those of the missing batches sent again that have not turned out to be committed.
    fn again(&self, load: &Load<'_>, missing: &[(u64, String)]) {
        let mut uncommitted = load.uncommitted.lock();
        let lost = missing
            .iter()
            .filter(|(first, id)| uncommitted.is_in(*first, id))
            .map(|(first, _)| *first)
            .collect::<Vec<_>>();
        let now = clock::now();
        lost.iter().for_each(|first| uncommitted.again(*first, now));
        drop(uncommitted);
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
    /// Whether it took what it was sent last.
    fn takes(&self) -> bool {
        self.not_before.get().is_none()
    }

    fn begin(&self) -> Underway<'_> {
        self.sending.set(self.sending.get() + 1);
        Underway(self)
    }

    fn fail(&self, now: Instant) {
        let pause = match self.not_before.get() {
            // Those that were under way together count as one.
            Some((not_before, _)) if not_before > now => return,
            Some((_, pause)) => PAUSES.after(pause),
            None => PAUSES.first,
        };
        self.not_before.set(Some((now + pause, pause)));
    }
}

/// Sends what processes have left that are gone, one after the other.
async fn adopt_all(link: Rc<Link>, mut abandoned: Vec<Abandoned>, hasher: Hasher) {
    loop {
        link.adopts.set(true);
        for left in abandoned {
            adopt(&link, left, &hasher).await;
        }
        link.adopts.set(false);
        // Others may share the folder, and end.
        sleep(ADOPT_EVERY).await;
        let adopted = link.common.spool.lock().as_ref().map(Spool::adopt);
        abandoned = adopted.and_then(Result::ok).unwrap_or_default();
    }
}

async fn adopt(link: &Link, mut left: Abandoned, hasher: &Hasher) {
    let boot = left.boot.to_string();
    let (uncommitted, work) = (Mutex::new(Uncommitted::default()), Notify::new());
    let released = Mutex::default();
    let load = Load {
        boot: &boot,
        uncommitted: &uncommitted,
        work: &work,
        released: Some(&released),
    };
    let stored = tokio::select! {
        whole = feed(link, &load, &mut left, &released, hasher) => whole,
        () = learn(link, &load) => None,
        () = send(link, &load, || false) => None,
    };
    let Some(batches) = stored else {
        return;
    };
    let damage = left.damage.stretches;
    let corrupt = &link.common.shared.spool_corrupt;
    corrupt.fetch_add(damage, Ordering::Relaxed);
    if damage > 0 {
        error!(
            boot,
            damage,
            batches,
            "what a process has left in the audit's spool is stored, but for what is damaged; look at its .corrupt files"
        );
    } else {
        info!(
            boot,
            batches, "what a process has left in the audit's spool is stored"
        );
    }
    if let Err(error) = left.remove() {
        warn!(%error, boot, "what is stored cannot be removed from the audit's spool");
    }
}

/// Gives what a process has left to be sent, and its end mark where all that it made is there; how many batches there were, once all
/// are stored.
async fn feed(
    link: &Link,
    load: &Load<'_>,
    left: &mut Abandoned,
    released: &Mutex<Vec<Place>>,
    hasher: &Hasher,
) -> Option<usize> {
    let boot = load.boot;
    let push = |header: &batch::Header, bytes: Vec<u8>, place| {
        let (numbers, now) = ((header.first, header.last()), clock::now());
        let mut uncommitted = load.uncommitted.lock();
        uncommitted.push(numbers, bytes.into(), place, Vec::new(), now);
        load.work.notify_one();
    };
    let mut newest: Option<batch::Header> = None;
    let (mut batches, mut has_left_out, mut has_forgotten) = (0, false, false);
    loop {
        let (place, bytes) = match left.next_record() {
            Ok(Some(record)) => record,
            Ok(None) => break,
            Err(error) => {
                error!(%error, boot, "what a process has left in the audit's spool cannot be read; it is tried again");
                return None;
            }
        };
        let header = match batch::peek(&bytes) {
            Ok(header) => header,
            Err(error @ BatchError::Version(_)) => {
                error!(%error, boot, "what another weir has left in the audit's spool waits for that");
                return None;
            }
            Err(error @ BatchError::Damaged) => {
                error!(%error, boot, "a record of the audit's spool is left out");
                has_left_out = true;
                continue;
            }
        };
        while is_enough(load.uncommitted) {
            has_forgotten |= link.forget_at_the_end(load);
            sleep(POLL / 4).await;
            release(left, released);
        }
        push(&header, bytes, Some(place));
        batches += 1;
        if newest
            .as_ref()
            .is_none_or(|newest| newest.first < header.first)
        {
            newest = Some(header);
        }
    }
    // An end mark says that nothing was behind it: where that is not known, the boot stays one that was killed.
    if let Some(newest) = newest.filter(|_| left.is_complete() && !has_left_out)
        && let Some(mut ended) = Boot::resume(&newest, hasher.clone())
    {
        // Of the time of the last batch, so that another that does this makes the same end mark.
        let (end, bytes) = ended.end(newest.sealed, newest.dropped);
        push(&end, bytes, None);
    }
    while !load.uncommitted.lock().is_empty() {
        if link.common.shared.is_stopping() && !load.uncommitted.lock().has_unadded() {
            return None;
        }
        sleep(POLL / 4).await;
        release(left, released);
    }
    (!has_forgotten).then_some(batches)
}

/// Whether as many batches are under way as may be of what another process has left.
fn is_enough(uncommitted: &Mutex<Uncommitted>) -> bool {
    let uncommitted = uncommitted.lock();
    uncommitted.len() >= ADOPTED || uncommitted.memory() >= ADOPTED_BYTES
}

/// Makes room on the disk for what the process itself has.
fn release(left: &mut Abandoned, released: &Mutex<Vec<Place>>) {
    for place in std::mem::take(&mut *released.lock()) {
        if let Err(error) = left.release(place) {
            warn!(%error, "a segment of the audit's spool cannot be removed");
        }
    }
}
