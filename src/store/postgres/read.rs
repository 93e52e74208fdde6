//! Reads the events that workers store, while they store more. Must not write.
//!
//! Events are in the order in which they arrived: by transaction, then by boot and number. Not by day: what a process sends late,
//! out of its spool, is kept with the day that it is of, and one who follows is to see it all the same.
//!
//! There is no b-tree over the events, so a query walks them in windows of whole transactions: `audit_batches`, which has one row
//! for some 200 of them and an index by arrival, tells where the next so many batches end and of which days they are, and the
//! BRIN index finds the rows. Before that `audit_spans` tells of which days a stretch of transactions is at all: a statement
//! locks and plans every partition that it may have to read, and there are hundreds. Only what passes is sorted, of one window, and kept up to the limit. The windows grow while
//! they are quick and shrink when they are slow, so that a rare event is found soon and a statement does not run into its
//! timeout. On 6 million rows in two days: 6 ms for the newest 100, 7 ms for a page of 1,000 within an export.

mod walk;

use std::cmp::Ordering;
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use tokio::time::timeout_at;
use tokio_postgres::Row;
use tokio_postgres::types::{ToSql, Type};
use uuid::Uuid;

use self::walk::{Between, SPAN, Stretch, Window, before, behind};
use super::error::QUERY_CANCELED;
use super::migrate::check_version;
use super::row::{self, COLUMNS, Date, Fields, Time};
use super::{Client, CloseUnlessKept, OpenError, Postgres, PostgresError, verify};
use crate::clock;
use crate::config::postgres;
use crate::event::AuditEvent;
use crate::store::audit::chain::Keys;
use crate::store::audit::days::Day;
use crate::store::audit::{Cursor, Filter, Found, Order, Report, StoreError, Stored};

/// Events read at a time, at most: what one asks for without a limit is still read in parts.
const PAGE: usize = 5_000;
/// Batches in a window, for a start; there are some 200 events in one.
const WINDOW: i64 = 8;
const LARGEST_WINDOW: i64 = 200_000;
/// A window answered within this is followed by one four times as large; one that took ten times as long, by one of a quarter.
const QUICK: Duration = Duration::from_millis(100);
/// What it says of a table that is not there, or whose schema is not.
const NO_TABLE: [&str; 2] = ["42P01", "3F000"];

/// Spans that are looked at together, at most.
const MOST_SPANS: i64 = 64;

/// Up to which transaction all have ended: none before it can come to be seen later. Up to which there have been any. And the last
/// span, with its days.
const SETTLED: &str = "
SELECT pg_snapshot_xmin(now)::text::bigint, pg_snapshot_xmax(now)::text::bigint, span, days
FROM pg_current_snapshot() now LEFT JOIN (
    SELECT span, array_agg(day) AS days FROM weir.audit_spans GROUP BY span ORDER BY span DESC LIMIT 1
) AS last ON true";

/// Whether there are places of these days beyond all transactions that there have been by now.
const MOVED: &str = "
SELECT coalesce(max(arrival) >= pg_snapshot_xmax(pg_current_snapshot())::text::bigint, false)
FROM weir.audit_batches WHERE day = ANY($1)";

/// Reads by the connections that are for reading. Clones share them.
#[derive(Debug, Clone)]
pub struct Reader {
    postgres: Arc<Postgres>,
    /// The one replica that all is read from, where one reader has the pools to itself.
    kept: Option<Arc<OnceLock<usize>>>,
}

/// A query under way.
struct Search<'a> {
    client: &'a Client,
    filter: &'a Filter,
    /// The filter's client.
    address: Option<IpAddr>,
}

/// Values for a statement, with what the columns say of their types.
struct Values(Vec<(Box<dyn ToSql + Sync + Send>, Type)>);

impl Reader {
    /// Connects to nothing yet. The connections live on the runtime of the first query, and all are to one server, the primary
    /// once that fails.
    pub fn open(config: &postgres::Postgres) -> Result<Reader, OpenError> {
        Ok(Reader {
            postgres: Postgres::new(config)?,
            kept: Some(Arc::default()),
        })
    }

    /// Shares the pools with others: a query that goes on from a place reads from the primary.
    pub fn new(postgres: Arc<Postgres>) -> Reader {
        Reader {
            postgres,
            kept: None,
        }
    }

    async fn connection(&self, goes_on: bool) -> Result<Client, PostgresError> {
        match &self.kept {
            Some(kept) => self.postgres.read_kept(kept).await,
            // A replica may not have yet what stood on the page before, nor what comes behind it.
            None if goes_on => self.postgres.read_primary().await,
            None => self.postgres.read().await,
        }
    }

    /// The events that pass the filter. A row that is no longer an event is logged and left out; `verify` names it.
    pub async fn query(&self, filter: &Filter) -> Result<Vec<Stored>, StoreError> {
        self.search(filter, None).await.map(|found| found.events)
    }

    /// Likewise; once the deadline has passed, what was found by then and where to go on, or an error if it came nowhere.
    pub async fn search(
        &self,
        filter: &Filter,
        deadline: Option<Instant>,
    ) -> Result<Found, StoreError> {
        let goes_on = filter.after.or(filter.before).is_some();
        match search_by(self.connection(goes_on).await?, filter, deadline).await {
            // A place that the one replica has not come to yet may be one of the primary.
            Err(StoreError::Moved) if self.kept.is_some() => {
                search_by(self.postgres.read_primary().await?, filter, deadline).await
            }
            // While the primary waits for a standby, another may show already what it holds back.
            Err(StoreError::Moved) if goes_on => self.search_replicas(filter, deadline).await,
            found => found,
        }
    }

    /// As [`Reader::search`], by whichever replica has come to the filter's place.
    async fn search_replicas(
        &self,
        filter: &Filter,
        deadline: Option<Instant>,
    ) -> Result<Found, StoreError> {
        let mut said = StoreError::Moved;
        for replica in self.postgres.replicas_in_turn() {
            let found = match replica.connection_noted().await {
                Ok(connection) => search_by(connection, filter, deadline).await,
                Err(error) => Err(error.into()),
            };
            match found {
                Ok(found) => return Ok(found),
                Err(StoreError::Moved) => {}
                // It may have come there. Who is told that it moved does not ask again.
                Err(error) => said = error,
            }
        }
        Err(said)
    }

    /// The place of the last event that nothing can come to stand ahead of any more; from the start, where there is none.
    pub async fn end(&self) -> Result<Cursor, StoreError> {
        let newest = Filter {
            settled: true,
            limit: Some(1),
            order: Order::NewestFirst,
            ..Filter::default()
        };
        let newest = self.query(&newest).await?;
        Ok(newest.first().map_or(Cursor::default(), |it| it.cursor))
    }

    /// Checks everything that was stored, as of now, under those keys that it was written with.
    pub async fn verify(&self, keys: &Keys) -> Result<Report, StoreError> {
        let mut connection = CloseUnlessKept(Some(self.connection(false).await?));
        let report = match verify::verify(connection.get(), keys).await {
            Ok(report) => report,
            Err(error) => return Err(or_schema(connection.get(), error).await.into()),
        };
        connection.keep();
        Ok(report)
    }
}
/// As [`Reader::search`].
async fn search_by(
    connection: Client,
    filter: &Filter,
    deadline: Option<Instant>,
) -> Result<Found, StoreError> {
    let mut connection = CloseUnlessKept(Some(connection));
    let found = search(connection.get(), filter, deadline).await?;
    // Where it stopped for its deadline, a statement may still be under way.
    if found.stopped_at.is_none() {
        connection.keep();
    }
    Ok(found)
}

async fn search(
    client: &Client,
    filter: &Filter,
    deadline: Option<Instant>,
) -> Result<Found, StoreError> {
    let (settled, next, moved) = settled(client).await?;
    if moved || filter.after.is_some_and(|after| after.arrival > next) {
        return Err(StoreError::Moved);
    }
    if let Some(after) = filter.after.filter(|_| filter.settled)
        && !knows(client, after).await?
    {
        return Err(StoreError::Moved);
    }
    let mut between = Between {
        low: filter.after.unwrap_or(before(i64::MIN)),
        high: filter.before.unwrap_or(behind(i64::MAX)),
    };
    if filter.settled {
        between.high = between.high.min(before(settled));
    }
    let all = between;
    let address = filter.client.as_deref().map(str::parse::<IpAddr>);
    let Ok(address) = address.transpose() else {
        return Ok(Found::default());
    };
    let search = Search {
        client,
        filter,
        address,
    };
    let limit = filter.limit.map_or(usize::MAX, |limit| limit as usize);
    let mut size = i64::try_from(limit.min(PAGE) / 100).map_or(WINDOW, |size| size.max(WINDOW));
    let mut spans = 1;
    let mut stored = Vec::new();
    let mut looked_at = None;
    let mut is_over = false;
    while stored.len() < limit {
        let Some(stretch) = by(deadline, search.stretch(between, spans)).await else {
            is_over = true;
            break;
        };
        let Some(stretch) = stretch? else {
            break;
        };
        let began = clock::now();
        let Some(step) = by(deadline, search.step(&stretch, size, &mut stored)).await else {
            is_over = true;
            break;
        };
        let window = match step {
            Err(error) if error.has_code(QUERY_CANCELED) && size > WINDOW => {
                size = (size / 16).max(WINDOW);
                // Where the last row that was found left off, if that is in this window.
                between = between.behind(stored.last(), filter.order);
                continue;
            }
            step => step?,
        };
        let took = began.elapsed();
        if let Some(window) = &window {
            looked_at = Some((window.edge, window.days.clone()));
        }
        match (window.filter(|window| window.count >= size), stretch.next) {
            (Some(window), _) => match filter.order {
                Order::OldestFirst => between.low = behind(window.edge),
                Order::NewestFirst => between.high = before(window.edge),
            },
            (None, Some(next)) => {
                between = next;
                spans = (spans * 4).min(MOST_SPANS);
            }
            (None, None) => break,
        }
        if took < QUICK {
            size = (size * 4).min(LARGEST_WINDOW);
        } else if took > 10 * QUICK {
            size = (size / 4).max(WINDOW);
        }
    }
    let began = filter.after.or(stored.first().map(|first| first.cursor));
    let removed = match (filter.order, began) {
        // Who follows is far from what retention removes.
        (Order::OldestFirst, Some(began)) if !filter.settled && !is_over => {
            !is_there(client, began, filter.since_day()).await?
        }
        _ => false,
    };
    // Of a whole search from old to new alone: else it is behind what is left.
    let is_whole = !is_over && stored.len() < limit && filter.order == Order::OldestFirst;
    let settled_to = match looked_at {
        Some((arrival, days)) if filter.settled && is_whole => {
            last_of(client, arrival, days).await?
        }
        _ => None,
    };
    let place = match is_over {
        true => Some(all.left_off(between.behind(stored.last(), filter.order), filter.order)?),
        false => None,
    };
    Ok(Found {
        events: stored,
        stopped_at: place,
        settled_to,
        removed,
    })
}

/// `None` once the deadline has passed.
async fn by<T>(deadline: Option<Instant>, work: impl Future<Output = T>) -> Option<T> {
    match deadline {
        Some(deadline) => timeout_at(deadline.into(), work).await.ok(),
        None => Some(work.await),
    }
}

/// Up to which transaction all have ended, up to which there have been any, and whether there are places beyond those.
async fn settled(client: &Client) -> Result<(i64, i64, bool), PostgresError> {
    let row = match client.query_one(SETTLED, &[]).await {
        Ok(row) => row,
        Err(error) => return Err(or_schema(client, error.into()).await),
    };
    let (settled, next): (i64, i64) = (row.try_get(0)?, row.try_get(1)?);
    let Some(span) = row.try_get::<_, Option<i64>>(2)? else {
        return Ok((settled, next, false));
    };
    let moved = match span.cmp(&(next >> SPAN)) {
        Ordering::Less => false,
        Ordering::Greater => true,
        Ordering::Equal => {
            let days: Vec<Date> = row.try_get(3)?;
            let rows = client
                .query_typed(MOVED, &[(&days, Type::DATE_ARRAY)])
                .await?;
            rows.first().is_some_and(|row| row.get(0))
        }
    };
    Ok((settled, next, moved))
}

/// The place of the last event of a transaction; none if its day was removed just now.
async fn last_of(
    client: &Client,
    arrival: i64,
    days: Vec<Date>,
) -> Result<Option<Cursor>, PostgresError> {
    let last = "SELECT boot_id, last FROM weir.audit_batches
        WHERE day = ANY($1) AND arrival = $2 AND last >= first ORDER BY boot_id DESC, last DESC LIMIT 1";
    let values: [(&(dyn ToSql + Sync), Type); 2] =
        [(&days, Type::DATE_ARRAY), (&arrival, Type::INT8)];
    let rows = client.query_typed(last, &values).await?;
    let place = rows.first().map(|row| {
        Ok(Cursor {
            arrival,
            boot: row.try_get(0)?,
            seq: row.try_get(1)?,
            ..Cursor::default()
        })
    });
    place.transpose()
}

/// The days of a span, from one on.
async fn days_of(client: &Client, span: i64, since: Day) -> Result<Vec<Date>, PostgresError> {
    let days = "SELECT day FROM weir.audit_spans WHERE span = $1 AND day >= $2";
    let values: [(&(dyn ToSql + Sync), Type); 2] =
        [(&span, Type::INT8), (&Date(since), Type::DATE)];
    let rows = client.query_typed(days, &values).await?;
    let days = rows.iter().map(|row| row.try_get(0));
    Ok(days.collect::<Result<_, _>>()?)
}

/// Whether the batch of the event at this place is there, on a day from `since` on; not once its day was removed.
async fn is_there(client: &Client, place: Cursor, since: Day) -> Result<bool, PostgresError> {
    let days = days_of(client, place.arrival >> SPAN, since).await?;
    let batch = "SELECT FROM weir.audit_batches
        WHERE day = ANY($1) AND arrival = $2 AND boot_id = $3 AND first <= $4 AND last >= $4";
    let values: [(&(dyn ToSql + Sync), Type); 4] = [
        (&days, Type::DATE_ARRAY),
        (&place.arrival, Type::INT8),
        (&place.boot, Type::INT4),
        (&place.seq, Type::INT8),
    ];
    let found = client.query_typed(batch, &values).await?;
    Ok(!found.is_empty())
}

/// Whether a place that one went on from can be one of this server. A standby that is promoted lacks what had not come to it, and gives those
/// numbers of transactions to others, which one who goes on would never see. Where retention has removed the event it says so of its boot, or
/// there is nothing up to the place.
async fn knows(client: &Client, place: Cursor) -> Result<bool, PostgresError> {
    let is_no_event = [i32::MIN, i32::MAX].contains(&place.boot);
    if is_no_event || is_there(client, place, Day::default()).await? {
        return Ok(true);
    }
    let removed = "SELECT FROM weir.audit_boots WHERE id = $1 AND removed_to >= $2";
    let values: [(&(dyn ToSql + Sync), Type); 2] =
        [(&place.boot, Type::INT4), (&place.seq, Type::INT8)];
    let removed = client.query_typed(removed, &values).await?;
    if !removed.is_empty() {
        return Ok(true);
    }
    let span = place.arrival >> SPAN;
    let earlier = "SELECT FROM weir.audit_spans WHERE span < $1 LIMIT 1";
    let earlier = client.query_typed(earlier, &[(&span, Type::INT8)]).await?;
    if !earlier.is_empty() {
        return Ok(false);
    }
    let days = days_of(client, span, Day::default()).await?;
    let ahead = "SELECT FROM weir.audit_batches WHERE day = ANY($1) AND arrival <= $2 AND last >= first LIMIT 1";
    let values: [(&(dyn ToSql + Sync), Type); 2] =
        [(&days, Type::DATE_ARRAY), (&place.arrival, Type::INT8)];
    let ahead = client.query_typed(ahead, &values).await?;
    Ok(ahead.is_empty())
}

/// Why a query failed: where the tables are missing, the schema is.
async fn or_schema(client: &Client, error: PostgresError) -> PostgresError {
    match NO_TABLE.iter().any(|code| error.has_code(code)) {
        true => check_version(client).await.err().unwrap_or(error),
        false => error,
    }
}

fn event(row: &Row) -> Option<AuditEvent> {
    let mut encoding = Vec::new();
    Fields::of(row, 4).ok()?.encoding_into(&mut encoding).ok()?;
    AuditEvent::decode(&encoding).ok()
}

impl Search<'_> {
    /// The next `count` spans, or as many as there are; `None` if there are none.
    async fn stretch(
        &self,
        between: Between,
        count: i64,
    ) -> Result<Option<Stretch>, PostgresError> {
        let mut values = Values(Vec::new());
        let first = values.put(between.low.arrival >> SPAN, Type::INT8);
        let last = values.put(between.high.arrival >> SPAN, Type::INT8);
        let since = values.put(Date(self.filter.since_day()), Type::DATE);
        let most = values.put(count, Type::INT8);
        let order = match self.filter.order {
            Order::OldestFirst => "ASC",
            Order::NewestFirst => "DESC",
        };
        let sql = format!(
            "SELECT span, array_agg(day) FROM weir.audit_spans
             WHERE span >= {first} AND span <= {last} AND day >= {since}
             GROUP BY span ORDER BY span {order} LIMIT {most}"
        );
        let rows = self.client.query_typed(&sql, &values.given()).await?;
        let Some(edge) = rows.last() else {
            return Ok(None);
        };
        let edge: i64 = edge.try_get(0)?;
        let mut days = BTreeSet::new();
        for row in &rows {
            let of_span: Vec<Date> = row.try_get(1)?;
            days.extend(of_span.into_iter().map(|Date(day)| day));
        }
        let is_last = (rows.len() as i64) < count;
        Ok(Some(Stretch {
            days: days.into_iter().map(Date).collect(),
            ..between.up_to(edge, self.filter.order, is_last)
        }))
    }

    /// Adds to `stored` what passes of the stretch's next window, and says which that was; `None` if there is none.
    async fn step(
        &self,
        stretch: &Stretch,
        size: i64,
        stored: &mut Vec<Stored>,
    ) -> Result<Option<Window>, PostgresError> {
        let Some(window) = self.window(stretch, size).await? else {
            return Ok(None);
        };
        let places = window.of(stretch.between, self.filter.order);
        self.read(places, &window.days, stored).await?;
        Ok(Some(window))
    }

    /// The next `size` batches and those of the same transaction as the last; `None` if there are none.
    async fn window(&self, stretch: &Stretch, size: i64) -> Result<Option<Window>, PostgresError> {
        let (edge, order) = match self.filter.order {
            Order::OldestFirst => ("max", "ASC"),
            Order::NewestFirst => ("min", "DESC"),
        };
        let mut values = Values(Vec::new());
        let places = values.between(stretch.between, "last", "first");
        let days = values.put(stretch.days.clone(), Type::DATE_ARRAY);
        let size = values.put(size, Type::INT8);
        let sql = format!(
            "SELECT count(*), {edge}(arrival), array_agg(DISTINCT day) FROM (
                 SELECT arrival, day FROM weir.audit_batches
                 WHERE {places}
                     AND day = ANY({days}) AND last >= first
                 ORDER BY arrival {order} FETCH FIRST ({size}) ROWS WITH TIES
             ) AS batches"
        );
        let rows = self.client.query_typed(&sql, &values.given()).await?;
        let Some(row) = rows.first() else {
            return Ok(None);
        };
        match row.try_get(0)? {
            0 => Ok(None),
            count => Ok(Some(Window {
                count,
                edge: row.try_get(1)?,
                days: row.try_get(2)?,
            })),
        }
    }

    /// Adds to `stored` the events between these places that pass.
    async fn read(
        &self,
        mut between: Between,
        days: &[Date],
        stored: &mut Vec<Stored>,
    ) -> Result<(), PostgresError> {
        let filter = self.filter;
        let limit = filter.limit.map_or(usize::MAX, |limit| limit as usize);
        let order = match filter.order {
            Order::OldestFirst => "arrival, boot_id, seq",
            Order::NewestFirst => "arrival DESC, boot_id DESC, seq DESC",
        };
        while stored.len() < limit {
            let page = (limit - stored.len()).min(PAGE);
            let mut values = Values(Vec::new());
            let places = values.between(between, "seq", "seq");
            let days = values.put(days.to_vec(), Type::DATE_ARRAY);
            let conditions = self.conditions(&mut values);
            let most = values.put(i64::try_from(page).unwrap_or(i64::MAX), Type::INT8);
            let sql = format!(
                "SELECT arrival, boot_id, instance, boot, {COLUMNS} FROM (
                     SELECT * FROM weir.audit_events
                     WHERE day = ANY({days}) AND {places}{conditions}
                     ORDER BY {order} LIMIT {most}
                 ) AS events LEFT JOIN weir.audit_boots ON id = boot_id ORDER BY {order}"
            );
            let rows = self.client.query_typed(&sql, &values.given()).await?;
            for row in &rows {
                let cursor = Cursor {
                    arrival: row.try_get(0)?,
                    boot: row.try_get(1)?,
                    seq: row.try_get(4)?,
                    ..Cursor::default()
                };
                between = between.beyond(cursor, filter.order);
                match event(row) {
                    // Text that no column can hold exactly may have passed as another.
                    Some(event) if !filter.admits(&event) => {}
                    Some(event) => stored.push(Stored {
                        cursor,
                        instance: row
                            .try_get::<_, Option<String>>(2)?
                            .unwrap_or_else(|| "?".to_owned()),
                        boot: row
                            .try_get::<_, Option<Uuid>>(3)?
                            .unwrap_or_default()
                            .into_bytes(),
                        event,
                    }),
                    None => tracing::warn!(
                        boot = cursor.boot,
                        seq = cursor.seq,
                        "not an event: run `weir audit verify`"
                    ),
                }
            }
            if rows.len() < page {
                break;
            }
        }
        Ok(())
    }

    /// What the filter asks of columns, to stand behind other conditions.
    fn conditions(&self, values: &mut Values) -> String {
        let filter = self.filter;
        let mut said = String::new();
        let mut ask = |condition: &str, value: String| {
            said.push_str(&format!(" AND {condition} {value}"));
        };
        if let Some(since) = filter.since {
            ask("time >=", values.put(Time(since), Type::TIMESTAMPTZ));
        }
        if let Some(until) = filter.until {
            ask("time <", values.put(Time(until), Type::TIMESTAMPTZ));
        }
        if let Some(address) = self.address {
            ask("client =", values.put(address, Type::INET));
        }
        if let Some(status) = &filter.status {
            let number = |status: &u16| i16::try_from(*status).unwrap_or(i16::MAX);
            ask("status >=", values.put(number(status.start()), Type::INT2));
            ask("status <=", values.put(number(status.end()), Type::INT2));
        }
        if let Some(user) = &filter.user {
            let user = row::held_user(user).into_owned();
            ask("username =", values.put(user, Type::TEXT));
        }
        let texts = [
            ("route =", &filter.route),
            ("label =", &filter.label),
            ("method =", &filter.method),
            ("path ^@", &filter.path_prefix),
        ];
        for (condition, text) in texts {
            if let Some(text) = text {
                let text = row::held_text(text).into_owned();
                ask(condition, values.put(text, Type::TEXT));
            }
        }
        said
    }
}

impl Values {
    /// How the statement names it.
    fn put(&mut self, value: impl ToSql + Sync + Send + 'static, kind: Type) -> String {
        self.0.push((Box::new(value), kind));
        format!("${}", self.0.len())
    }

    /// The condition that a row is between the places; its numbers are from `first` to `last`.
    fn between(&mut self, between: Between, last: &str, first: &str) -> String {
        let mut place = |place: Cursor| {
            let arrival = self.put(place.arrival, Type::INT8);
            let boot = self.put(place.boot, Type::INT4);
            let seq = self.put(place.seq, Type::INT8);
            (arrival, boot, seq)
        };
        let (low, high) = (place(between.low), place(between.high));
        let row =
            |(arrival, boot, seq): &(String, String, String)| format!("({arrival}, {boot}, {seq})");
        // Comparing rows says it all, but is of no use to a BRIN index.
        format!(
            "arrival >= {} AND arrival <= {} AND (arrival, boot_id, {last}) > {} AND (arrival, boot_id, {first}) < {}",
            low.0,
            high.0,
            row(&low),
            row(&high)
        )
    }

    fn given(&self) -> Vec<(&(dyn ToSql + Sync), Type)> {
        let given = self.0.iter();
        given
            .map(|(value, kind)| (&**value as &(dyn ToSql + Sync), kind.clone()))
            .collect()
    }
}

impl From<PostgresError> for StoreError {
    fn from(error: PostgresError) -> StoreError {
        StoreError::Other(Box::new(error))
    }
}
