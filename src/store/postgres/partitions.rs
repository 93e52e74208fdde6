//! The days of the audit in Postgres: a partition of events and one of batches for each. Makes them, indexes those that are
//! over, and removes them whole. Must not know when: the worker's task does.

use std::time::Duration;

use tokio::time::timeout;

use super::row::Date;
use super::{Client, CloseUnlessKept, PostgresError};
use crate::store::audit::chain::{Hash, Hasher};
use crate::store::audit::days::Day;

/// Days made ahead of today.
const AHEAD: u32 = 2;
/// A day further ahead is that of a clock gone wrong.
const FURTHEST: u32 = 31;

/// Held while a day is made, and while days are kept: `weir` in ASCII, and a number.
const MAKING: i64 = 0x7765_6972_0000_0002;
const KEEPING: i64 = 0x7765_6972_0000_0003;

/// For locks on tables that others use all the time: who waits for one holds up all that come behind.
const LOCK_TIMEOUT: &str = "SET LOCAL lock_timeout = '2s'";

/// Of who keeps days, whatever the role has: cut short, an index would be begun anew each time, and a large day would never go. An index
/// waits for all who may look at the database as it was before; behind one that was forgotten, days are to be made and to go all the same.
const BOUNDS: &str = "SET statement_timeout = 0; SET lock_timeout = '1h'";

/// Whether a day can take rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// Its partitions are there.
    Ready,
    /// Retention has removed it, or would.
    Gone,
    /// It lies too far ahead.
    Ahead,
    /// Someone has detached a partition of it, and left the table. A day that is archived comes back when it is wanted: what
    /// comes late for it must not hold up the days behind it, as it would if it were tried again until then.
    Detached,
}

/// Today in UTC, by the server's clock: workers whose clocks differ agree on it.
pub async fn today(connection: &Client) -> Result<Day, PostgresError> {
    let today = "SELECT (now() AT TIME ZONE 'UTC')::date";
    let row = connection.query_typed(today, &[]).await?.pop();
    let row = row.ok_or_else(|| PostgresError::Nonsense("no row for today".to_owned()))?;
    let Date(today) = row.try_get(0)?;
    Ok(today)
}

/// Makes the partitions of a day unless they are there, or the day is out of bounds.
pub async fn admit(
    connection: &mut Client,
    day: Day,
    retention: Duration,
) -> Result<Admission, PostgresError> {
    let today = today(connection).await?;
    if day < oldest(today, retention) {
        return Ok(Admission::Gone);
    }
    if day.0 > today.0.saturating_add(FURTHEST) {
        return Ok(Admission::Ahead);
    }
    Ok(match make(connection, day).await? {
        true => Admission::Ready,
        false => Admission::Detached,
    })
}

/// Makes yesterday, today and the next days.
pub async fn make_ahead(connection: &mut Client) -> Result<(), PostgresError> {
    let today = today(connection).await?;
    for day in today.0.saturating_sub(1)..=today.0 + AHEAD {
        make(connection, Day(day)).await?;
    }
    Ok(())
}

/// The first day that is kept.
pub fn oldest(today: Day, retention: Duration) -> Day {
    let days = u32::try_from(retention.as_secs() / 86_400).unwrap_or(u32::MAX);
    Day(today.0.saturating_sub(days))
}

/// The days that have partitions, the oldest first.
pub async fn list(connection: &Client) -> Result<Vec<Day>, PostgresError> {
    let query = "SELECT DISTINCT to_date(substring(c.relname FROM '[0-9_]{10}$'), 'YYYY_MM_DD')
        FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
        WHERE i.inhparent IN ('weir.audit_events'::regclass, 'weir.audit_batches'::regclass)
            AND c.relname ~ '^audit_(events|batches)_[0-9]{4}_[0-9]{2}_[0-9]{2}$'
        ORDER BY 1";
    let rows = connection.query_typed(query, &[]).await?;
    let day = |row: &tokio_postgres::Row| row.try_get(0).map(|Date(day)| day);
    Ok(rows.iter().map(day).collect::<Result<_, _>>()?)
}

/// False where one of them is there, and not attached.
async fn make(connection: &mut Client, day: Day) -> Result<bool, PostgresError> {
    let names = Names::of(day);
    let pairs = [
        ("audit_batches", &names.batches),
        ("audit_events", &names.events),
    ];
    let next = Day(day.0 + 1);
    // For each of the two whether it is attached; null where there is none, and none that was given another name.
    let [batches, events] = pairs.map(|(parent, name)| {
        format!(
            "coalesce((SELECT EXISTS (SELECT FROM pg_inherits WHERE inhrelid = c.oid AND inhparent = 'weir.{parent}'::regclass)
              FROM pg_class c WHERE c.oid = to_regclass('weir.{name}')),
             (SELECT true FROM pg_inherits JOIN pg_class c ON c.oid = inhrelid WHERE inhparent = 'weir.{parent}'::regclass
              AND pg_get_expr(c.relpartbound, c.oid) = format('FOR VALUES FROM (%L) TO (%L)', date '{day}', date '{next}')))"
        )
    });
    let attached = format!("SELECT {batches}, {events}");
    let attached = connection.query_one(&attached, &[]).await?;
    let attached: [Option<bool>; 2] = [attached.try_get(0)?, attached.try_get(1)?];
    if attached.contains(&Some(false)) {
        return Ok(false);
    }
    if attached == [Some(true); 2] {
        return Ok(true);
    }
    let transaction = connection.transaction().await?;
    let lock = format!("{LOCK_TIMEOUT}; SELECT pg_advisory_xact_lock({MAKING})");
    transaction.batch_execute(&lock).await?;
    for ((parent, name), attached) in pairs.into_iter().zip(attached) {
        if attached.is_some() {
            continue;
        }
        // By what the table of tables has now. to_regclass() goes by what the server's process remembers, which is not told of a table
        // that another has made while this transaction waited for its turn.
        let there = format!(
            "SELECT EXISTS (SELECT FROM pg_class WHERE relnamespace = 'weir'::regnamespace AND relname = '{name}')"
        );
        if transaction.query_one(&there, &[]).await?.try_get(0)? {
            continue;
        }
        // `CREATE TABLE … PARTITION OF` would wait for all that read or write the other days, and hold them up. What others have added to
        // the parent is to be there, or it is not attached.
        let make = format!(
            "CREATE TABLE weir.{name} (LIKE weir.{parent} INCLUDING DEFAULTS INCLUDING STORAGE INCLUDING CONSTRAINTS INCLUDING GENERATED);
             ALTER TABLE weir.{parent} ATTACH PARTITION weir.{name} FOR VALUES FROM ('{day}') TO ('{next}')"
        );
        transaction.batch_execute(&make).await?;
    }
    transaction.commit().await?;
    Ok(true)
}

/// Removes a day: how far each of its boots is removed is noted under the key first, in the same transaction.
pub async fn remove(
    connection: &mut Client,
    day: Day,
    hasher: &Hasher,
) -> Result<(), PostgresError> {
    let names = Names::of(day);
    let transaction = connection.transaction().await?;
    // Readers go on until the tables are dropped; none may add a batch behind the last that is noted.
    let lock = format!(
        "{LOCK_TIMEOUT}; CREATE TABLE IF NOT EXISTS weir.{batches} (LIKE weir.audit_batches);
         LOCK TABLE weir.{batches} IN SHARE MODE",
        batches = names.batches
    );
    transaction.batch_execute(&lock).await?;
    // Not an end mark: one that another process made may be ahead of batches, which do not follow it.
    let last = format!(
        "SELECT DISTINCT ON (b.boot_id) b.boot_id, a.boot, b.last, b.hash
         FROM weir.{} b JOIN weir.audit_boots a ON a.id = b.boot_id
         WHERE NOT b.is_end
         ORDER BY b.boot_id, b.first DESC",
        names.batches
    );
    let rows = transaction.query(&last, &[]).await?;
    let (mut ids, mut lasts, mut hashes, mut marks) = (vec![], vec![], vec![], vec![]);
    for row in &rows {
        let (id, boot, last): (i32, uuid::Uuid, i64) =
            (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
        let hash: &[u8] = row.try_get(3)?;
        // Of a hash that is none, the mark proves nothing, as it should.
        let whole = Hash::try_from(hash).unwrap_or_default();
        let number = u64::try_from(last).unwrap_or_default();
        marks.push(hasher.removed_to(boot.as_bytes(), number, &whole).to_vec());
        ids.push(id);
        lasts.push(last);
        hashes.push(hash);
    }
    let note = "UPDATE weir.audit_boots a
        SET removed_to = r.last, removed_hash = r.hash, removed_mark = r.mark
        FROM unnest($1::integer[], $2::bigint[], $3::bytea[], $4::bytea[]) AS r (id, last, hash, mark)
        WHERE a.id = r.id AND a.removed_to <= r.last";
    transaction
        .execute(note, &[&ids, &lasts, &hashes, &marks])
        .await?;
    // A boot whose end mark goes behind the last of its batches has nothing left that `verify` could look at. One whose clock was set
    // back meanwhile may have, on a day that was let in at that time.
    let ended = format!(
        "DELETE FROM weir.audit_boots a USING weir.{} b
         WHERE a.id = b.boot_id AND b.is_end AND a.removed_to = b.last AND NOT EXISTS
             (SELECT FROM weir.audit_batches later WHERE later.boot_id = a.id AND later.day > '{day}' AND later.day <= '{}')",
        names.batches,
        Day(day.0.saturating_add(FURTHEST))
    );
    let drop = format!(
        "{ended}; DELETE FROM weir.audit_spans WHERE day = '{day}';
         DROP TABLE IF EXISTS weir.{}; DROP TABLE IF EXISTS weir.{}",
        names.batches, names.events
    );
    transaction.batch_execute(&drop).await?;
    Ok(transaction.commit().await?)
}

/// The index by user of a day that is over, built beside whatever else goes on; false if it is there.
pub async fn index(connection: &Client, day: Day) -> Result<bool, PostgresError> {
    let table = Names::of(day).events;
    let name = format!("{table}_by_user");
    let state = format!(
        "SELECT i.indisvalid FROM pg_index i WHERE i.indexrelid = to_regclass('weir.{name}')"
    );
    let state = connection.query_opt(&state, &[]).await?;
    match state.map(|row| row.try_get(0)).transpose()? {
        Some(true) => return Ok(false),
        // One whose making was cut short.
        Some(false) => {
            let drop = format!("DROP INDEX CONCURRENTLY IF EXISTS weir.{name}");
            connection.batch_execute(&drop).await?;
        }
        None => {}
    }
    let make =
        format!("CREATE INDEX CONCURRENTLY IF NOT EXISTS {name} ON weir.{table} (username, time)");
    connection.batch_execute(&make).await?;
    Ok(true)
}

/// Brings the BRIN index of a day up to its rows, which autovacuum may be late with, or switched off. Not while one is at that table: it
/// does that itself at its end, and would be cancelled for whoever waits a second for it (`deadlock_timeout`).
pub async fn summarize(connection: &Client, day: Day) -> Result<(), PostgresError> {
    let query = format!(
        "SET LOCAL lock_timeout = '250ms';
         SELECT brin_summarize_new_values(i.indexrelid)
         FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am a ON a.oid = c.relam
         WHERE i.indrelid = to_regclass('weir.{}') AND a.amname = 'brin'",
        Names::of(day).events
    );
    // Both are one transaction.
    match connection
        .batch_execute(&query)
        .await
        .map_err(PostgresError::from)
    {
        Err(error) if error.is_held() => Ok(()),
        done => done,
    }
}

/// Has `keep` done by one process at a time: `None` if another is at it, which the server is to say `within` that time. `keep` is
/// told the server's process of the connection. The lock is the session's; whatever goes wrong, the connection is closed, and it
/// with it.
pub async fn alone<T>(
    connection: Client,
    within: Duration,
    keep: impl AsyncFnOnce(&mut Client, i32) -> Result<T, PostgresError>,
) -> Result<Option<T>, PostgresError> {
    let mut connection = CloseUnlessKept(Some(connection));
    let lock = format!("SELECT pg_try_advisory_lock({KEEPING}), pg_backend_pid()");
    let locked = timeout(within, connection.get().query_one(&lock, &[])).await;
    let locked = locked.map_err(|_| PostgresError::Late(within))??;
    if !locked.try_get(0)? {
        connection.keep();
        return Ok(None);
    }
    let backend = locked.try_get(1)?;
    let bounded = timeout(within, connection.get().batch_execute(BOUNDS)).await;
    bounded.map_err(|_| PostgresError::Late(within))??;
    keep(connection.get(), backend).await.map(Some)
}

/// What a day's partitions are called.
struct Names {
    events: String,
    batches: String,
}

impl Names {
    fn of(day: Day) -> Names {
        let day = day.to_string().replace('-', "_");
        Names {
            events: format!("audit_events_{day}"),
            batches: format!("audit_batches_{day}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_days_are_kept_as_retention_says() {
        let days = |days: u64| Duration::from_secs(days * 86_400);
        assert_eq!(oldest(Day(20_000), days(1)), Day(19_999));
        assert_eq!(oldest(Day(20_000), days(400)), Day(19_600));
        assert_eq!(oldest(Day(20_000), days(90_000)), Day(0));
    }
}
