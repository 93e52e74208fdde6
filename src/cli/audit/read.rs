//! `weir audit query`, `tail` and `export`.

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::bail;

use super::FilterFlags;
use super::format::{Format, print};
use crate::cli::tell;
use crate::store::audit::events::{Events, may_pass};
use crate::store::audit::{Filter, Found, Order, StoreError, Stored};

/// Rows read at a time, so that an export of any size needs little memory.
const PAGE: u32 = 5_000;
/// How often `tail` looks for what arrived.
const POLL: Duration = Duration::from_millis(250);
/// How long it waits once a server did not answer.
const RETRY: Duration = Duration::from_secs(1);
/// How often an export asks for a page, at most.
const TRIES: u32 = 10;

pub(super) async fn query(
    store: &Events,
    flags: &FilterFlags,
    limit: u32,
    format: Format,
    out: &mut dyn Write,
) -> anyhow::Result<ExitCode> {
    let shown = newest(store, flags, limit).await?;
    print(&shown, format, true, out)?;
    if shown.is_empty() && limit > 0 {
        tell("no events match");
    }
    Ok(ExitCode::SUCCESS)
}

pub(super) async fn tail(
    store: &Events,
    flags: &FilterFlags,
    lines: u32,
    format: Format,
    out: &mut dyn Write,
) -> anyhow::Result<ExitCode> {
    // What arrives is looked for behind the newest event of all, not only behind the newest that passes.
    let end = store.end().await?;
    let mut shown = newest(store, flags, lines).await?;
    shown.retain(|event| event.cursor <= end);
    print(&shown, format, true, out)?;
    out.flush()?;
    let mut filter = Filter {
        after: Some(end),
        settled: true,
        limit: Some(PAGE),
        ..flags.filter()
    };
    let mut is_failing = false;
    loop {
        let (events, next) = match store.follow(&filter, None).await {
            Ok(found) => found,
            Err(error) if may_pass(&error) => {
                if !is_failing {
                    tracing::warn!(%error, "the audit cannot be read now; asking again until it can");
                }
                is_failing = true;
                // Nothing of the answer was shown, so that what is asked again is shown once.
                tokio::time::sleep(RETRY).await;
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        is_failing = false;
        filter.after = Some(next);
        if events.is_empty() {
            tokio::time::sleep(POLL).await;
            continue;
        }
        print(&events, format, false, out)?;
        out.flush()?;
    }
}

pub(super) async fn export(
    store: &Events,
    flags: &FilterFlags,
    format: Format,
    out: &mut dyn Write,
) -> anyhow::Result<ExitCode> {
    let mut out = io::BufWriter::new(out);
    // What arrives meanwhile may do so faster than it is read.
    let newest = Filter {
        limit: Some(1),
        order: Order::NewestFirst,
        ..Filter::default()
    };
    // Where the newest day cannot be read, what comes before it can.
    let newest = store.query(&newest).await.ok();
    let end = newest.map(|newest| newest.first().map(|newest| newest.cursor));
    let mut filter = Filter {
        limit: Some(PAGE),
        ..flags.filter()
    };
    let (mut removed, mut day) = (None, None);
    loop {
        let found = page(store, &filter).await?;
        let mut events = found.events;
        day = day.or(events.first().map(Stored::day));
        if found.removed {
            removed = removed.or(day);
        }
        let last = events.last().map(|last| last.cursor);
        day = events.last().map(Stored::day).or(day);
        events.retain(|event| end.is_none_or(|end| Some(event.cursor) <= end));
        print(&events, format, filter.after.is_none(), &mut out)?;
        if last.is_none() || end.is_some_and(|end| last >= end) {
            break;
        }
        filter.after = last;
    }
    out.flush()?;
    if let Some(day) = removed {
        bail!(
            "day {day} was removed while it was read, or a server answers that lacks what was read of it: what may have been left of it is not in the output"
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// A page of an export. One behind others is asked for again, if need be: a standby ends what stands in the way of what its primary has
/// done, and servers begin anew.
async fn page(store: &Events, filter: &Filter) -> Result<Found, StoreError> {
    let mut tries = 1;
    loop {
        match store.search(filter, None).await {
            Err(error) if filter.after.is_some() && may_pass(&error) && tries < TRIES => {
                tracing::warn!(%error, "the audit cannot be read now; asking again");
                tries += 1;
                tokio::time::sleep(RETRY).await;
            }
            found => return found,
        }
    }
}

/// The newest events, the oldest of them first.
async fn newest(store: &Events, flags: &FilterFlags, limit: u32) -> anyhow::Result<Vec<Stored>> {
    let filter = Filter {
        limit: Some(limit),
        order: Order::NewestFirst,
        ..flags.filter()
    };
    let mut events = store.query(&filter).await?;
    events.reverse();
    Ok(events)
}
