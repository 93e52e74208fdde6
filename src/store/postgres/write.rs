//! Stores batches: claims them and copies their rows in one transaction, so that a batch is there once with all its rows,
//! however often it is sent, and whatever dies in between. Owns what is done about each error; must not know where
//! batches come from.
//!
//! Batches are claimed in the order of their keys: of two writers that have the same ones, the second waits for the first,
//! and none of them for the other in turn.

use std::collections::{HashMap, HashSet};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::SinkExt as _;
use tokio::time::{Instant, sleep, timeout};
use tokio_postgres::Statement;
use tokio_postgres::types::ToSql;
use tracing::warn;
use uuid::Uuid;

use super::partitions::{self, Admission};
use super::row::{self, BatchColumns, Date, Time};
use super::{Client, CloseUnlessKept, Postgres, PostgresError, Transaction, backend};
use crate::store::audit::batch::Batch;
use crate::store::audit::days::Day;

/// For a transaction that the server is not at, as this process sees it: it hangs, or is away.
const GIVEN_UP: Duration = Duration::from_secs(45);
/// Between asking whether the server is still at a transaction.
const ASK_EVERY: Duration = Duration::from_secs(1);
/// A transaction that takes so long is told of.
const LONG: Duration = Duration::from_secs(10);
/// Rows go to the connection in pieces of about this many bytes.
const PIECE: usize = 128 << 10;
/// Boots that are remembered from one transaction to the next, at most.
const BOOTS: usize = 10_000;

/// What a transaction begins with. A claim waits for another's transaction, but not long: its batches can be left to it. A
/// commit is on disk before it is said, whatever the server does by default.
const BOUNDS: &str = "SET LOCAL statement_timeout = '30s'; SET LOCAL lock_timeout = '2s';
     SET LOCAL idle_in_transaction_session_timeout = '30s';
     SELECT set_config('synchronous_commit', 'on', true) WHERE current_setting('synchronous_commit') = 'off'";

/// In the order in which others add them. Those that are there are left out first: each row that is tried takes a number, of which there are
/// two thousand million.
const BOOTS_ADD: &str = "INSERT INTO weir.audit_boots (boot, instance, started, key_check)
     SELECT boot, instance, started, key_check
     FROM unnest($1::uuid[], $2::text[], $3::timestamptz[], $4::bytea[]) AS b (boot, instance, started, key_check)
     WHERE NOT EXISTS (SELECT FROM weir.audit_boots a WHERE a.boot = b.boot)
     ORDER BY boot
     ON CONFLICT (boot) DO NOTHING";

const BOOTS_FIND: &str = "SELECT boot, id FROM weir.audit_boots WHERE boot = ANY ($1)";

/// The boots are looked up again: ids that are remembered may be of a database that was replaced.
const CLAIM: &str = "INSERT INTO weir.audit_batches
         (day, boot_id, first, last, sealed, arrival, dropped, is_end, before, hash)
     SELECT b.day, b.boot_id, b.first, b.last, b.sealed, pg_current_xact_id()::text::bigint, b.dropped, b.is_end, b.before, b.hash
     FROM unnest($1::date[], $2::integer[], $3::uuid[], $4::bigint[], $5::bigint[], $6::timestamptz[], $7::bigint[],
             $8::boolean[], $9::bytea[], $10::bytea[])
         AS b (day, boot_id, boot, first, last, sealed, dropped, is_end, before, hash)
         JOIN weir.audit_boots a ON a.id = b.boot_id AND a.boot = b.boot
     ORDER BY b.boot_id, b.first, b.is_end, b.day
     ON CONFLICT (boot_id, first, is_end, day) DO NOTHING
     RETURNING boot_id, first, is_end, day, arrival";

/// What is there in the place of batches that were not claimed. Their days are named apart: else it would be planned for all there are, and
/// lock each with its indexes.
const FIND: &str = "SELECT b.place, a.id IS NOT NULL, s.hash, s.before
     FROM unnest($1::integer[], $2::date[], $3::integer[], $4::uuid[], $5::bigint[], $6::boolean[])
             AS b (place, day, boot_id, boot, first, is_end)
         LEFT JOIN weir.audit_boots a ON a.id = b.boot_id AND a.boot = b.boot
         LEFT JOIN weir.audit_batches s ON s.boot_id = b.boot_id AND s.first = b.first AND s.is_end = b.is_end AND s.day = b.day
             AND s.day = ANY ($2)";

/// A batch and an event whose number no boot comes to, of which nothing stays. Else they are as real ones, so that what others demand of rows
/// is true of them, too.
const TRY: &str = "SAVEPOINT tried;
     INSERT INTO weir.audit_batches (day, boot_id, first, last, sealed, arrival, dropped, is_end, before, hash)
         SELECT (now() AT TIME ZONE 'UTC')::date, coalesce(max(id), -1), 9223372036854775807, 9223372036854775807, now(),
             pg_current_xact_id()::text::bigint, 0, false, sha256(''), sha256('') FROM weir.audit_boots;
     INSERT INTO weir.audit_events (day, boot_id, seq, time, client, route, method, path, status, arrival, detail)
         SELECT (now() AT TIME ZONE 'UTC')::date, coalesce(max(id), -1), 9223372036854775807, now(), '127.0.0.1', '/', 'GET', '/', 200,
             pg_current_xact_id()::text::bigint, sha256('') FROM weir.audit_boots;
     ROLLBACK TO tried";

/// A record of its own in the server's log, for which a commit waits as for rows: without one it waits for no standby. Anyone may
/// write it.
const RECORD: &str = "SELECT pg_logical_emit_message(true, 'weir', ''::text)";

/// The SQLSTATE of a row that no partition is for.
const NO_PARTITION: &str = "23514";

/// What became of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Its rows were committed.
    Stored,
    /// They had been before.
    Known,
    /// They never can be, and why not.
    Refused(String),
}

type Beat = Arc<dyn Fn() + Send + Sync>;

/// One that stores, with what it remembers of the database.
pub struct Writer {
    postgres: Arc<Postgres>,
    beat: Beat,
    retention: Duration,
    /// Their ids.
    boots: HashMap<Uuid, i32>,
    /// Those that have partitions.
    days: HashSet<Day>,
    buffer: BytesMut,
}

impl Writer {
    /// `retention`: a day that is older takes no rows.
    pub fn new(postgres: Arc<Postgres>, retention: Duration) -> Writer {
        Writer {
            postgres,
            beat: Arc::new(|| {}),
            retention,
            boots: HashMap::new(),
            days: HashSet::new(),
            buffer: BytesMut::new(),
        }
    }

    /// Has `beat` called while the server is at what takes long.
    pub fn beating(self, beat: impl Fn() + Send + Sync + 'static) -> Writer {
        let beat = Arc::new(beat);
        Writer { beat, ..self }
    }

    /// Stores the batches: what became of each, in their order. On an error none of them is settled, though some may be
    /// stored; all are to be tried again.
    pub async fn store(&mut self, batches: &[&Batch]) -> Result<Vec<Outcome>, PostgresError> {
        match self.attempt(batches).await {
            Err(error) if error.is_about_data() => {
                let mut outcomes = Vec::with_capacity(batches.len());
                for batch in batches {
                    outcomes.push(self.alone(batch).await?);
                }
                // Where no row is taken, none of them is to blame.
                if !outcomes.contains(&Outcome::Stored) {
                    self.try_rows().await?;
                }
                // Now that one was, what stood in the way of all may be gone.
                for (batch, outcome) in batches.iter().zip(&mut outcomes) {
                    if let Outcome::Refused(_) = outcome {
                        *outcome = self.alone(batch).await?;
                    }
                }
                Ok(outcomes)
            }
            outcomes => outcomes,
        }
    }

    /// What becomes of a batch in a transaction of its own.
    async fn alone(&mut self, batch: &Batch) -> Result<Outcome, PostgresError> {
        (self.beat)();
        match self.attempt(&[batch]).await {
            Err(error) if error.is_about_data() => Ok(Outcome::Refused(error.to_string())),
            outcome => outcome?
                .pop()
                .ok_or_else(|| PostgresError::Nonsense("no outcome of a batch".to_owned())),
        }
    }

    /// Whether the database takes rows at all, and commits. Today has its partitions then.
    pub async fn takes_rows(&self) -> bool {
        self.try_rows().await == Ok(Admission::Ready)
    }

    /// Tries a row, of which none is left, and commits; unless today's partitions are not to be had, which says nothing of rows.
    async fn try_rows(&self) -> Result<Admission, PostgresError> {
        let tried = held(
            &self.postgres,
            &self.beat,
            async |connection: &mut Client| {
                let today = partitions::today(connection).await?;
                let admission = partitions::admit(connection, today, self.retention).await;
                let admission = admission.map_err(PostgresError::beside)?;
                if admission != Admission::Ready {
                    return Ok(admission);
                }
                let transaction = connection.transaction().await?;
                transaction.batch_execute(BOUNDS).await?;
                let tried = transaction.batch_execute(TRY).await;
                tried.map_err(|error| PostgresError::from(error).at_any_row())?;
                transaction.batch_execute(RECORD).await?;
                transaction.commit().await?;
                Ok(admission)
            },
        );
        tried.await
    }

    /// In one transaction.
    async fn attempt(&mut self, batches: &[&Batch]) -> Result<Vec<Outcome>, PostgresError> {
        let outcome = match self.attempt_once(batches).await {
            // Removed meanwhile, or another database than before.
            Err(error) if error.has_code(NO_PARTITION) || error == stale() => {
                self.forget();
                self.attempt_once(batches).await
            }
            outcome => outcome,
        };
        if outcome.is_err() {
            self.forget();
        }
        outcome
    }

    fn forget(&mut self) {
        self.boots.clear();
        self.days.clear();
    }

    async fn attempt_once(&mut self, batches: &[&Batch]) -> Result<Vec<Outcome>, PostgresError> {
        let (postgres, beat) = (self.postgres.clone(), self.beat.clone());
        let store = async |connection: &mut Client| self.store_by(connection, batches).await;
        held(&postgres, &beat, store).await
    }

    async fn store_by(
        &mut self,
        connection: &mut Client,
        batches: &[&Batch],
    ) -> Result<Vec<Outcome>, PostgresError> {
        let mut outcomes = Vec::with_capacity(batches.len());
        for batch in batches {
            let refusal = self.refusal(connection, batch).await;
            outcomes.push(refusal.map_err(PostgresError::beside)?);
        }
        // `verify` is to miss what is refused, unless it is no event: of a boot without any, nothing is ever missing.
        let known = batches.iter().zip(&outcomes);
        let known = known.filter(|(batch, outcome)| outcome.is_none() || batch.header.last() > 0);
        let known: Vec<_> = known.map(|(batch, _)| *batch).collect();
        let found = self.find_boots(connection, &known).await;
        found.map_err(PostgresError::beside)?;
        let open = batches.iter().zip(&outcomes).enumerate();
        let open = open.filter(|(_, (_, outcome))| outcome.is_none());
        let open: Vec<_> = open.map(|(place, (batch, _))| (place, *batch)).collect();
        if !open.is_empty() {
            let statements = Statements::of(connection).await?;
            let transaction = connection.transaction().await?;
            let settled = self.copy(&transaction, &statements, &open).await?;
            transaction.commit().await?;
            for ((place, _), outcome) in open.iter().zip(settled) {
                outcomes[*place] = Some(outcome);
            }
        }
        Ok(outcomes.into_iter().flatten().collect())
    }

    /// Why a batch cannot be stored, as far as its header tells; its day's partitions are there afterwards otherwise.
    async fn refusal(
        &mut self,
        connection: &mut Client,
        batch: &Batch,
    ) -> Result<Option<Outcome>, PostgresError> {
        let header = &batch.header;
        if [header.first, header.last(), header.dropped]
            .map(i64::try_from)
            .iter()
            .any(Result::is_err)
        {
            let reason = "its numbers are beyond what the database can hold";
            return Ok(Some(Outcome::Refused(reason.to_owned())));
        }
        let day = header.day();
        if self.days.contains(&day) {
            return Ok(None);
        }
        let refused = |why: &str| Some(Outcome::Refused(format!("its day, {day}, {why}")));
        Ok(
            match partitions::admit(connection, day, self.retention).await? {
                Admission::Ready => {
                    self.days.insert(day);
                    None
                }
                Admission::Gone => refused(
                    "is older than worker.retention keeps: the clock of its instance was wrong, or its spool kept it for longer",
                ),
                Admission::Ahead => refused("lies weeks ahead: the clock of its instance is wrong"),
                Admission::Detached => refused(
                    "is detached from weir.audit_events or weir.audit_batches: attach it, or rename the table, and replay",
                ),
            },
        )
    }

    /// Learns the ids of the batches' boots.
    async fn find_boots(
        &mut self,
        connection: &Client,
        batches: &[&Batch],
    ) -> Result<(), PostgresError> {
        if self.boots.len() > BOOTS {
            self.boots.clear();
        }
        let headers = batches.iter().map(|batch| &batch.header);
        let mut new: Vec<_> = headers
            .filter(|header| !self.boots.contains_key(&Uuid::from_bytes(header.boot)))
            .collect();
        if new.is_empty() {
            return Ok(());
        }
        // In one order, as claims are.
        new.sort_unstable_by_key(|header| header.boot);
        new.dedup_by_key(|header| header.boot);
        let uuids: Vec<_> = new.iter().map(|it| Uuid::from_bytes(it.boot)).collect();
        let instances: Vec<_> = new.iter().map(|it| it.instance.as_str()).collect();
        let started: Vec<_> = new.iter().map(|it| Time(it.started)).collect();
        let checks: Vec<_> = new
            .iter()
            .map(|it| it.key_check.map(|it| it.to_vec()))
            .collect();
        connection
            .execute(BOOTS_ADD, &[&uuids, &instances, &started, &checks])
            .await?;
        for row in connection.query(BOOTS_FIND, &[&uuids]).await? {
            self.boots.insert(row.try_get(0)?, row.try_get(1)?);
        }
        Ok(())
    }

    async fn copy(
        &mut self,
        transaction: &Transaction<'_>,
        statements: &Statements,
        open: &[(usize, &Batch)],
    ) -> Result<Vec<Outcome>, PostgresError> {
        let keys: Vec<_> = open
            .iter()
            .map(|(_, batch)| self.key(batch).ok_or_else(stale))
            .collect::<Result<_, _>>()?;
        let mut claimed = claim(transaction, statements, open, &keys).await?;
        let mut outcomes = Vec::with_capacity(open.len());
        let mut ours = Vec::new();
        let mut others = Vec::new();
        for (n, key) in keys.iter().enumerate() {
            // The first of two alike.
            match claimed.remove(key) {
                Some(arrival) => {
                    ours.push((n, arrival));
                    outcomes.push(Outcome::Stored);
                }
                None => {
                    others.push(n);
                    outcomes.push(Outcome::Known);
                }
            }
        }
        if !others.is_empty() {
            // They may be seen here and by no standby yet: the server was killed while their commit waited for one.
            if ours.is_empty() {
                transaction.batch_execute(RECORD).await?;
            }
            for n in unlike(transaction, open, &keys, &others).await? {
                let reason = "another batch with its number is stored";
                outcomes[n] = Outcome::Refused(reason.to_owned());
            }
        }
        if ours.iter().any(|(n, _)| open[*n].1.header.count > 0) {
            let rows = ours.iter().map(|(n, arrival)| {
                let Key { day, boot_id, .. } = keys[*n];
                let place = BatchColumns {
                    day,
                    boot_id,
                    arrival: *arrival,
                };
                (place, open[*n].1)
            });
            self.copy_rows(transaction, statements, rows).await?;
        }
        Ok(outcomes)
    }

    fn key(&self, batch: &Batch) -> Option<Key> {
        let header = &batch.header;
        let boot = self.boots.get(&Uuid::from_bytes(header.boot))?;
        Some(Key {
            day: header.day(),
            boot_id: *boot,
            first: signed(header.first),
            is_end: header.is_end,
        })
    }

    async fn copy_rows<'a>(
        &mut self,
        transaction: &Transaction<'_>,
        statements: &Statements,
        rows: impl Iterator<Item = (BatchColumns, &'a Batch)>,
    ) -> Result<(), PostgresError> {
        let sink = transaction.copy_in::<_, Bytes>(&statements.copy).await?;
        let mut sink = pin!(sink);
        self.buffer.clear();
        self.buffer.extend_from_slice(row::HEADER);
        let mut count = 0;
        for (place, batch) in rows {
            for encoding in batch.events() {
                row::put(&mut self.buffer, &place, encoding)
                    .map_err(|error| PostgresError::Nonsense(error.to_string()))?;
                count += 1;
                if self.buffer.len() >= PIECE {
                    let piece = self.buffer.split().freeze();
                    sink.send(piece).await?;
                    self.buffer.reserve(PIECE + PIECE / 4);
                }
            }
        }
        self.buffer.extend_from_slice(row::TRAILER);
        let piece = self.buffer.split().freeze();
        sink.send(piece).await?;
        let copied = sink.finish().await?;
        match copied == count {
            true => Ok(()),
            false => Err(PostgresError::Nonsense(format!(
                "of {count} rows it took {copied}"
            ))),
        }
    }
}

/// Does `work` by a connection that is not let go of while the server is at it: a commit that waits for a standby goes on whoever has
/// left, and each that is tried in its place would leave another.
async fn held<T>(
    postgres: &Postgres,
    beat: &Beat,
    work: impl AsyncFnOnce(&mut Client) -> Result<T, PostgresError>,
) -> Result<T, PostgresError> {
    let mut connection = CloseUnlessKept(Some(postgres.write().await?));
    let backend = timeout(GIVEN_UP, backend(connection.get())).await;
    let backend = backend.unwrap_or(Err(PostgresError::Late(GIVEN_UP)))?;
    let done = tokio::select! {
        done = work(connection.get()) => done?,
        () = left(postgres, backend, beat) => return Err(PostgresError::Late(GIVEN_UP)),
    };
    connection.keep();
    Ok(done)
}

/// Until the server was not at it for so long, as far as it can be asked.
async fn left(postgres: &Postgres, backend: i32, beat: &Beat) {
    let began = Instant::now();
    let mut at_work = began;
    let mut told = false;
    while at_work.elapsed() < GIVEN_UP {
        sleep(ASK_EVERY).await;
        if !matches!(postgres.is_at_work(backend).await, Ok(true)) {
            continue;
        }
        beat();
        at_work = Instant::now();
        if !told && began.elapsed() >= LONG {
            told = true;
            warn!(
                since = ?began.elapsed(),
                "postgres is at a transaction of the audit for long; it is waited for, and so is a standby where one is away that synchronous_standby_names names"
            );
        }
    }
}

/// What tells a batch from others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    day: Day,
    boot_id: i32,
    first: i64,
    is_end: bool,
}

/// Of one connection, prepared once.
struct Statements {
    claim: Statement,
    copy: Statement,
}

impl Statements {
    async fn of(connection: &Client) -> Result<Statements, PostgresError> {
        Ok(Statements {
            claim: connection.prepare_cached(CLAIM).await?,
            copy: connection.prepare_cached(row::COPY).await?,
        })
    }
}

/// The batches that are this transaction's to store, by key, with the transaction's number.
async fn claim(
    transaction: &Transaction<'_>,
    statements: &Statements,
    open: &[(usize, &Batch)],
    keys: &[Key],
) -> Result<HashMap<Key, i64>, PostgresError> {
    let headers = || open.iter().map(|(_, batch)| &batch.header);
    let days: Vec<_> = keys.iter().map(|key| Date(key.day)).collect();
    let ids: Vec<_> = keys.iter().map(|key| key.boot_id).collect();
    let boots: Vec<_> = headers().map(|it| Uuid::from_bytes(it.boot)).collect();
    let firsts: Vec<_> = keys.iter().map(|key| key.first).collect();
    let lasts: Vec<_> = headers().map(|it| signed(it.last())).collect();
    let sealed: Vec<_> = headers().map(|it| Time(it.sealed)).collect();
    let dropped: Vec<_> = headers().map(|it| signed(it.dropped)).collect();
    let ends: Vec<_> = keys.iter().map(|key| key.is_end).collect();
    let befores: Vec<_> = headers().map(|it| &it.before[..]).collect();
    let hashes: Vec<_> = headers().map(|it| &it.hash[..]).collect();
    let arguments: [&(dyn ToSql + Sync); 10] = [
        &days, &ids, &boots, &firsts, &lasts, &sealed, &dropped, &ends, &befores, &hashes,
    ];
    // Sent one behind the other without waiting.
    let (_, rows) = tokio::try_join!(
        transaction.batch_execute(BOUNDS),
        transaction.query(&statements.claim, &arguments)
    )?;
    let mut claimed = HashMap::with_capacity(rows.len());
    for row in rows {
        let Date(day) = row.try_get(3)?;
        let key = Key {
            day,
            boot_id: row.try_get(0)?,
            first: row.try_get(1)?,
            is_end: row.try_get(2)?,
        };
        claimed.insert(key, row.try_get(4)?);
    }
    Ok(claimed)
}

/// Those of `others` in whose place another batch is stored.
async fn unlike(
    transaction: &Transaction<'_>,
    open: &[(usize, &Batch)],
    keys: &[Key],
    others: &[usize],
) -> Result<Vec<usize>, PostgresError> {
    let places: Vec<_> = (0i32..).zip(others).map(|(place, _)| place).collect();
    let of = |n: &usize| (keys[*n], &open[*n].1.header);
    let days: Vec<_> = others.iter().map(|n| Date(of(n).0.day)).collect();
    let ids: Vec<_> = others.iter().map(|n| of(n).0.boot_id).collect();
    let boots: Vec<_> = others
        .iter()
        .map(|n| Uuid::from_bytes(of(n).1.boot))
        .collect();
    let firsts: Vec<_> = others.iter().map(|n| of(n).0.first).collect();
    let ends: Vec<_> = others.iter().map(|n| of(n).0.is_end).collect();
    let rows = transaction
        .query(FIND, &[&places, &days, &ids, &boots, &firsts, &ends])
        .await?;
    let mut unlike = Vec::new();
    for row in rows {
        let (place, boot_is_there): (i32, bool) = (row.try_get(0)?, row.try_get(1)?);
        let (hash, before): (Option<&[u8]>, Option<&[u8]>) = (row.try_get(2)?, row.try_get(3)?);
        let n = usize::try_from(place)
            .ok()
            .and_then(|place| others.get(place));
        let n = *n.ok_or_else(stale)?;
        let header = &open[n].1.header;
        // A boot's own end mark and the one of its heir, made at another time, say the same where they follow the same batch.
        let is_its_end = header.is_end && before == Some(&header.before[..]);
        match hash {
            Some(hash) if hash == header.hash || (boot_is_there && is_its_end) => {}
            Some(_) if boot_is_there => unlike.push(n),
            // The boot's id is of another database, or the batch was removed just now.
            Some(_) | None => return Err(stale()),
        }
    }
    Ok(unlike)
}

/// What is remembered of the database does not hold any more.
fn stale() -> PostgresError {
    PostgresError::Nonsense("its boots or days are not those that it had".to_owned())
}

/// Of a number that was found to fit.
fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
