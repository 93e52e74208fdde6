//! Checks what workers have stored. One transaction, which sees one moment: workers may go on, and a replica will do.
//!
//! First the rows, a day at a time and within it some 500 batches at a time in their order of arrival: each batch is to have
//! all of its events, and they are to hash to what it says. Then the batches of each boot in their order: each is to follow the
//! one before. So memory is bounded however much there is, and the server sorts no more than one such part. 3 million events with a key
//! take 6.7 s on 2 cores of a virtual machine that the server shares: 440,000 a second, of which this process has 0.75 us an event.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;
use std::pin::Pin;

use futures_util::TryStreamExt;
use tokio_postgres::types::ToSql;
use tokio_postgres::{IsolationLevel, Row, RowStream};
use uuid::Uuid;

use super::row::{COLUMNS, Date, Fields, Time};
use super::{Client, PostgresError, Transaction};
use crate::store::audit::batch;
use crate::store::audit::chain::{BatchPart, Hash, Hasher, Keys};
use crate::store::audit::days::Day;
use crate::store::audit::links::shown;
use crate::store::audit::{Fault, FaultKind, Report};

/// Batches whose rows are sorted at once, about.
const BATCHES: i64 = 500;
/// Boots whose batches are read at once.
const BOOTS: i64 = 1_000;

const BEGIN: &str = "
SET LOCAL statement_timeout = 0;
SET LOCAL work_mem = '64MB';
SET LOCAL DateStyle = 'ISO'";

/// The first day of each partition, and the day behind it; null for one that is bounded in another way.
/// Without a backslash, which is none where `standard_conforming_strings` is off.
const DAYS: &str = "
SELECT bounds[1]::date, bounds[2]::date FROM pg_inherits
JOIN pg_class ON pg_class.oid = inhrelid
CROSS JOIN LATERAL regexp_match(pg_get_expr(relpartbound, pg_class.oid),
    '^FOR VALUES FROM [(]''([0-9]+-[0-9]+-[0-9]+)''[)] TO [(]''([0-9]+-[0-9]+-[0-9]+)''[)]$') AS bounds
WHERE inhparent IN ('weir.audit_events'::regclass, 'weir.audit_batches'::regclass)";

/// Where the next part of a day ends.
const EDGE: &str = "
SELECT count(*), max(arrival) FROM (
    SELECT arrival FROM weir.audit_batches WHERE day = $1 AND arrival >= $2
    ORDER BY arrival FETCH FIRST ($3) ROWS WITH TIES
) AS batches";

/// The batches of a part.
const PART: &str = "
SELECT boot_id, first, last, day, dropped, is_end, before, hash, arrival, sealed, boot, instance, key_check
FROM weir.audit_batches LEFT JOIN weir.audit_boots ON id = boot_id
WHERE day = $1 AND arrival >= $2 AND arrival <= $3 ORDER BY arrival, boot_id, first";

/// The batches of some boots. Those that are minutes old may have come ahead of one that is still on its way: a boot's batches travel
/// by several streams, and are stored by several workers.
const CHAIN: &str = "
SELECT boot_id, first, last, day, dropped, is_end, before, hash,
    sealed BETWEEN now() - interval '5 minutes' AND now() + interval '5 minutes'
FROM weir.audit_batches WHERE boot_id > $1 AND boot_id <= $2 ORDER BY boot_id, first, is_end DESC, day";

/// The days of batches that no query would find: `audit_spans` does not tell of them.
const HIDDEN: &str = "
SELECT DISTINCT day FROM weir.audit_batches AS batches
WHERE NOT EXISTS (SELECT FROM weir.audit_spans AS spans WHERE span = arrival >> 17 AND spans.day = batches.day)
ORDER BY day";

/// Whether a view stands in a table's place, or rows are held back from this user: what is asked for by another query may be something else.
const VEILED: &str = "
SELECT count(*) > 0 FROM pg_class
WHERE oid IN ('weir.audit_events'::regclass, 'weir.audit_batches'::regclass, 'weir.audit_boots'::regclass, 'weir.audit_spans'::regclass)
    AND (relkind NOT IN ('r', 'p') OR row_security_active(oid))";

const INSTANCES: &str = "
SELECT id, boot, instance, started, key_check, removed_to, removed_hash, removed_mark
FROM weir.audit_boots WHERE id > $1 ORDER BY id LIMIT $2";

type Rows = Pin<Box<RowStream>>;

/// What tells a batch from others: its boot, its first number, and whether it is an end mark.
type Key = (i32, u64, bool);

/// What is found so far.
struct Look<'a> {
    transaction: &'a Transaction<'a>,
    keys: &'a Keys,
    report: Report,
    /// Batches that are not as they were written: what follows one need not name it again.
    changed: BTreeSet<Key>,
}

/// A batch as its row has it. What stands there that no worker writes is `None`.
struct Found {
    boot_id: i32,
    first: u64,
    last: u64,
    day: Day,
    dropped: u64,
    is_end: bool,
    before: Option<Hash>,
    hash: Option<Hash>,
}

/// A batch whose rows are to be looked at.
struct Part<'a> {
    batch: Found,
    arrival: i64,
    sealed: Option<Time>,
    /// The name of its boot, or `#3`.
    instance: String,
    /// `None` if it cannot be hashed here: its boot is not known, or was under a key that is not.
    boot: Option<([u8; 16], &'a Hasher)>,
}

/// A boot, and how far its batches were followed.
struct Boot {
    instance: String,
    /// Up to this number retention has removed its batches.
    removed_to: u64,
    /// The number that comes next.
    next: u64,
    /// The hash that the next batch follows; `None` where it cannot be told.
    before: Option<Hash>,
    /// What is wrong where the next batch does not follow it.
    broken: FaultKind,
    /// Whether the batch before is one that was changed.
    is_behind_changed: bool,
    batches: u64,
    dropped: u64,
    ended: bool,
}

/// Checks everything. Events behind the last batch of a boot without an end mark cannot be missed: such boots are named.
pub(super) async fn verify(client: &mut Client, keys: &Keys) -> Result<Report, PostgresError> {
    let transaction = client
        .build_transaction()
        .isolation_level(IsolationLevel::RepeatableRead)
        .read_only(true)
        .start()
        .await?;
    transaction.batch_execute(BEGIN).await?;
    let mut look = Look {
        transaction: &transaction,
        keys,
        report: Report::default(),
        changed: BTreeSet::new(),
    };
    for day in look.days().await? {
        look.report.files += 1;
        look.day(day).await?;
    }
    look.chains().await?;
    look.hidden().await?;
    let report = look.report;
    transaction.rollback().await?;
    Ok(report)
}

impl Look<'_> {
    /// The days that there are partitions of.
    async fn days(&mut self) -> Result<BTreeSet<Day>, PostgresError> {
        let mut days = BTreeSet::new();
        for row in self.transaction.query(DAYS, &[]).await? {
            let bound = |index| row.try_get(index).ok().map(|Date(day)| day);
            match (bound(0), bound(1)) {
                (Some(day), Some(end)) if end.0 == day.0 + 1 => drop(days.insert(day)),
                // What is in it was not put there by weir, and is not looked at.
                (day, _) => self
                    .report
                    .faults
                    .push(Fault::of_file(day.unwrap_or_default(), FaultKind::File)),
            }
        }
        Ok(days)
    }

    /// Checks the rows of a day's partition against its batches.
    async fn day(&mut self, day: Day) -> Result<(), PostgresError> {
        let mut low = i64::MIN;
        loop {
            let values: [&(dyn ToSql + Sync); 3] = [&Date(day), &low, &BATCHES];
            let edge = self.transaction.query_one(EDGE, &values).await?;
            let count: i64 = edge.try_get(0)?;
            let is_last = count < BATCHES;
            // Every row is in one of the parts, whatever its arrival says.
            let high = match is_last {
                true => i64::MAX,
                false => edge.try_get(1)?,
            };
            self.part(day, low, high).await?;
            if is_last || high == i64::MAX {
                return Ok(());
            }
            low = high + 1;
        }
    }

    /// Those that arrived from `low` up to `high`.
    async fn part(&mut self, day: Day, low: i64, high: i64) -> Result<(), PostgresError> {
        let values: [&(dyn ToSql + Sync); 3] = [&Date(day), &low, &high];
        let parts = self.transaction.query(PART, &values).await?;
        let parts = parts.iter().map(|row| Part::of(row, self.keys));
        let parts = parts.collect::<Result<Vec<_>, _>>()?;
        let rows = format!(
            "SELECT arrival, boot_id, {COLUMNS} FROM weir.audit_events
             WHERE day = $1 AND arrival >= $2 AND arrival <= $3 ORDER BY arrival, boot_id, seq"
        );
        let rows = self.transaction.query_raw(&rows, values).await?;
        let mut rows: Rows = Box::pin(rows);
        let mut row = next(&mut rows).await?;
        let (mut body, mut encoding) = (Vec::new(), Vec::new());
        for part in &parts {
            let batch = &part.batch;
            let place = (part.arrival, batch.boot_id);
            let mut expected = batch.first;
            let mut whole = true;
            let (mut readable, mut others) = (true, 0);
            body.clear();
            while let Some(found) = &row {
                let (at, seq) = self.place(found)?;
                if at > place || (at == place && seq > batch.last) {
                    break;
                }
                self.report.events += 1;
                if at < place || seq < expected {
                    // Of no batch, or a second of this number.
                    let instance = match at.1 == batch.boot_id {
                        true => part.instance.clone(),
                        false => format!("#{}", at.1),
                    };
                    self.fault(day, instance, seq..=seq, FaultKind::OutOfPlace);
                } else {
                    if seq > expected {
                        self.fault(
                            day,
                            part.instance.clone(),
                            expected..=seq - 1,
                            FaultKind::Missing,
                        );
                        whole = false;
                    }
                    expected = seq + 1;
                    encoding.clear();
                    let fields = Fields::of(found, 2);
                    let is_other = |fields: &Fields<'_>| fields.is_of_another_version();
                    others += u64::from(fields.as_ref().is_ok_and(is_other));
                    readable &=
                        fields.is_ok_and(|fields| fields.encoding_into(&mut encoding).is_ok());
                    batch::put(&mut body, &encoding);
                }
                row = next(&mut rows).await?;
            }
            if expected <= batch.last {
                self.fault(
                    day,
                    part.instance.clone(),
                    expected..=batch.last,
                    FaultKind::Missing,
                );
                whole = false;
            }
            if !readable || (whole && !part.is_as_written(day, &body)) {
                // A process makes all events of a batch, and so by one version.
                let is_other = others > 0 && others == batch.last + 1 - batch.first;
                let (seqs, kind) = match batch.is_end {
                    true => (0..=0, FaultKind::EndMark),
                    false if is_other => (batch.first..=batch.last, FaultKind::Version),
                    false => (batch.first..=batch.last, FaultKind::Changed),
                };
                self.fault(day, part.instance.clone(), seqs, kind);
                if kind != FaultKind::Version {
                    self.changed.insert(batch.key());
                }
            }
        }
        while let Some(found) = &row {
            let ((_, boot_id), seq) = self.place(found)?;
            self.report.events += 1;
            let of_boot = parts.iter().find(|part| part.batch.boot_id == boot_id);
            let instance =
                of_boot.map_or_else(|| format!("#{boot_id}"), |part| part.instance.clone());
            self.fault(day, instance, seq..=seq, FaultKind::OutOfPlace);
            row = next(&mut rows).await?;
        }
        Ok(())
    }

    /// Arrival and boot of a row, and its number.
    fn place(&self, row: &Row) -> Result<((i64, i32), u64), PostgresError> {
        let place = (row.try_get(0)?, row.try_get(1)?);
        Ok((place, unsigned(row.try_get(2)?)))
    }

    /// Checks that the batches of each boot follow one another.
    async fn chains(&mut self) -> Result<(), PostgresError> {
        let mut low = i32::MIN;
        loop {
            let boots = self.transaction.query(INSTANCES, &[&low, &BOOTS]).await?;
            let is_last = (boots.len() as i64) < BOOTS;
            let mut known = BTreeMap::new();
            for row in &boots {
                known.insert(row.try_get::<_, i32>(0)?, self.boot(row)?);
            }
            let last = known.keys().next_back().copied();
            // A batch whose boot is not known is in one of the parts too.
            let high = last.filter(|_| !is_last).unwrap_or(i32::MAX);
            let values: [&(dyn ToSql + Sync); 2] = [&low, &high];
            let batches = self.transaction.query_raw(CHAIN, values).await?;
            let mut batches: Rows = Box::pin(batches);
            while let Some(row) = next(&mut batches).await? {
                let batch = Found::of(&row)?;
                let is_new: bool = row.try_get(8)?;
                match known.get_mut(&batch.boot_id) {
                    Some(boot) => self.follow(boot, &batch, is_new),
                    None => {
                        let instance = format!("#{}", batch.boot_id);
                        let seqs = batch.first..=batch.last;
                        self.fault(batch.day, instance, seqs, FaultKind::InstanceMissing);
                    }
                }
            }
            for boot in known.into_values() {
                self.report.instances += 1;
                self.report.dropped += boot.dropped;
                // One that retention has removed as a whole may have ended. Of one that has nothing, all may be missing.
                if !boot.ended && (boot.batches > 0 || boot.removed_to == 0) {
                    self.report.open.push(boot.instance);
                }
            }
            if is_last {
                return Ok(());
            }
            low = high;
        }
    }

    /// Of a row of [`INSTANCES`], with its faults.
    fn boot(&mut self, row: &Row) -> Result<Boot, PostgresError> {
        let id: [u8; 16] = row.try_get::<_, Uuid>(1)?.into_bytes();
        let name: &str = row.try_get(2)?;
        let started: Option<Time> = row.try_get(3).ok();
        let instance = shown(name, &id);
        let day = started.map_or(Day::default(), |Time(started)| Day::of(started.into()));
        let hasher = self.keys.of(hash(row, 4));
        if hasher.is_none() {
            let fault = Fault::of_instance(day, instance.clone(), FaultKind::Key);
            self.report.faults.push(fault);
        }
        let removed_to = unsigned(row.try_get(5)?);
        let removed = hash(row, 6).filter(|_| removed_to > 0);
        // By the key of the worker that removed it, which need not be the boot's.
        let is_marked = removed.is_some_and(|removed| {
            let mut marks = self
                .keys
                .all()
                .map(|hasher| hasher.removed_to(&id, removed_to, &removed));
            hash(row, 7).is_some_and(|mark| marks.any(|fits| fits == mark))
        });
        let is_removed = removed_to > 0 && (hasher.is_none() || is_marked);
        if removed_to > 0 && !is_removed {
            let fault = Fault::of_instance(day, instance.clone(), FaultKind::Instance);
            self.report.faults.push(fault);
        }
        if started.is_none() && hasher.is_some() && !is_removed {
            let fault = Fault::of_instance(day, instance.clone(), FaultKind::Instance);
            self.report.faults.push(fault);
        }
        let (removed_to, before, broken) = match is_removed {
            true => (removed_to, removed, FaultKind::Chain),
            false => {
                let start = started.zip(hasher);
                let start = start.map(|(Time(started), hasher)| hasher.boot(name, &id, started.0));
                (0, start, FaultKind::Instance)
            }
        };
        Ok(Boot {
            instance,
            removed_to,
            next: removed_to + 1,
            before,
            broken,
            is_behind_changed: false,
            batches: 0,
            dropped: 0,
            ended: false,
        })
    }

    /// The next batch of the boot. What is missing ahead of one that is new may still come.
    fn follow(&mut self, boot: &mut Boot, batch: &Found, is_new: bool) {
        boot.batches += 1;
        boot.dropped = boot.dropped.max(batch.dropped);
        // Late, and of days that retention has removed already.
        if batch.first <= boot.removed_to {
            return;
        }
        let mut say = |seqs, kind| self.fault(batch.day, boot.instance.clone(), seqs, kind);
        if batch.first < boot.next {
            boot.next = boot.next.max(batch.last.saturating_add(1));
            boot.before = None;
            return say(batch.first..=batch.last, FaultKind::OutOfPlace);
        }
        if batch.first > boot.next {
            let kind = match batch.is_end {
                true => FaultKind::TailMissing,
                false => FaultKind::Missing,
            };
            match is_new {
                true => self.report.pending += batch.first - boot.next,
                false => say(boot.next..=batch.first - 1, kind),
            }
            boot.before = None;
        }
        let is_changed = self.changed.contains(&batch.key());
        let follows = boot
            .before
            .is_none_or(|before| batch.before == Some(before));
        if !follows && !is_changed && !boot.is_behind_changed {
            let (seqs, kind) = match (boot.broken, batch.is_end) {
                (FaultKind::Instance, _) => (0..=0, FaultKind::Instance),
                (_, true) => (0..=0, FaultKind::EndMark),
                (broken, false) => (batch.first..=batch.last, broken),
            };
            self.fault(batch.day, boot.instance.clone(), seqs, kind);
        }
        boot.broken = FaultKind::Chain;
        boot.is_behind_changed = is_changed;
        boot.next = batch.last.saturating_add(1);
        boot.ended = batch.is_end;
        // An end mark that another process made for a killed boot may be ahead of batches that were still on their way: they follow
        // what it follows.
        if !batch.is_end {
            boot.before = batch.hash;
        }
    }

    async fn hidden(&mut self) -> Result<(), PostgresError> {
        if self.transaction.query_one(VEILED, &[]).await?.try_get(0)? {
            // Of no day.
            let fault = Fault::of_file(Day::default(), FaultKind::Veiled);
            self.report.faults.push(fault);
        }
        for row in self.transaction.query(HIDDEN, &[]).await? {
            let Date(day) = row.try_get(0)?;
            let fault = Fault::of_file(day, FaultKind::File);
            self.report.faults.push(fault);
        }
        Ok(())
    }

    /// Names the fault, in one with the one before where it goes on from it.
    fn fault(&mut self, day: Day, instance: String, seqs: RangeInclusive<u64>, kind: FaultKind) {
        if let Some(last) = self.report.faults.last_mut()
            && last.instance == instance
            && last.kind == kind
            && last.days == (day..=day)
            && (*last.seqs.end() == *seqs.start() || *last.seqs.end() + 1 == *seqs.start())
        {
            last.seqs = *last.seqs.start()..=*seqs.end();
            return;
        }
        self.report.faults.push(Fault {
            days: day..=day,
            instance,
            seqs,
            kind,
        });
    }
}

impl Found {
    fn key(&self) -> Key {
        (self.boot_id, self.first, self.is_end)
    }

    /// Of a row that begins with the columns of [`CHAIN`].
    fn of(row: &Row) -> Result<Found, PostgresError> {
        let Date(day) = row.try_get(3)?;
        Ok(Found {
            boot_id: row.try_get(0)?,
            first: unsigned(row.try_get(1)?),
            last: unsigned(row.try_get(2)?),
            day,
            dropped: unsigned(row.try_get(4)?),
            is_end: row.try_get(5)?,
            before: hash(row, 6),
            hash: hash(row, 7),
        })
    }
}

impl<'a> Part<'a> {
    /// Of a row of [`PART`].
    fn of(row: &Row, keys: &'a Keys) -> Result<Part<'a>, PostgresError> {
        let batch = Found::of(row)?;
        let boot: Option<Uuid> = row.try_get(10)?;
        let boot = boot.map(Uuid::into_bytes);
        let name: Option<&str> = row.try_get(11)?;
        let instance = match (name, boot) {
            (Some(name), Some(boot)) => shown(name, &boot),
            (None, _) | (_, None) => format!("#{}", batch.boot_id),
        };
        Ok(Part {
            arrival: row.try_get(8)?,
            sealed: row.try_get(9).ok(),
            instance,
            boot: boot.zip(keys.of(hash(row, 12))),
            batch,
        })
    }

    /// Whether it hashes to what it says, with these events; so too where that cannot be told.
    fn is_as_written(&self, day: Day, body: &[u8]) -> bool {
        let Some((boot, hasher)) = &self.boot else {
            return true;
        };
        let (Some(before), Some(Time(sealed))) = (self.batch.before, self.sealed) else {
            return false;
        };
        let part = BatchPart {
            boot,
            first: self.batch.first,
            count: (self.batch.last + 1).saturating_sub(self.batch.first),
            sealed: sealed.0,
            dropped: self.batch.dropped,
            is_end: self.batch.is_end,
            body,
        };
        Day::of(sealed.into()) == day && self.batch.hash == Some(hasher.batch(&before, &part))
    }
}

async fn next(rows: &mut Rows) -> Result<Option<Row>, PostgresError> {
    Ok(rows.try_next().await?)
}

fn hash(row: &Row, index: usize) -> Option<Hash> {
    let bytes: Option<&[u8]> = row.try_get(index).ok()?;
    bytes?.try_into().ok()
}

/// No worker writes a negative number.
fn unsigned(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}
