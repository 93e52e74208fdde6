//! What ties a day's file to those around it, and the search for files that are gone. Pure: knows what files say of each
//! other, not how they are read.
//!
//! Each file names the one before it and where that one's instances ended; a closed one names the one after it; and the
//! file that was the newest when retention removed others names those. All of it is authenticated (`chain`), so a file
//! that another names and that is not there was removed by another hand, unless it was the newest and never closed the
//! one before it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::chain::{End, FileId};
use super::days::Day;
use super::{Fault, FaultKind};

/// What a file says of the one before it, as that was when the file was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Previous {
    pub day: Day,
    pub file: FileId,
    pub place: u64,
    pub ends: Vec<Ended>,
}

/// The part of a boot that a file holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    pub name: String,
    pub boot: [u8; 16],
    pub first: u64,
    pub end: End,
}

/// A file that retention removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Removed {
    pub day: Day,
    pub place: u64,
    pub file: FileId,
}

/// A file as it was found.
#[derive(Debug, Clone)]
pub struct Seen {
    pub day: Day,
    pub file: FileId,
    /// Its number among the files, from 1.
    pub place: u64,
    pub previous: Option<Previous>,
    pub next: Option<(Day, FileId)>,
    pub removed: Vec<Removed>,
    pub parts: Vec<SeenPart>,
}

/// What it holds of a boot.
#[derive(Debug, Clone)]
pub struct SeenPart {
    pub name: String,
    pub boot: [u8; 16],
    /// The day of the file that holds what is before.
    pub from: Option<Day>,
    pub before: End,
    pub end: End,
}

/// Files that are gone.
#[derive(Default)]
struct Gone {
    /// The first of them, where there are several.
    since: Option<Day>,
    /// What they held, by instance.
    held: BTreeMap<String, RangeInclusive<u64>>,
}

impl Gone {
    fn hold(&mut self, instance: String, seqs: RangeInclusive<u64>) {
        let held = self.held.entry(instance).or_insert_with(|| seqs.clone());
        *held = *held.start().min(seqs.start())..=*held.end().max(seqs.end());
    }
}

/// The instance as people see it.
pub fn shown(name: &str, boot: &[u8; 16]) -> String {
    format!("{name}/{}", Uuid::from_bytes(*boot))
}

/// The faults of all the files of a path, given in the order of their days.
pub fn check(files: &[Seen]) -> Vec<Fault> {
    let mut missing = missing(files);
    let mut faults = Vec::new();
    let removed: HashSet<Day> = files
        .iter()
        .flat_map(|file| file.removed.iter().map(|removed| removed.day))
        .collect();
    // How far each boot is known.
    let mut known: HashMap<[u8; 16], u64> = HashMap::new();
    for this in files {
        let from_previous = this.previous.iter().flat_map(|previous| {
            previous.ends.iter().map(|ended| {
                let end = ended.end;
                (
                    previous.day,
                    &ended.name,
                    ended.boot,
                    ended.first,
                    end,
                    false,
                )
            })
        });
        let from_parts = this.parts.iter().filter_map(|part| {
            // What retention removed tells no longer where a file's part of a boot began.
            let first = match known.get(&part.boot) {
                Some(last) => last + 1,
                None if removed.is_empty() => 1,
                None => part.before.last.max(1),
            };
            Some((part.from?, &part.name, part.boot, first, part.before, true))
        });
        for (day, name, boot, first, end, exact) in from_previous.chain(from_parts) {
            let instance = shown(name, &boot);
            let gone = missing
                .iter_mut()
                .find(|(last, gone)| (gone.since.unwrap_or(**last)..=**last).contains(&day));
            if let Some((_, gone)) = gone {
                if first <= end.last {
                    gone.hold(instance, first..=end.last);
                }
                continue;
            }
            let Some(file) = files.iter().find(|file| file.day == day) else {
                if !removed.contains(&day) {
                    let gone = missing.entry(day).or_default();
                    gone.hold(instance, first..=end.last);
                }
                continue;
            };
            let (seqs, kind) = match file.parts.iter().find(|part| part.boot == boot) {
                Some(part) if part.end.last < end.last => {
                    (part.end.last + 1..=end.last, FaultKind::TailMissing)
                }
                Some(part) if exact && part.end != end => (0..=0, FaultKind::Link),
                Some(_) => continue,
                None if first <= end.last => (first..=end.last, FaultKind::Missing),
                None => continue,
            };
            let day = if kind == FaultKind::Link {
                this.day
            } else {
                day
            };
            let fault = Fault {
                days: day..=day,
                instance,
                seqs,
                kind,
            };
            if !faults.contains(&fault) {
                faults.push(fault);
            }
        }
        for part in &this.parts {
            known.insert(part.boot, part.end.last);
        }
    }
    let missing = missing.into_iter().flat_map(|(last, gone)| {
        let fault = move |instance, seqs| Fault {
            days: gone.since.unwrap_or(last)..=last,
            instance,
            seqs,
            kind: FaultKind::FileMissing,
        };
        let unknown = gone.held.is_empty().then(|| fault(String::new(), 0..=0));
        let held = gone.held.into_iter();
        unknown
            .into_iter()
            .chain(held.map(move |(instance, seqs)| fault(instance, seqs)))
            .collect::<Vec<_>>()
    });
    missing.chain(faults).collect()
}

/// The files that others name and that are not there, by the last day of a gap.
fn missing(files: &[Seen]) -> BTreeMap<Day, Gone> {
    let removed = files.iter().flat_map(|file| &file.removed);
    let removed: Vec<_> = removed.copied().collect();
    let there: HashSet<FileId> = files
        .iter()
        .map(|file| file.file)
        .chain(removed.iter().map(|removed| removed.file))
        .collect();
    let mut missing: BTreeMap<Day, Gone> = BTreeMap::new();
    let mut before: Option<&Seen> = None;
    for this in files {
        let next = before.and_then(|before| before.next);
        let named = next.into_iter().chain(
            this.previous
                .as_ref()
                .map(|previous| (previous.day, previous.file)),
        );
        let mut days: Vec<_> = named
            .filter(|(_, file)| !there.contains(file))
            .map(|(day, _)| day)
            .collect();
        days.dedup();
        // Several files in a row are told as one gap: the files around it name no more than its first and its last.
        let place_before = removed
            .iter()
            .map(|removed| (removed.place, removed.day))
            .chain(before.map(|before| (before.place, before.day)))
            .filter(|(place, _)| *place < this.place)
            .max();
        let (place, day) = place_before.unwrap_or_default();
        let absent = this.place.saturating_sub(place + 1);
        match (days.iter().min(), days.iter().max()) {
            (Some(first), Some(last)) if absent > 1 => {
                let since = match place {
                    0 => *first,
                    _ => Day(day.0 + 1).min(*first),
                };
                let gone = missing.entry(*last).or_default();
                gone.since = Some(since);
            }
            _ => days.into_iter().for_each(|day| {
                missing.entry(day).or_default();
            }),
        }
        before = Some(this);
    }
    let next = before.and_then(|last| last.next);
    if let Some((day, _)) = next.filter(|(_, file)| !there.contains(file)) {
        missing.entry(day).or_default();
    }
    missing
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A boot that writes ten events on each of these days, one file after another.
    fn files(count: u32) -> Vec<Seen> {
        let end = |day: u32| End {
            last: u64::from(day) * 10,
            hash: [u8::try_from(day).unwrap(); 32],
        };
        let id = |day: u32| [u8::try_from(day).unwrap(); 16];
        let days = 1..=count;
        days.map(|day| Seen {
            day: Day(day),
            file: id(day),
            place: day.into(),
            previous: (day > 1).then(|| Previous {
                day: Day(day - 1),
                file: id(day - 1),
                place: u64::from(day) - 1,
                ends: vec![Ended {
                    name: "a".to_owned(),
                    boot: [9; 16],
                    first: end(day - 1).last - 9,
                    end: end(day - 1),
                }],
            }),
            next: (day < count).then(|| (Day(day + 1), id(day + 1))),
            removed: Vec::new(),
            parts: vec![SeenPart {
                name: "a".to_owned(),
                boot: [9; 16],
                from: (day > 1).then(|| Day(day - 1)),
                before: if day > 1 {
                    end(day - 1)
                } else {
                    End::default()
                },
                end: end(day),
            }],
        })
        .collect()
    }

    fn without(count: u32, days: &[u32]) -> Vec<Seen> {
        let mut files = files(count);
        files.retain(|file| !days.contains(&file.day.0));
        files
    }

    type Brief = (RangeInclusive<u32>, RangeInclusive<u64>, FaultKind);

    #[track_caller]
    fn says(files: &[Seen], expected: &[Brief]) {
        let faults: Vec<_> = check(files)
            .into_iter()
            .map(|fault| {
                (
                    fault.days.start().0..=fault.days.end().0,
                    fault.seqs,
                    fault.kind,
                )
            })
            .collect();
        assert_eq!(faults, expected);
    }

    #[test]
    fn files_that_are_gone_are_named_with_what_they_held() {
        use FaultKind::FileMissing;
        says(&files(6), &[]);
        says(&files(1), &[]);
        says(&without(6, &[1]), &[(1..=1, 1..=10, FileMissing)]);
        says(&without(6, &[3]), &[(3..=3, 21..=30, FileMissing)]);
        says(&without(6, &[6]), &[(6..=6, 0..=0, FileMissing)]);
        says(&without(6, &[2, 3]), &[(2..=3, 11..=30, FileMissing)]);
        says(&without(6, &[2, 3, 4]), &[(2..=4, 11..=40, FileMissing)]);
    }

    #[test]
    fn what_retention_removed_is_not_missing_and_what_another_hand_removed_with_it_is() {
        let removed = |day: u32| Removed {
            day: Day(day),
            place: day.into(),
            file: [u8::try_from(day).unwrap(); 16],
        };
        let mut files = without(6, &[1, 2]);
        files[3].removed = vec![removed(1), removed(2)];
        says(&files, &[]);
        files[3].removed.pop();
        says(&files, &[(2..=2, 11..=20, FaultKind::FileMissing)]);
    }

    #[test]
    fn a_file_put_back_to_an_older_state_lacks_its_tail() {
        let mut files = files(3);
        files[1].parts[0].end.last = 15;
        says(&files, &[(2..=2, 16..=20, FaultKind::TailMissing)]);
        files[1].parts.clear();
        says(&files, &[(2..=2, 11..=20, FaultKind::Missing)]);
    }

    #[test]
    fn a_file_of_the_same_day_does_not_stand_in_for_another() {
        let mut files = files(3);
        files[2].file = [7; 16];
        says(&files, &[(3..=3, 0..=0, FaultKind::FileMissing)]);
    }

    #[test]
    fn a_boot_that_goes_on_from_elsewhere_is_named() {
        let mut files = files(3);
        files[1].parts[0].end.hash = [0; 32];
        says(&files, &[(3..=3, 0..=0, FaultKind::Link)]);
    }
}
