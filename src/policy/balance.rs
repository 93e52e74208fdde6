//! Which of several endpoints takes a request. Owns the choice; must not know what an endpoint is: it is an index here.
//!
//! A weight is from 0 to 1, and 1 for an endpoint that takes its full part. `draw` gives numbers from 0 to 1 by chance.

use std::hash::Hasher;
use std::time::Duration;

use siphasher::sip::SipHasher13;

/// Points of each endpoint on the ring, as of libketama: its part of the keys is then off by some 8 %.
const POINTS: u32 = 160;
/// Draws for an endpoint by weight, before one is taken whatever its weight.
const DRAWS: usize = 16;

/// The one with fewer requests under way of two by chance (Mitzenmacher, "The Power of Two Choices in Randomized Load
/// Balancing"); `None` where there is none to choose from.
pub fn two_choices(
    count: usize,
    weight: impl Fn(usize) -> f64,
    load: impl Fn(usize) -> u32,
    mut draw: impl FnMut() -> f64,
) -> Option<usize> {
    match count {
        0 => return None,
        1 => return Some(0),
        _ => {}
    }
    let mut first = at(draw(), count);
    for _ in 1..DRAWS {
        let weight = weight(first);
        if weight >= 1.0 || draw() < weight {
            break;
        }
        first = at(draw(), count);
    }
    // Each of the others is as likely; one that is idle since it is cold may not win each time that it is looked at.
    let other = (first + 1 + at(draw(), count - 1)) % count;
    let weight = weight(other);
    let counts = weight >= 1.0 || draw() < weight;
    Some(match counts && load(other) < load(first) {
        true => other,
        false => first,
    })
}

/// The next in turn, and the turn after it; `None` where there is none to choose from. A cold one is passed over as often as its
/// weight says.
pub fn round_robin(
    turn: usize,
    count: usize,
    weight: impl Fn(usize) -> f64,
    mut draw: impl FnMut() -> f64,
) -> Option<(usize, usize)> {
    if count == 0 {
        return None;
    }
    let mut index = turn % count;
    for _ in 1..count {
        let weight = weight(index);
        if weight >= 1.0 || draw() < weight {
            break;
        }
        index = (index + 1) % count;
    }
    Some((index, index + 1))
}

/// The weight of an endpoint that came `age` ago: in even steps from `least` to 1 over the window.
pub fn warmth(age: Duration, window: Duration, least: f64) -> f64 {
    match age < window {
        true => (age.as_secs_f64() / window.as_secs_f64()).max(least),
        false => 1.0,
    }
}

/// Whether so few are up that all are used, since the traffic of all would finish those off.
pub fn panics(up: usize, all: usize, threshold: f64) -> bool {
    (up as f64) < threshold * all as f64
}

/// Endpoints on a ring of hashes (Karger et al., "Consistent Hashing and Random Trees"): when one comes or goes, only the keys that
/// are or were its own move. The same in every process that has the same endpoints.
#[derive(Debug, Default)]
pub struct Ring {
    /// With the endpoint's index, in the order of the hashes.
    points: Vec<(u64, u32)>,
}

impl Ring {
    /// Of endpoints by their names.
    pub fn new<'n>(names: impl Iterator<Item = &'n str>) -> Ring {
        let mut points = Vec::new();
        for (index, name) in (0..).zip(names) {
            let of_name = |point: u32| (hash([name.as_bytes(), &point.to_le_bytes()]), index);
            points.extend((0..POINTS).map(of_name));
        }
        points.sort_unstable();
        Ring { points }
    }

    /// The endpoint that a key's hash falls to among those that are `usable`.
    pub fn find(&self, key: u64, usable: impl Fn(usize) -> bool) -> Option<usize> {
        let start = self.points.partition_point(|(point, _)| *point < key);
        let (before, from) = self.points.split_at(start);
        let mut along = from.iter().chain(before).map(|(_, index)| *index as usize);
        along.find(|index| usable(*index))
    }
}

/// The hash of a key of several parts.
pub fn hash<'p>(parts: impl IntoIterator<Item = &'p [u8]>) -> u64 {
    // Without a secret: all processes are to agree. Who seeks keys that fall to one endpoint finds them by asking, too.
    let mut hasher = SipHasher13::new();
    for part in parts {
        hasher.write(&(part.len() as u64).to_le_bytes());
        hasher.write(part);
    }
    hasher.finish()
}

/// The place of a draw among so many.
fn at(draw: f64, count: usize) -> usize {
    ((draw * count as f64) as usize).min(count - 1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Draws that are even, and the same each time.
    fn draws(seed: u64) -> impl FnMut() -> f64 {
        let mut state = seed;
        move || {
            state = hash([&state.to_le_bytes()[..]]);
            (state >> 11) as f64 / (1u64 << 53) as f64
        }
    }

    fn names(count: usize) -> Vec<String> {
        (0..count).map(|n| format!("10.0.0.{n}:80")).collect()
    }

    fn ring(names: &[String]) -> Ring {
        Ring::new(names.iter().map(String::as_str))
    }

    /// Requests that stay under way: how many of 10,000 each endpoint has.
    fn spread(count: usize, weight: impl Fn(usize) -> f64 + Copy) -> Vec<u32> {
        let mut loads = vec![0; count];
        let mut draw = draws(7);
        for _ in 0..10_000 {
            let chosen = two_choices(count, weight, |index| loads[index], &mut draw);
            loads[chosen.unwrap()] += 1;
        }
        loads
    }

    #[test]
    fn two_choices_spread_evenly_where_one_would_not() {
        let loads = spread(10, |_| 1.0);
        let (least, most) = (loads.iter().min().unwrap(), loads.iter().max().unwrap());
        // By one choice the fullest of ten has some 50 more than the mean; by two it is off by log log n.
        assert!(most - least <= 8, "{loads:?}");
    }

    #[test]
    fn two_choices_without_load_are_a_choice_by_chance() {
        let mut chosen = vec![0; 4];
        let mut draw = draws(3);
        for _ in 0..10_000 {
            chosen[two_choices(4, |_| 1.0, |_| 0, &mut draw).unwrap()] += 1;
        }
        assert!(
            chosen.iter().all(|n| (2_300..2_700).contains(n)),
            "{chosen:?}"
        );
    }

    #[test]
    fn a_busy_endpoint_is_left_alone() {
        let load = |index| if index == 0 { 100 } else { 1 };
        let mut draw = draws(5);
        let chosen = (0..1_000).filter_map(|_| two_choices(2, |_| 1.0, load, &mut draw));
        assert_eq!(chosen.filter(|index| *index == 0).count(), 0);
    }

    #[test]
    fn what_a_busy_endpoint_leaves_goes_to_the_others_alike() {
        let load = |index| if index == 0 { 100 } else { 1 };
        let mut chosen = vec![0; 4];
        let mut draw = draws(13);
        for _ in 0..9_000 {
            chosen[two_choices(4, |_| 1.0, load, &mut draw).unwrap()] += 1;
        }
        assert_eq!(chosen[0], 0);
        assert!(
            chosen[1..].iter().all(|n| (2_700..3_300).contains(n)),
            "{chosen:?}"
        );
    }

    #[test]
    fn a_cold_endpoint_gets_about_its_part() {
        // None under way at any time, as where requests are quick.
        let weight = |index| if index == 0 { 0.1 } else { 1.0 };
        let mut draw = draws(9);
        let mut count = |count| {
            let chosen = (0..10_000).filter_map(|_| two_choices(count, weight, |_| 0, &mut draw));
            chosen.filter(|index| *index == 0).count()
        };
        // 0.1 of 1.1, and 0.1 of 3.1.
        assert!((700..1_100).contains(&count(2)));
        assert!((230..420).contains(&count(4)));
        let mut turn = 0;
        let mut cold = 0;
        for _ in 0..10_000 {
            let (index, next) = round_robin(turn, 4, weight, &mut draw).unwrap();
            turn = next;
            cold += usize::from(index == 0);
        }
        assert!((230..420).contains(&cold), "{cold}");
    }

    #[test]
    fn round_robin_takes_each_in_turn() {
        let mut turn = 2;
        let chosen: Vec<_> = (0..6)
            .map(|_| {
                let (index, next) = round_robin(turn, 3, |_| 1.0, || 0.5).unwrap();
                turn = next;
                index
            })
            .collect();
        assert_eq!(chosen, [2, 0, 1, 2, 0, 1]);
        assert_eq!(round_robin(7, 0, |_| 1.0, || 0.5), None);
        assert_eq!(two_choices(0, |_| 1.0, |_| 0, || 0.5), None);
    }

    #[test]
    fn an_endpoint_warms_up_in_even_steps() {
        let check = |age, expected: f64| {
            let (age, window) = (Duration::from_secs(age), Duration::from_secs(10));
            assert!(
                (warmth(age, window, 0.1) - expected).abs() < 1e-9,
                "{age:?}"
            );
        };
        check(0, 0.1);
        check(1, 0.1);
        check(5, 0.5);
        check(10, 1.0);
        check(99, 1.0);
        assert_eq!(warmth(Duration::ZERO, Duration::ZERO, 0.1), 1.0);
    }

    #[test]
    fn panic_begins_below_the_threshold() {
        assert!(panics(0, 1, 0.5) && panics(1, 3, 0.5) && panics(0, 4, 0.01));
        assert!(!panics(1, 2, 0.5) && !panics(0, 2, 0.0) && !panics(0, 0, 0.5));
        assert!(panics(1, 2, 1.0) && !panics(2, 2, 1.0));
    }

    #[test]
    fn the_ring_gives_each_its_part() {
        let ring = ring(&names(5));
        let mut parts = [0; 5];
        for key in 0..50_000u64 {
            parts[ring.find(hash([&key.to_le_bytes()[..]]), |_| true).unwrap()] += 1;
        }
        assert!(
            parts.iter().all(|n| (7_500..12_500).contains(n)),
            "{parts:?}"
        );
    }

    #[test]
    fn parts_of_a_key_do_not_run_into_each_other() {
        assert_ne!(hash([&b"ab"[..], b"c"]), hash([&b"a"[..], b"bc"]));
        assert_ne!(hash([&b"a"[..]]), hash([&b"a"[..], b""]));
    }

    proptest! {
        #[test]
        fn what_leaves_the_ring_moves_its_own_keys_alone(count in 2usize..20, gone in any::<prop::sample::Index>(), keys in proptest::collection::vec(any::<u64>(), 50)) {
            let all = names(count);
            let gone = gone.index(count);
            let mut left = all.clone();
            left.remove(gone);
            let (before, after) = (ring(&all), ring(&left));
            for key in keys {
                let was = before.find(key, |_| true).unwrap();
                // The same, whether it has left the list or is only down.
                let down = before.find(key, |index| index != gone).unwrap();
                let now = after.find(key, |_| true).unwrap();
                prop_assert_eq!(&all[down], &left[now]);
                prop_assert!(was == gone || was == down, "{} went from {} to {}", key, was, down);
            }
        }

        #[test]
        fn choices_are_among_those_there_are(count in 1usize..10, weights in proptest::collection::vec(0.0f64..=1.0, 10), loads in proptest::collection::vec(any::<u32>(), 10), turn in any::<usize>(), seed in any::<u64>()) {
            let mut draw = draws(seed);
            let chosen = two_choices(count, |i| weights[i], |i| loads[i], &mut draw).unwrap();
            prop_assert!(chosen < count);
            let (chosen, next) = round_robin(turn, count, |i| weights[i], &mut draw).unwrap();
            prop_assert!(chosen < count && next == chosen + 1);
        }

        #[test]
        fn none_usable_is_none(key in any::<u64>()) {
            prop_assert_eq!(ring(&names(3)).find(key, |_| false), None);
            prop_assert_eq!(Ring::default().find(key, |_| true), None);
        }
    }

    #[test]
    fn a_cold_endpoint_gets_no_more_for_being_idle() {
        let weight = |index| if index == 0 { 0.1 } else { 1.0 };
        let load = |index| u32::from(index != 0);
        let mut draw = draws(11);
        let chosen = (0..10_000).filter_map(|_| two_choices(2, weight, load, &mut draw));
        let cold = chosen.filter(|index| *index == 0).count();
        // 0.1 of 1.1 as the first of two, and a tenth of the others as the second.
        assert!((1_400..2_200).contains(&cold), "{cold}");
    }
}
