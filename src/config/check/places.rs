//! Routes by the host and path that they match, so that of tens of thousands those are found at once that could take
//! another's requests.

use std::collections::HashMap;

use crate::config::matches::{HostMatch, Match, PathMatch};

/// Routes by their index.
#[derive(Default)]
pub(super) struct Places(HashMap<(Option<HostMatch>, Option<Path>), Vec<usize>>);

#[derive(Clone, PartialEq, Eq, Hash)]
struct Path {
    pattern: PathMatch,
    /// Then it is in small letters.
    any_case: bool,
}

impl Path {
    fn of(matches: &Match) -> Option<Path> {
        let pattern = matches.path.clone()?;
        // Without a letter there is no case.
        let any_case = matches.ignore_case
            || !pattern
                .to_string()
                .contains(|c: char| c.is_ascii_alphabetic());
        Some(match any_case {
            true => Path::of_any_case(&pattern),
            false => Path { pattern, any_case },
        })
    }

    fn of_any_case(pattern: &PathMatch) -> Path {
        Path {
            pattern: pattern.folded(),
            any_case: true,
        }
    }

    /// Every one that means all that this one does, itself among them.
    fn wider(&self) -> Vec<Path> {
        let any_case = self
            .pattern
            .folded()
            .wider()
            .into_iter()
            .map(|pattern| Path {
                pattern,
                any_case: true,
            });
        let as_spelt = match self.any_case {
            true => Vec::new(),
            false => self.pattern.wider(),
        };
        let as_spelt = as_spelt.into_iter().map(|pattern| Path {
            pattern,
            any_case: false,
        });
        any_case.chain(as_spelt).collect()
    }
}

impl Places {
    pub(super) fn put(&mut self, matches: &Match, route: usize) {
        let place = (matches.host.clone(), Path::of(matches));
        self.0.entry(place).or_default().push(route);
    }

    /// The routes whose host and path take all that those of `matches` do, the first first.
    pub(super) fn as_wide(&self, matches: &Match) -> Vec<usize> {
        let hosts = matches.host.iter().flat_map(HostMatch::wider).map(Some);
        let paths: Vec<_> = Path::of(matches)
            .iter()
            .flat_map(Path::wider)
            .map(Some)
            .chain([None])
            .collect();
        let places = hosts
            .chain([None])
            .flat_map(|host| paths.iter().map(move |path| (host.clone(), path.clone())));
        let found = places.filter_map(|place| self.0.get(&place)).flatten();
        let mut found: Vec<_> = found.copied().collect();
        found.sort_unstable();
        found
    }
}
