//! The audit's files, one a day: their names, and which there are. Must not know what is in them.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::event::Micros;

const SECONDS: u64 = 86_400;

/// A day in UTC, as days since 1970-01-01; printed as 2026-11-25.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Day(pub u32);

impl Day {
    /// The day of this time since the Unix epoch.
    pub fn of(wall: Duration) -> Day {
        Day(u32::try_from(wall.as_secs() / SECONDS).unwrap_or(u32::MAX))
    }

    /// The first moment after it.
    pub fn end(self) -> Micros {
        Micros::from(Duration::from_secs((u64::from(self.0) + 1) * SECONDS))
    }

    /// `None` unless written as a day is printed.
    fn parse(text: &str) -> Option<Day> {
        let start = format!("{text}T00:00:00Z").parse::<Timestamp>().ok()?;
        let start = u64::try_from(start.as_second()).ok()?;
        let day = Day::of(Duration::from_secs(start));
        (day.to_string() == text).then_some(day)
    }
}

impl fmt::Display for Day {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let start = Timestamp::from_second(i64::from(self.0) * SECONDS.cast_signed());
        let start = start.map(|start| start.to_string());
        match start.as_ref().ok().and_then(|start| start.split_once('T')) {
            Some((date, _)) => f.write_str(date),
            None => write!(f, "day {}", self.0),
        }
    }
}

/// The file of a day: `weir-audit.db` gives `weir-audit-2026-11-25.db`.
pub fn file(path: &Path, day: Day) -> PathBuf {
    let (stem, ending) = parts(path);
    path.with_file_name(format!("{stem}-{day}{ending}"))
}

/// The folder that they are in.
pub fn folder(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        Some(_) | None => Path::new("."),
    }
}

/// The files that there are, the oldest first. A folder that does not exist has none.
pub fn list(path: &Path) -> io::Result<Vec<(Day, PathBuf)>> {
    let (stem, ending) = parts(path);
    let entries = match fs::read_dir(folder(path)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut files = Vec::new();
    for entry in entries {
        let name = entry?.file_name();
        let day = name
            .to_str()
            .and_then(|name| name.strip_prefix(&stem)?.strip_prefix('-'))
            .and_then(|rest| Day::parse(rest.strip_suffix(&ending)?));
        files.extend(day.map(|day| (day, file(path, day))));
    }
    files.sort();
    Ok(files)
}

/// What stands before the day, and what behind it.
fn parts(path: &Path) -> (String, String) {
    let text = |part: &std::ffi::OsStr| part.to_string_lossy().into_owned();
    let stem = path.file_stem().map(text).unwrap_or_default();
    let ending = path
        .extension()
        .map(|ending| format!(".{}", text(ending)))
        .unwrap_or_default();
    (stem, ending)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_day_is_inserted_before_the_extension() {
        let check = |path: &str, expected: &str| {
            assert_eq!(file(Path::new(path), Day(20_782)), Path::new(expected));
        };
        check("weir-audit.db", "weir-audit-2026-11-25.db");
        check("/var/lib/a.b.db", "/var/lib/a.b-2026-11-25.db");
        check("audit", "audit-2026-11-25");
    }

    #[test]
    fn days_begin_at_midnight_in_utc() {
        let midnight = Duration::from_secs(20_782 * 86_400);
        assert_eq!(Day::of(midnight), Day(20_782));
        assert_eq!(Day::of(midnight - Duration::from_micros(1)), Day(20_781));
        assert_eq!(Day(20_781).end(), Micros::from(midnight));
        assert_eq!(Day(0).to_string(), "1970-01-01");
    }

    #[test]
    fn only_the_files_of_days_are_listed_in_their_order() {
        let folder = tempfile::tempdir().unwrap();
        for name in [
            "a-2026-11-25.db",
            "a-2026-02-28.db",
            "a-2026-02-30.db",
            "a-2026-11-25.db-wal",
            "a-2026-1-25.db",
            "b-2026-11-25.db",
            "a-b-2026-11-25.db",
            "a.db",
            "a-2026-11-24",
        ] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        let days = list(&folder.path().join("a.db")).unwrap();
        let days: Vec<_> = days.iter().map(|(day, _)| day.to_string()).collect();
        assert_eq!(days, ["2026-02-28", "2026-11-25"]);
        assert_eq!(list(&folder.path().join("none/a.db")).unwrap(), []);
    }
}
