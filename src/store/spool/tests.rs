//! The rules of the spool, as tests; what becomes of one that is away is in `away`.

mod away;

use std::collections::VecDeque;
use std::os::unix::fs::PermissionsExt as _;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use tempfile::TempDir;

use super::*;

const MAX: u64 = 64 << 20;

fn boot(number: u8) -> Uuid {
    Uuid::from_bytes([number; 16])
}

fn open(root: &TempDir, number: u8) -> (Spool, Vec<Abandoned>) {
    Spool::open(root.path(), MAX, boot(number)).unwrap()
}

/// All records that are left.
fn records(abandoned: &mut Abandoned) -> Vec<(Place, Vec<u8>)> {
    std::iter::from_fn(|| abandoned.next_record().unwrap()).collect()
}

fn payloads(abandoned: &mut Abandoned) -> Vec<Vec<u8>> {
    let records = records(abandoned).into_iter();
    records.map(|(_, payload)| payload).collect()
}

/// Segment files of a boot, in order.
fn segments(root: &TempDir, number: u8) -> Vec<PathBuf> {
    let listed = fs::read_dir(root.path().join(boot(number).to_string())).unwrap();
    let paths = listed.map(|entry| entry.unwrap().path());
    let is_segment = |path: &PathBuf| path.extension().is_some_and(|ending| ending == "seg");
    let mut paths: Vec<_> = paths.filter(is_segment).collect();
    paths.sort();
    paths
}

/// Files of damaged segments.
fn kept(root: &TempDir) -> usize {
    let listed = fs::read_dir(root.path()).unwrap();
    let paths = listed.map(|entry| entry.unwrap().path());
    paths
        .filter(|path| path.extension().is_some_and(|ending| ending == "corrupt"))
        .count()
}

#[test]
fn records_are_read_until_they_are_released_in_any_order() {
    let root = TempDir::new().unwrap();
    let (mut spool, abandoned) = open(&root, 1);
    assert!(abandoned.is_empty());
    let one = spool.append(b"one").unwrap();
    let two = spool.append(b"").unwrap();
    let between = clock::mono();
    let three = spool.append(b"three").unwrap();
    spool.sync().unwrap();
    assert_eq!(spool.read(&two).unwrap(), b"");
    assert_eq!(spool.records(), 3);
    spool.release(two).unwrap();
    assert_eq!(spool.records(), 2);
    let before = clock::mono() - between;
    assert!(spool.oldest_age().unwrap() >= before);
    assert_eq!(spool.read(&one).unwrap(), b"one");
    assert_eq!(spool.read(&three).unwrap(), b"three");
    spool.release(one).unwrap();
    // That of the third, which came later.
    let third = spool.oldest_age().unwrap();
    assert!(third <= clock::mono() - between);
    spool.release(three).unwrap();
    assert_eq!((spool.records(), spool.oldest_age()), (0, None));
    assert_eq!(spool.bytes(), 8 + 3 * 12 + 8);
    spool.remove().unwrap();
    assert_eq!(open(&root, 2).1.len(), 0);
}

#[test]
fn a_record_that_stays_keeps_no_memory_of_those_released_behind_it() {
    let root = TempDir::new().unwrap();
    let (mut spool, _) = open(&root, 1);
    let stays = spool.append(b"stays").unwrap();
    for _ in 0..100 {
        let place = spool.append(b"goes").unwrap();
        spool.release(place).unwrap();
    }
    assert_eq!((spool.records(), spool.times.len()), (1, 1));
    spool.release(stays).unwrap();
    assert_eq!(spool.times.len(), 0);
}

#[test]
fn only_the_owner_may_look_into_the_spool() {
    let root = TempDir::new().unwrap();
    let path = root.path().join("spool");
    let (mut spool, _) = Spool::open(&path, MAX, boot(1)).unwrap();
    spool.append(b"one").unwrap();
    let folder = path.join(boot(1).to_string());
    let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&path), mode(&folder)), (0o700, 0o700));
    for file in ["lock", "00000001.seg"] {
        assert_eq!(mode(&folder.join(file)), 0o600);
    }
}

#[test]
fn a_segment_goes_once_all_of_it_is_released_and_a_later_one_is_synced() {
    let root = TempDir::new().unwrap();
    let (mut spool, _) = open(&root, 1);
    let megabyte = vec![7; 1 << 20];
    let mut places: Vec<_> = (0..16).map(|_| spool.append(&megabyte).unwrap()).collect();
    assert_eq!(segments(&root, 1).len(), 3);
    let (newest, older) = (places.split_off(14), places);
    older
        .into_iter()
        .for_each(|place| spool.release(place).unwrap());
    // The second is all released too, but a power cut would take the third.
    assert_eq!(segments(&root, 1).len(), 2);
    spool.sync().unwrap();
    assert_eq!(segments(&root, 1).len(), 1);
    // The last record stays.
    newest
        .into_iter()
        .for_each(|place| spool.release(place).unwrap());
    assert_eq!(segments(&root, 1).len(), 1);
    drop(spool);
    let (_, mut abandoned) = open(&root, 2);
    assert_eq!(payloads(&mut abandoned[0]).last(), Some(&megabyte));
}

#[test]
fn a_full_spool_takes_no_more_until_something_is_released() {
    let root = TempDir::new().unwrap();
    let (mut spool, _) = Spool::open(root.path(), 100_000, boot(1)).unwrap();
    let mut places = VecDeque::new();
    let error = loop {
        match spool.append(&[7; 1_000]) {
            Ok(place) => places.push_back(place),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, SpoolError::Full(100_000)), "{error}");
    assert!((97..=99).contains(&places.len()), "{}", places.len());
    assert!(spool.bytes() <= 100_000 && spool.room() < 1_100);
    let small = spool.append(b"small").unwrap();
    assert_eq!(spool.read(&small).unwrap(), b"small");
    spool.sync().unwrap();
    places
        .drain(..12)
        .for_each(|place| spool.release(place).unwrap());
    spool.append(&[7; 1_000]).unwrap();
    // What others have left takes room too, until it is removed.
    drop(spool);
    let (mut heir, mut abandoned) = Spool::open(root.path(), 100_000, boot(2)).unwrap();
    assert_eq!(heir.bytes(), abandoned[0].bytes());
    let room = usize::try_from(heir.room()).unwrap();
    assert!(matches!(
        heir.append(&vec![7; room]),
        Err(SpoolError::Full(_))
    ));
    abandoned.remove(0).remove().unwrap();
    assert_eq!(heir.bytes(), 0);
    heir.append(&vec![7; room]).unwrap();
}

#[test]
fn no_record_of_whatever_length_takes_a_spool_beyond_its_bound() {
    for length in 1..=24 {
        let root = TempDir::new().unwrap();
        let (mut spool, _) = Spool::open(root.path(), 1_000, boot(1)).unwrap();
        while spool.append(&vec![7; length]).is_ok() {}
        assert!(spool.bytes() <= 1_000, "{length}: {}", spool.bytes());
    }
}

#[test]
fn what_others_have_left_is_given_the_oldest_first_and_takes_room_while_it_is_held() {
    let root = TempDir::new().unwrap();
    for number in [5, 8, 2, 7, 4, 6, 3] {
        open(&root, number).0.append(b"left").unwrap();
    }
    let (mut spool, abandoned) = open(&root, 9);
    let boots: Vec<_> = abandoned.iter().map(|left| left.boot).collect();
    assert_eq!(boots, [2, 3, 4, 5, 6, 7, 8].map(boot));
    spool.append(b"own").unwrap();
    let own = spool.bytes() - abandoned.iter().map(Abandoned::bytes).sum::<u64>();
    drop(abandoned);
    assert_eq!(spool.bytes(), own);
}

#[test]
fn the_age_of_a_spool_is_that_of_the_record_that_waits_longest() {
    let root = TempDir::new().unwrap();
    let (mut spool, _) = open(&root, 1);
    assert_eq!(spool.oldest_age(), None);
    let first = spool.append(b"first").unwrap();
    let age = |spool: &Spool| spool.oldest_age().unwrap();
    while age(&spool) < Duration::from_millis(50) {
        std::thread::yield_now();
    }
    spool.append(b"second").unwrap();
    assert!(age(&spool) >= Duration::from_millis(50));
    spool.release(first).unwrap();
    assert!(spool.oldest_age().is_some());
}

#[test]
fn a_small_spool_that_holds_nothing_is_never_full() {
    let root = TempDir::new().unwrap();
    let (mut spool, _) = Spool::open(root.path(), 100_000, boot(1)).unwrap();
    for _ in 0..1_000 {
        let place = spool.append(&[7; 10_000]).unwrap();
        spool.release(place).unwrap();
    }
}

#[test]
fn a_record_that_cannot_be_written_leaves_no_trace() {
    let root = TempDir::new().unwrap();
    let (mut spool, _) = open(&root, 1);
    spool.append(b"one").unwrap();
    let (path, bytes) = (segments(&root, 1).remove(0), spool.bytes());
    let newest = spool.newest.as_mut().unwrap();
    let read_only = File::open(&path).unwrap();
    let file = std::mem::replace(&mut newest.file, read_only);
    let error = spool.append(b"two").unwrap_err();
    assert!(error.to_string().starts_with("cannot write "), "{error}");
    assert!(
        spool
            .append(b"two")
            .unwrap_err()
            .to_string()
            .starts_with("cannot cut ")
    );
    assert_eq!((spool.bytes(), spool.records()), (bytes, 1));
    // Half a record, as a full disk leaves it.
    file.write_all_at(b"half", bytes).unwrap();
    spool.newest.as_mut().unwrap().file = file;
    spool.append(b"2").unwrap();
    drop(spool);
    let (_, mut abandoned) = open(&root, 2);
    assert_eq!(
        payloads(&mut abandoned[0]),
        [b"one".to_vec(), b"2".to_vec()]
    );
    assert_eq!(abandoned[0].damage, Damage::default());
}

#[test]
fn a_sync_after_one_that_failed_writes_all_anew() {
    let root = TempDir::new().unwrap();
    let (mut spool, _) = open(&root, 1);
    spool.append(b"one").unwrap();
    spool.newest.as_mut().unwrap().is_unsure = true;
    spool.sync().unwrap();
    spool.append(b"two").unwrap();
    spool.newest.as_mut().unwrap().is_unsure = true;
    let path = segments(&root, 1).remove(0);
    let before = fs::read(&path).unwrap();
    spool.sync().unwrap();
    assert_eq!(fs::read(&path).unwrap(), before);
    // The kernel has let go of what it could not write.
    let place = spool.append(b"three").unwrap();
    let newest = spool.newest.as_mut().unwrap();
    newest.is_unsure = true;
    newest
        .file
        .write_all_at(&[0; 9], newest.length - 9)
        .unwrap();
    assert!(matches!(spool.sync(), Err(SpoolError::Damaged(..))));
    assert!(matches!(spool.read(&place), Err(SpoolError::Damaged(..))));
    spool.append(b"three").unwrap();
    spool.sync().unwrap();
    drop(spool);
    let (_, mut abandoned) = open(&root, 2);
    assert_eq!(payloads(&mut abandoned[0]), [&b"one"[..], b"two", b"three"]);
}

#[test]
fn what_is_left_is_adopted_until_it_is_removed() {
    let root = TempDir::new().unwrap();
    let (mut spool, _) = open(&root, 1);
    let half = vec![7; 5 << 20];
    for _ in 0..3 {
        spool.append(&half).unwrap();
    }
    spool.append(b"last").unwrap();
    drop(spool);
    // A process that ended before it had a record.
    drop(open(&root, 9));
    let (heir, mut abandoned) = open(&root, 2);
    assert_eq!((abandoned.len(), abandoned[0].boot), (1, boot(1)));
    assert!(heir.adopt().unwrap().is_empty(), "it is taken");
    let mut all = records(&mut abandoned[0]);
    assert_eq!(all.len(), 4);
    assert_eq!(abandoned[0].read(&all[1].0).unwrap(), half);
    for (place, _) in all.drain(..) {
        abandoned[0].release(place).unwrap();
    }
    assert_eq!(segments(&root, 1).len(), 1);
    drop(abandoned);
    let mut again = heir.adopt().unwrap();
    assert_eq!(payloads(&mut again[0]).last().unwrap(), b"last");
    again.remove(0).remove().unwrap();
    assert!(heir.adopt().unwrap().is_empty());
    assert!(!root.path().join(boot(1).to_string()).exists());
}

#[test]
fn a_torn_tail_is_cut_off_and_counted() {
    let root = TempDir::new().unwrap();
    let (mut spool, _) = open(&root, 1);
    spool.vouch().unwrap();
    spool.append(b"one").unwrap();
    spool.append(b"two").unwrap();
    drop(spool);
    let path = segments(&root, 1).remove(0);
    let bytes = fs::read(&path).unwrap();
    let (_, mut abandoned) = open(&root, 3);
    assert_eq!(payloads(&mut abandoned[0]).len(), 2);
    assert!(abandoned[0].is_complete());
    drop(abandoned);
    fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    let (_, mut abandoned) = open(&root, 2);
    let torn = Damage {
        torn: 1,
        stretches: 0,
    };
    assert_eq!(payloads(&mut abandoned[0]), [b"one".to_vec()]);
    assert_eq!(abandoned[0].damage, torn);
    // It was never synced, or damaged since.
    assert!(!abandoned[0].is_complete());
    abandoned.remove(0).remove().unwrap();
    assert_eq!(kept(&root), 0);
}

#[test]
fn segments_of_another_version_wait_for_the_weir_that_wrote_them() {
    let root = TempDir::new().unwrap();
    let (mut spool, _) = open(&root, 1);
    let half = vec![7; 5 << 20];
    for _ in 0..3 {
        spool.append(&half).unwrap();
    }
    drop(spool);
    let paths = segments(&root, 1);
    for path in &paths {
        let mut bytes = HEAD.to_vec();
        bytes[7] += 1;
        bytes.extend_from_slice(b"laid out in another way");
        fs::write(path, &bytes).unwrap();
    }
    let (_, mut abandoned) = open(&root, 2);
    for _ in 0..2 {
        let error = abandoned[0].next_record().unwrap_err();
        assert!(matches!(error, SpoolError::Version(_, 2)), "{error}");
    }
    assert_eq!(abandoned[0].damage, Damage::default());
    drop(abandoned);
    assert_eq!(segments(&root, 1), paths);
    assert_eq!(kept(&root), 0);
}

#[test]
fn a_damaged_version_costs_no_record() {
    let root = TempDir::new().unwrap();
    let (mut spool, _) = open(&root, 1);
    spool.append(b"one").unwrap();
    drop(spool);
    let path = segments(&root, 1).remove(0);
    let mut bytes = fs::read(&path).unwrap();
    bytes[7] ^= 4;
    fs::write(&path, &bytes).unwrap();
    let (_, mut abandoned) = open(&root, 2);
    assert_eq!(payloads(&mut abandoned[0]), [b"one"]);
}

#[test]
fn a_newest_segment_without_a_record_does_not_cost_the_last_record() {
    let root = TempDir::new().unwrap();
    let (mut spool, _) = open(&root, 1);
    spool.append(b"one").unwrap();
    let folder = root.path().join(boot(1).to_string());
    drop(spool);
    fs::write(folder.join("00000002.seg"), &HEAD[..3]).unwrap();
    let (_, mut abandoned) = open(&root, 2);
    for (place, _) in records(&mut abandoned[0]) {
        abandoned[0].release(place).unwrap();
    }
    assert_eq!(abandoned[0].damage.torn, 1);
    drop(abandoned);
    let (_, mut abandoned) = open(&root, 3);
    assert_eq!(payloads(&mut abandoned[0]), [b"one".to_vec()]);
}

#[test]
fn only_damage_that_came_last_hides_the_end() {
    let long = vec![7; 3 << 20];
    // Which of two segments cannot be read.
    for lost in [0, 1] {
        let root = TempDir::new().unwrap();
        let (mut spool, _) = open(&root, 1);
        spool.vouch().unwrap();
        for _ in 0..4 {
            spool.append(&long).unwrap();
        }
        drop(spool);
        let paths = segments(&root, 1);
        assert_eq!(paths.len(), 2);
        let (_, mut abandoned) = open(&root, 2);
        fs::remove_file(&paths[lost]).unwrap();
        assert_eq!(payloads(&mut abandoned[0]).len(), 2);
        assert_eq!(abandoned[0].damage.stretches, 1);
        assert_eq!(abandoned[0].is_complete(), lost == 0);
    }
}

#[test]
fn a_damaged_segment_is_kept_and_the_rest_goes_on() {
    let root = TempDir::new().unwrap();
    let (mut spool, _) = open(&root, 1);
    let long = vec![7; 3 << 20];
    for name in [b"a", b"b", b"c", b"d"] {
        spool.append(&long).unwrap();
        spool.append(name).unwrap();
    }
    drop(spool);
    let paths = segments(&root, 1);
    assert_eq!(paths.len(), 2);
    let mut bytes = fs::read(&paths[0]).unwrap();
    // The length of the first record, and the end of the segment.
    bytes[HEAD.len() + 4] ^= 1;
    bytes.pop();
    fs::write(&paths[0], &bytes).unwrap();
    let (_, mut abandoned) = open(&root, 2);
    let found = payloads(&mut abandoned[0]);
    let found: Vec<_> = found.iter().map(|payload| payload.len()).collect();
    assert_eq!(found, [1, 3 << 20, 3 << 20, 1, 3 << 20, 1]);
    let damage = Damage {
        torn: 0,
        stretches: 2,
    };
    assert_eq!(abandoned[0].damage, damage);
    abandoned.remove(0).remove().unwrap();
    assert_eq!(kept(&root), 1);
    let corrupt = root.path().join(format!("{}.00000001.corrupt", boot(1)));
    assert_eq!(fs::read(corrupt).unwrap(), bytes);
    assert!(open(&root, 3).1.is_empty());
}

#[test]
fn a_segment_that_is_gone_costs_no_more_than_its_records() {
    let root = TempDir::new().unwrap();
    let (mut spool, _) = open(&root, 1);
    for byte in 1..=3 {
        spool.append(&vec![byte; 6 << 20]).unwrap();
    }
    drop(spool);
    let (_, mut abandoned) = open(&root, 2);
    fs::remove_file(&segments(&root, 1)[1]).unwrap();
    let found = payloads(&mut abandoned[0]);
    let found: Vec<_> = found.iter().map(|payload| payload[0]).collect();
    assert_eq!((found, abandoned[0].damage.stretches), (vec![1, 3], 1));
    abandoned.remove(0).remove().unwrap();
}

#[test]
fn what_is_not_of_the_spool_is_left_alone() {
    let root = TempDir::new().unwrap();
    let (mut spool, _) = open(&root, 1);
    spool.append(b"one").unwrap();
    drop(spool);
    let folder = root.path().join(boot(1).to_string());
    fs::write(folder.join("1.seg"), b"x").unwrap();
    fs::write(folder.join("00000002.txt"), b"x").unwrap();
    fs::create_dir(root.path().join("lost+found")).unwrap();
    fs::write(root.path().join(boot(5).to_string()), b"x").unwrap();
    let (_, mut abandoned) = open(&root, 2);
    assert_eq!(abandoned.len(), 1);
    assert_eq!(payloads(&mut abandoned[0]), [b"one".to_vec()]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_damage_costs_more_than_the_damaged_records(
        sizes in vec(0usize..40_000, 1..40),
        flips in vec((any::<Index>(), any::<Index>(), 1u8..), 0..8),
        cut in prop::option::of((any::<Index>(), any::<Index>())),
    ) {
        let root = TempDir::new().unwrap();
        // Of 12,500 bytes a segment.
        let (mut spool, _) = Spool::open(root.path(), 100_000, boot(1)).unwrap();
        let mut places = Vec::new();
        for (number, size) in sizes.iter().enumerate() {
            match spool.append(&vec![number as u8; *size]) {
                Ok(place) => places.push((place, number as u8, *size)),
                Err(error) => prop_assert!(matches!(error, SpoolError::Full(_))),
            }
        }
        drop(spool);
        let paths = segments(&root, 1);
        let mut damaged = Vec::new();
        for (segment, at, flip) in flips {
            let Some(path) = paths.get(segment.index(paths.len().max(1))) else {
                continue;
            };
            let mut bytes = fs::read(path).unwrap();
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            fs::write(path, bytes).unwrap();
            damaged.push((path.clone(), at..at + 1));
        }
        if let Some((segment, at)) = cut && !paths.is_empty() {
            let path = &paths[segment.index(paths.len())];
            let bytes = fs::read(path).unwrap();
            let at = at.index(bytes.len());
            fs::write(path, &bytes[..at]).unwrap();
            damaged.push((path.clone(), at..bytes.len()));
        }
        let whole: Vec<_> = places.iter().filter(|(place, _, _)| {
            let start = place.offset as usize;
            let end = start + RECORD_HEAD + place.length as usize;
            !damaged.iter().any(|(path, bytes)| {
                path.ends_with(format!("{:08}.seg", place.segment)) && bytes.start < end && start < bytes.end
            })
        }).map(|(_, number, size)| vec![*number; *size]).collect();
        let (_, abandoned) = Spool::open(root.path(), 100_000, boot(2)).unwrap();
        let Some(mut abandoned) = abandoned.into_iter().next() else {
            prop_assert!(places.is_empty());
            return Ok(());
        };
        let found = payloads(&mut abandoned);
        // Flips can undo each other: more may be whole than is known here.
        let mut rest = found.iter();
        prop_assert!(whole.iter().all(|payload| rest.any(|found| found == payload)));
        let all: Vec<_> = places.iter().map(|(_, number, size)| vec![*number; *size]).collect();
        let mut rest = all.iter();
        prop_assert!(found.iter().all(|payload| rest.any(|all| all == payload)));
        abandoned.remove().unwrap();
    }
}

#[test]
fn what_the_disk_does_not_sync_is_not_said_to_be_safe() {
    let root = TempDir::new().unwrap();
    let (mut spool, _) = open(&root, 1);
    spool.append(b"one").unwrap();
    // It takes whatever is written, and syncs nothing.
    let null = OpenOptions::new().write(true).open("/dev/null").unwrap();
    spool.newest.as_mut().unwrap().file = null;
    assert!(spool.sync().is_err() && spool.sync().is_err());
    // Nor is another segment begun behind it.
    assert!(spool.append(&vec![7; SEGMENT as usize]).is_err());
    assert_eq!((spool.records(), segments(&root, 1).len()), (1, 1));

    let (mut spool, _) = open(&root, 2);
    spool.append(b"one").unwrap();
    let folder = root.path().join(boot(2).to_string());
    let moved = root.path().join("moved");
    fs::rename(&folder, &moved).unwrap();
    // After a power cut the segment may have no name.
    assert!(spool.sync().is_err());
    fs::rename(&moved, &folder).unwrap();
    spool.sync().unwrap();
}
