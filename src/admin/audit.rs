//! `/v1/audit`: the events that are kept, a page at a time.

use std::fmt::Display;
use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use hyper::{Method, StatusCode};
use serde::Serialize;
use tokio::time::timeout;

use super::{Answer, Problem, Reply, pairs};
use crate::clock;
use crate::config::units::TimeLength;
use crate::event::Micros;
use crate::plan::Plan;
use crate::store::audit::events::Events;
use crate::store::audit::record::Record;
use crate::store::audit::words::{Statuses, When};
use crate::store::audit::{Cursor, Filter, Order, StoreError, Stored};
use crate::store::postgres::{Postgres, Reader};

/// Events on one page, unless told.
const PAGE: u32 = 100;
const LARGEST_PAGE: u32 = 1_000;
/// For a search, unless told, and at most: what is rare may be found only once all days are read.
const SEARCH: Duration = Duration::from_secs(25);
/// For all of an answer, with what is waited for before the search begins.
const WITHIN: Duration = Duration::from_secs(30);

const KNOWN: &str = "since, until, user, route, client, status, label, method, path, limit, order, after and timeout";

/// What a request asks for.
#[derive(Debug, PartialEq, Eq)]
struct Asked {
    filter: Filter,
    /// How long is searched.
    within: Duration,
}

#[derive(Serialize)]
struct Page<'a> {
    events: Vec<Record<'a>>,
    next: Option<String>,
}

/// `GET /v1/audit`, with the filters of `weir audit query` as parameters, and `order=newest|oldest`, `limit=N`, `after=NEXT`: the
/// page behind the one that said so, and `timeout=DURATION`: a page then has what was found by then.
pub(super) async fn answer(
    plan: &Plan,
    postgres: Option<&Arc<Postgres>>,
    method: &Method,
    path: &[&str],
    query: &str,
) -> Answer {
    match (method, path) {
        (&Method::GET, []) => {}
        (_, []) => return Err(Problem::method("GET, HEAD")),
        _ => return Err(Problem::not_found("known here: /v1/audit")),
    }
    let asked = asked(query)?;
    let searched = timeout(WITHIN, search(plan, postgres, &asked)).await;
    let (stored, next) = searched.unwrap_or_else(|_| {
        let detail = format!("the store did not answer within {WITHIN:?}: try again");
        Err(Problem::new(StatusCode::SERVICE_UNAVAILABLE, detail))
    })?;
    let page = Page {
        events: stored.iter().map(Record::new).collect(),
        next: next.map(|next| next.to_string()),
    };
    let page = serde_json::to_string(&page);
    Ok(Reply::Written(page.map_err(|error| unanswered(&error))?))
}

/// The events, and where to go on.
async fn search(
    plan: &Plan,
    postgres: Option<&Arc<Postgres>>,
    Asked { filter, within }: &Asked,
) -> Result<(Vec<Stored>, Option<Cursor>), Problem> {
    let events = match (postgres, &plan.config.audit) {
        (Some(postgres), _) => Ok(Events::Postgres(Reader::new(postgres.clone()))),
        (None, Some(audit)) => Events::sqlite(&audit.sqlite).await,
        (None, None) => {
            let detail = "the configuration has no audit; add `audit: {}`";
            return Err(Problem::not_found(detail));
        }
    };
    let events = match events {
        Ok(events) => events,
        // Nothing has been written yet.
        Err(StoreError::Absent) => return Ok((Vec::new(), filter.after)),
        Err(error) => return Err(unanswered(&error)),
    };
    let deadline = Some(clock::now() + *within);
    let found = match filter.order {
        // What arrives later comes behind it.
        Order::OldestFirst => {
            let followed = events.follow(filter, deadline).await;
            followed.map(|(found, next)| (found, Some(next)))
        }
        Order::NewestFirst => events.search(filter, deadline).await.map(|found| {
            let is_full = filter.limit == u32::try_from(found.events.len()).ok();
            let last = found.events.last().map(|last| last.cursor);
            (found.events, last.filter(|_| is_full).or(found.stopped_at))
        }),
    };
    found.map_err(|error| match error {
        StoreError::Elsewhere => Problem::bad(format!("after: {error}")),
        error => unanswered(&error),
    })
}

fn unanswered(error: &dyn Display) -> Problem {
    Problem::new(StatusCode::SERVICE_UNAVAILABLE, error.to_string())
}

/// What the parameters ask for.
fn asked(query: &str) -> Result<Asked, Problem> {
    let mut within = SEARCH;
    let mut filter = Filter {
        limit: Some(PAGE),
        order: Order::NewestFirst,
        ..Filter::default()
    };
    let mut after = None;
    for (name, value) in pairs(query)? {
        match name.as_str() {
            "since" => filter.since = Some(time(&name, &value)?),
            "until" => filter.until = Some(time(&name, &value)?),
            "user" => filter.user = Some(value),
            "route" => filter.route = Some(value),
            "client" => {
                let address: IpAddr = value.parse().map_err(|_| {
                    Problem::bad(format!(
                        "client: \"{value}\" is not an IP address: use 10.0.0.7"
                    ))
                })?;
                filter.client = Some(address.to_string());
            }
            "status" => filter.status = Some(read::<Statuses>(&name, &value)?.0),
            "label" => filter.label = Some(value),
            "method" => filter.method = Some(value),
            "path" => filter.path_prefix = Some(value),
            "limit" => {
                let limit = value.parse().ok();
                let limit = limit.filter(|limit| (1..=LARGEST_PAGE).contains(limit));
                filter.limit = Some(limit.ok_or_else(|| {
                    Problem::bad(format!(
                        "limit: \"{value}\" is not a number from 1 to {}",
                        LARGEST_PAGE
                    ))
                })?);
            }
            "order" => {
                filter.order = match value.as_str() {
                    "newest" => Order::NewestFirst,
                    "oldest" => Order::OldestFirst,
                    _ => {
                        let detail =
                            format!("order: \"{value}\" is no order: use newest or oldest");
                        return Err(Problem::bad(detail));
                    }
                };
            }
            "after" => after = Some(read::<Cursor>(&name, &value)?),
            "timeout" => {
                let TimeLength(length) = read(&name, &value)?;
                if length.is_zero() || length > SEARCH {
                    let detail =
                        format!("timeout: {value} is not from 1ms to {}", TimeLength(SEARCH));
                    return Err(Problem::bad(detail));
                }
                within = length;
            }
            _ => {
                let detail = format!("{name}: unknown parameter; known are {KNOWN}");
                return Err(Problem::bad(detail));
            }
        }
    }
    match filter.order {
        Order::OldestFirst => {
            filter.after = after;
            // Whoever has read the last page may ask on from it for ever.
            filter.settled = true;
        }
        Order::NewestFirst => filter.before = after,
    }
    Ok(Asked { filter, within })
}

/// A time, of which the `+` of an offset may have come as a space: few escape it.
fn time(name: &str, value: &str) -> Result<Micros, Problem> {
    let spaced = value
        .split_once('T')
        .and_then(|(_, it)| it.rsplit_once(' '));
    let When(time) = match spaced {
        Some((_, offset)) => {
            let (time, _) = value.split_at(value.len() - offset.len() - 1);
            read(name, &format!("{time}+{offset}"))?
        }
        None => read(name, value)?,
    };
    Ok(time)
}

fn read<T: FromStr<Err = String>>(name: &str, value: &str) -> Result<T, Problem> {
    value
        .parse()
        .map_err(|error| Problem::bad(format!("{name}: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_those_of_the_command() {
        let asked = asked(
            "since=1970-01-01T00:01:00Z&user=a%20b&client=::0A&status=4xx&path=/a&limit=7&order=oldest&after=0.5.1.9&timeout=2s",
        )
        .unwrap();
        let place = Cursor {
            arrival: 5,
            boot: 1,
            seq: 9,
            ..Cursor::default()
        };
        let filter = Filter {
            since: Some(Micros(60_000_000)),
            user: Some("a b".to_owned()),
            client: Some("::a".to_owned()),
            status: Some(400..=499),
            path_prefix: Some("/a".to_owned()),
            after: Some(place),
            settled: true,
            limit: Some(7),
            ..Filter::default()
        };
        let within = Duration::from_secs(2);
        assert_eq!(asked, Asked { filter, within });
    }

    #[test]
    fn the_plus_of_an_offset_need_not_be_escaped() {
        let since = |text: &str| asked(&format!("since={text}")).unwrap().filter.since;
        let expected = since("1970-01-02T00:00:00Z");
        for text in [
            "1970-01-02T01:00:00+01:00",
            "1970-01-02T01:00:00%2B01:00",
            "1970-01-01T23:00:00-01:00",
        ] {
            assert_eq!(since(text), expected, "{text}");
        }
        let problem = asked("until=1970-01-02T01:00:00+x").unwrap_err();
        assert!(
            problem
                .detail
                .starts_with("until: \"1970-01-02T01:00:00+x\" is not a time")
        );
    }

    #[test]
    fn without_parameters_the_newest_are_shown() {
        let asked = |query| super::asked(query).unwrap();
        assert_eq!(asked("").within, SEARCH);
        let newest = asked("").filter;
        assert_eq!(
            (newest.limit, newest.order),
            (Some(100), Order::NewestFirst)
        );
        let behind = asked("after=1.2.0.0").filter;
        assert_eq!((behind.after, behind.before.is_some()), (None, true));
    }

    #[test]
    fn a_bad_parameter_is_named_with_the_mend() {
        let check = |query: &str, expected: &str| {
            let problem = asked(query).unwrap_err();
            assert_eq!(problem.status, StatusCode::BAD_REQUEST);
            assert!(problem.detail.starts_with(expected), "{}", problem.detail);
        };
        check(
            "since=yesterday",
            "since: \"yesterday\" is not a time: use 2026-",
        );
        check("status=4x", "status: \"4x\" is not a status: use 404");
        check("client=a", "client: \"a\" is not an IP address: use");
        check(
            "limit=1001",
            "limit: \"1001\" is not a number from 1 to 1000",
        );
        check("limit=0", "limit: \"0\" is not");
        check(
            "order=new",
            "order: \"new\" is no order: use newest or oldest",
        );
        check("after=x", "after: \"x\" is not a place: use the \"next\"");
        check("timeout=26s", "timeout: 26s is not from 1ms to 25s");
        check("timeout=0s", "timeout: 0s is not");
        check("timeout=soon", "timeout: \"soon\"");
        check("usr=ann", "usr: unknown parameter; known are since, ");
        check("user=a&user=b", "user: given twice");
        check("=", ": unknown parameter");
    }
}
