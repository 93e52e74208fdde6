//! The audit's events wherever they are kept: one face of SQLite's files and of Postgres.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use super::chain::Keys;
use super::days::Day;
use super::{Cursor, Filter, Found, Order, Report, StoreError, Stored};
use crate::blocking;
use crate::clock;
use crate::store::postgres::{self, PostgresError};
use crate::store::sqlite;

/// A store, open to read. Clones share it.
#[derive(Clone)]
pub enum Events {
    Sqlite(Arc<sqlite::Reader>),
    Postgres(postgres::Reader),
}

impl Events {
    /// As [`sqlite::Reader::open`].
    pub async fn sqlite(path: &Path) -> Result<Events, StoreError> {
        let path = path.to_owned();
        let reader = blocking(move || sqlite::Reader::open(&path)).await?;
        Ok(Events::Sqlite(Arc::new(reader)))
    }

    /// The events that pass the filter. What is kept but is no event is logged and left out; `verify` names it.
    pub async fn query(&self, filter: &Filter) -> Result<Vec<Stored>, StoreError> {
        self.search(filter, None).await.map(|found| found.events)
    }

    /// Likewise; once the deadline has passed, what was found by then and where to go on, or an error if it came nowhere. Who waits no longer
    /// leaves nothing running.
    pub async fn search(
        &self,
        filter: &Filter,
        deadline: Option<Instant>,
    ) -> Result<Found, StoreError> {
        let places = [filter.after, filter.before];
        if places.into_iter().flatten().any(|place| !self.has(place)) {
            return Err(StoreError::Elsewhere);
        }
        match self {
            Events::Sqlite(reader) => {
                let (reader, filter) = (reader.clone(), filter.clone());
                let asked = Arc::new(());
                let asks = Arc::downgrade(&asked);
                let goes_on = move || {
                    asks.strong_count() > 0
                        && deadline.is_none_or(|deadline| clock::now() < deadline)
                };
                let found = blocking(move || reader.search(&filter, goes_on)).await;
                // It is gone before, where this is dropped instead of awaited.
                drop(asked);
                found
            }
            Events::Postgres(reader) => reader.search(filter, deadline).await,
        }
    }

    /// The events that pass a filter that is [`Filter::settled`] and goes from the oldest on, and the place to go on from: behind all that was looked
    /// at, so that what does not pass is not looked at again. `deadline` is as that of [`Events::search`].
    pub async fn follow(
        &self,
        filter: &Filter,
        deadline: Option<Instant>,
    ) -> Result<(Vec<Stored>, Cursor), StoreError> {
        // A search of Postgres tells it itself: another server's end may be behind what this one shows, be it the primary, which shows nothing
        // that it commits before the standby has it that it waits for.
        let asked = match self {
            Events::Sqlite(_) => Some(self.end().await?),
            Events::Postgres(_) => None,
        };
        let Found {
            events: found,
            stopped_at,
            settled_to,
            removed: _,
        } = self.search(filter, deadline).await?;
        let end = asked.or(settled_to).unwrap_or_default();
        let is_full = filter
            .limit
            .is_some_and(|limit| found.len() >= limit as usize);
        let last = found.last().map(|last| last.cursor).max(filter.after);
        let next = match (stopped_at, last, is_full) {
            (Some(place), ..) => place,
            (None, Some(last), true) => last,
            (None, last, _) => last.map_or(end, |last| last.max(end)),
        };
        Ok((found, next))
    }

    /// Whether a place can be one of this store.
    fn has(&self, place: Cursor) -> bool {
        match self {
            Events::Sqlite(_) => (place.boot, place.seq) == (0, 0),
            Events::Postgres(_) => place.day == Day::default(),
        }
    }

    /// The place behind all that has arrived, to follow from by [`Filter::settled`].
    pub async fn end(&self) -> Result<Cursor, StoreError> {
        match self {
            Events::Sqlite(_) => {
                let newest = Filter {
                    limit: Some(1),
                    order: Order::NewestFirst,
                    ..Filter::default()
                };
                let newest = self.query(&newest).await?;
                Ok(newest
                    .first()
                    .map_or(Cursor::default(), |newest| newest.cursor))
            }
            Events::Postgres(reader) => reader.end().await,
        }
    }

    /// Checks everything that was written, as of now, under those keys that it was written with.
    pub async fn verify(&self, keys: &Keys) -> Result<Report, StoreError> {
        match self {
            Events::Sqlite(reader) => {
                let (reader, keys) = (reader.clone(), keys.clone());
                blocking(move || reader.verify(&keys)).await
            }
            Events::Postgres(reader) => reader.verify(keys).await,
        }
    }
}

/// Whether the same may be answered when it is asked again: the server, the way to it or a lock is at fault.
pub fn may_pass(error: &StoreError) -> bool {
    match error {
        StoreError::Locked | StoreError::OutOfTime => true,
        StoreError::Other(error) => error
            .downcast_ref::<PostgresError>()
            .map(|error| error.is_of_the_server() || error.is_slow())
            // No thread for it.
            .or(error
                .downcast_ref()
                .map(|error: &io::Error| error.kind() == io::ErrorKind::WouldBlock))
            .unwrap_or(false),
        StoreError::OfDay(_, error) => may_pass(error),
        StoreError::Full
        | StoreError::Version { .. }
        | StoreError::Undated
        | StoreError::Absent
        | StoreError::Key
        | StoreError::Changed
        | StoreError::Moved
        | StoreError::Elsewhere
        | StoreError::Damaged(_)
        | StoreError::Folder(_) => false,
    }
}

/// SQLite's calls block, and the thread has others to serve.
async fn blocking<T: Send + 'static>(
    call: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    let done = blocking::done(call).await;
    done.unwrap_or_else(|error| Err(StoreError::Other(Box::new(error))))
}
