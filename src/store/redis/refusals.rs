//! The calls that the servers of one client have refused: what is told of them as of now, and which of them the log is told. By `now`
//! as it is given; must not ask a clock, nor write the line.

use std::time::Duration;

use crate::telemetry::log::LogRateLimit;

/// How long a refused call counts: while a server refuses, shared breakers meet with it each second.
const COUNTS_FOR: Duration = Duration::from_secs(10);
/// Without one for the same reason for so long, the next begins another row.
const ANEW: Duration = Duration::from_secs(60);
/// Lines within ten seconds: servers know few reasons.
const AT_MOST: u32 = 5;

#[derive(Debug)]
pub(super) struct Refusals {
    /// One a reason; that of the newest call last.
    rows: Vec<Row>,
    lines: LogRateLimit,
}

/// Refused calls of one reason, none long after the one before.
#[derive(Debug)]
struct Row {
    /// The reason, such as `OOM`.
    code: String,
    /// What was said last.
    said: String,
    at: Duration,
    /// Whether the log knows of it.
    told: bool,
}

impl Refusals {
    /// What a server has said that refuses calls, within the last ten seconds.
    pub(super) fn lately(&self, now: Duration) -> Option<&str> {
        let last = self.rows.last()?;
        (now < last.at + COUNTS_FOR).then_some(&last.said)
    }

    /// Notes it; whether the log is to be told, which it is of one call in a row.
    pub(super) fn note(&mut self, code: &str, said: String, now: Duration) -> bool {
        self.rows.retain(|row| now < row.at + ANEW);
        let before = self.rows.iter().position(|row| row.code == code);
        let mut row = match before {
            Some(before) => self.rows.swap_remove(before),
            None => Row {
                code: code.to_owned(),
                said: String::new(),
                at: now,
                told: false,
            },
        };
        let is_told = !row.told && self.lines.next(now).is_some();
        (row.said, row.at, row.told) = (said, now, row.told || is_told);
        self.rows.push(row);
        is_told
    }
}

impl Default for Refusals {
    fn default() -> Refusals {
        Refusals {
            rows: Vec::new(),
            lines: LogRateLimit::new(AT_MOST),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(refusals: &mut Refusals, code: &str, at: u64) -> bool {
        refusals.note(code, format!("{code}: at {at}"), Duration::from_secs(at))
    }

    #[test]
    fn a_refused_call_counts_for_ten_seconds() {
        let mut refusals = Refusals::default();
        let lately = |refusals: &Refusals, at| {
            let said = refusals.lately(Duration::from_millis(at));
            said.map(str::to_owned)
        };
        assert_eq!(lately(&refusals, 100_000), None);
        note(&mut refusals, "OOM", 100);
        note(&mut refusals, "READONLY", 101);
        note(&mut refusals, "OOM", 103);
        for at in [103_000, 112_999] {
            assert_eq!(lately(&refusals, at).as_deref(), Some("OOM: at 103"));
        }
        assert_eq!(lately(&refusals, 113_000), None);
    }

    #[test]
    fn each_reason_of_a_row_is_told_once() {
        let mut refusals = Refusals::default();
        let mut told = |code, at| note(&mut refusals, code, at);
        assert!(told("READONLY", 100) && !told("READONLY", 101));
        // The new master is full.
        assert!(told("OOM", 105) && !told("READONLY", 110) && !told("OOM", 111));
        // A row goes on for as long as calls are refused.
        for at in [170, 229, 288] {
            assert!(!told("OOM", at), "{at}");
        }
        assert!(told("READONLY", 290) && !told("OOM", 300));
        // After a minute without, it is news.
        assert!(!told("OOM", 359) && told("OOM", 419));
    }

    #[test]
    fn a_reason_that_there_was_no_line_for_is_told_later() {
        let mut refusals = Refusals::default();
        let mut told = |code, at| note(&mut refusals, code, at);
        for code in ["A", "B", "C", "D", "E"] {
            assert!(told(code, 100));
        }
        assert!(!told("F", 101) && !told("F", 109) && !told("E", 110));
        assert!(told("F", 110) && !told("F", 111));
    }
}
