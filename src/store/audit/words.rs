//! How times, statuses and places are written where events are asked for.

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::Duration;

use jiff::Timestamp;

use super::Cursor;
use crate::clock;
use crate::config::units::TimeLength;
use crate::event::Micros;
use crate::store::audit::days::Day;

/// A point in time, since the Unix epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct When(pub Micros);

/// A range, of which both ends count.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Statuses(pub RangeInclusive<u16>);

impl When {
    fn parse(text: &str, now: Duration) -> Result<When, String> {
        if let Ok(ago) = text.parse::<TimeLength>() {
            return Ok(When(now.saturating_sub(ago.0).into()));
        }
        let time = text.parse::<Timestamp>().ok();
        time.and_then(|time| u64::try_from(time.as_microsecond()).ok())
            .map(|micros| When(Micros(micros)))
            .ok_or_else(|| {
                format!("\"{text}\" is not a time: use 2026-01-31T08:00:00Z, or how long ago, such as 1h")
            })
    }
}

impl FromStr for When {
    type Err = String;

    fn from_str(text: &str) -> Result<When, String> {
        When::parse(text, clock::wall())
    }
}

impl FromStr for Statuses {
    type Err = String;

    fn from_str(text: &str) -> Result<Statuses, String> {
        let one = |text: &str| match text.parse() {
            Ok(status @ 100..=999) if text.len() == 3 => Some(status),
            _ => None,
        };
        let range = if let Some(class) = text.strip_suffix("xx") {
            one(&format!("{class}00")).map(|first| first..=first + 99)
        } else if let Some((first, last)) = text.split_once('-') {
            one(first).zip(one(last)).map(|(first, last)| first..=last)
        } else {
            one(text).map(|status| status..=status)
        };
        range
            .filter(|range| !range.is_empty())
            .map(Statuses)
            .ok_or_else(|| format!("\"{text}\" is not a status: use 404, 4xx or 400-403"))
    }
}

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Cursor {
            day,
            arrival,
            boot,
            seq,
        } = self;
        write!(f, "{}.{arrival}.{boot}.{seq}", day.0)
    }
}

impl FromStr for Cursor {
    type Err = String;

    fn from_str(text: &str) -> Result<Cursor, String> {
        let mut numbers = text.split('.').map(str::parse::<i64>);
        let mut next = || numbers.next()?.ok();
        let cursor = (|| {
            Some(Cursor {
                day: Day(next()?.try_into().ok()?),
                arrival: next()?,
                boot: next()?.try_into().ok()?,
                seq: next()?,
            })
        })();
        cursor
            .filter(|_| numbers.next().is_none())
            .ok_or_else(|| format!("\"{text}\" is not a place: use the \"next\" of an answer"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_are_one_a_class_or_a_range() {
        let check = |text: &str, expected: Option<RangeInclusive<u16>>| {
            assert_eq!(text.parse().ok(), expected.map(Statuses), "{text}");
        };
        check("404", Some(404..=404));
        check("4xx", Some(400..=499));
        check("400-403", Some(400..=403));
        for bad in [
            "", "4", "xx", "44xx", "4xxx", "403-400", "-", "99", "+44", "1000", "abc",
        ] {
            check(bad, None);
        }
    }

    #[test]
    fn times_are_absolute_or_ago() {
        let now = Duration::from_secs(10_000);
        let check = |text: &str, secs: Option<u64>| {
            let expected = secs.map(|secs| When(Micros(secs * 1_000_000)));
            assert_eq!(When::parse(text, now).ok(), expected, "{text}");
        };
        check("1h", Some(6_400));
        check("400d", Some(0));
        check("1970-01-01T00:01:00Z", Some(60));
        check("1970-01-01T01:01:00+01:00", Some(60));
        for bad in ["", "yesterday", "1960-01-01T00:00:00Z", "1970-01-01"] {
            check(bad, None);
        }
    }

    #[test]
    fn places_are_read_as_they_are_written() {
        for cursor in [
            Cursor::default(),
            Cursor {
                day: Day(20_782),
                arrival: 7,
                ..Cursor::default()
            },
            Cursor {
                day: Day(0),
                arrival: -3,
                boot: i32::MAX,
                seq: i64::MAX,
            },
        ] {
            assert_eq!(cursor.to_string().parse(), Ok(cursor));
        }
        for bad in [
            "",
            "1",
            "1.2.3",
            "1.2.3.4.5",
            "-1.2.3.4",
            "1.2.x.4",
            "1.2.3.4.",
        ] {
            assert!(bad.parse::<Cursor>().is_err(), "{bad}");
        }
    }
}
