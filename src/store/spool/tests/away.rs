//! What becomes of a spool that is moved, copied or removed under the process that has it.

use super::*;

#[test]
fn what_is_written_to_a_segment_that_was_removed_is_not_safe() {
    let root = TempDir::new().unwrap();
    let (mut spool, _) = open(&root, 1);
    spool.append(b"one").unwrap();
    spool.sync().unwrap();
    fs::remove_file(segments(&root, 1).remove(0)).unwrap();
    let lost = spool.append(b"two").unwrap();
    assert!(matches!(spool.sync(), Err(SpoolError::Removed(_))));
    assert!(spool.read(&lost).unwrap_err().is_lost());
    spool.append(b"two").unwrap();
    spool.sync().unwrap();
    let folder = root.path().join(boot(1).to_string());
    fs::remove_dir_all(&folder).unwrap();
    spool.append(b"three").unwrap();
    assert!(matches!(spool.sync(), Err(SpoolError::Removed(_))));
    let error = spool.append(b"three").unwrap_err();
    assert!(error.to_string().starts_with("cannot create "), "{error}");
}

#[test]
fn a_folder_that_is_away_is_read_once_it_is_back() {
    let root = TempDir::new().unwrap();
    let (mut spool, _) = open(&root, 1);
    let place = spool.append(b"one").unwrap();
    spool.sync().unwrap();
    let [folder, elsewhere] =
        [boot(1).to_string(), "away".to_owned()].map(|name| root.path().join(name));
    let away = |error: &SpoolError| matches!(error, SpoolError::Away(_)) && !error.is_lost();
    fs::rename(&folder, &elsewhere).unwrap();
    assert!(away(&spool.read(&place).unwrap_err()));
    fs::rename(&elsewhere, &folder).unwrap();
    assert_eq!(spool.read(&place).unwrap(), b"one");
    drop(spool);
    let (_, mut abandoned) = open(&root, 2);
    fs::rename(&folder, &elsewhere).unwrap();
    assert!(away(&abandoned[0].next_record().unwrap_err()));
    fs::rename(&elsewhere, &folder).unwrap();
    assert_eq!(payloads(&mut abandoned[0]), [b"one".to_vec()]);
    assert_eq!(abandoned[0].damage, Damage::default());
}

/// Without its lock it is no one's.
#[test]
fn a_folder_that_was_emptied_or_copied_takes_no_more() {
    let root = TempDir::new().unwrap();
    let (mut spool, _) = open(&root, 1);
    spool.append(b"one").unwrap();
    spool.sync().unwrap();
    let folder = root.path().join(boot(1).to_string());
    fs::remove_dir_all(&folder).unwrap();
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("lock"), b"").unwrap();
    spool.append(b"two").unwrap();
    assert!(matches!(spool.sync(), Err(SpoolError::Removed(_))));
    for _ in 0..2 {
        let error = spool.append(b"two").unwrap_err();
        assert!(matches!(error, SpoolError::Away(_)), "{error}");
    }
    assert!(segments(&root, 1).is_empty());
}

#[test]
fn what_is_written_behind_a_copy_is_not_safe() {
    let root = TempDir::new().unwrap();
    let (mut spool, _) = open(&root, 1);
    spool.append(b"one").unwrap();
    spool.sync().unwrap();
    let path = segments(&root, 1).remove(0);
    let bytes = fs::read(&path).unwrap();
    fs::remove_file(&path).unwrap();
    fs::write(&path, bytes).unwrap();
    spool.append(b"two").unwrap();
    assert!(matches!(spool.sync(), Err(SpoolError::Removed(_))));
}

#[test]
fn a_folder_that_is_copied_is_waited_for_until_it_is_whole() {
    let root = TempDir::new().unwrap();
    let (mut spool, _) = open(&root, 1);
    let places = [b"one", b"two"].map(|payload| spool.append(payload).unwrap());
    spool.sync().unwrap();
    let folder = root.path().join(boot(1).to_string());
    let path = segments(&root, 1).remove(0);
    let bytes = fs::read(&path).unwrap();
    let is_away = |spool: &Spool, place| {
        let read = spool.read(place);
        read.is_err_and(|error| matches!(error, SpoolError::Away(_)) && !error.is_lost())
    };
    fs::remove_dir_all(&folder).unwrap();
    assert!(is_away(&spool, &places[0]));
    fs::create_dir(&folder).unwrap();
    assert!(is_away(&spool, &places[0]));
    fs::write(folder.join("lock"), b"").unwrap();
    assert!(is_away(&spool, &places[0]));
    for cut in 0..bytes.len() {
        fs::write(&path, &bytes[..cut]).unwrap();
        assert!(is_away(&spool, &places[1]), "{cut}");
    }
    // As of a copy that makes room first.
    let mut half = bytes.clone();
    half[bytes.len() - 3..].fill(0);
    fs::write(&path, &half).unwrap();
    assert!(is_away(&spool, &places[1]));
    assert_eq!(spool.read(&places[0]).unwrap(), b"one");
    fs::write(&path, &bytes).unwrap();
    assert_eq!(spool.read(&places[1]).unwrap(), b"two");
    // Not for ever.
    fs::remove_dir_all(&folder).unwrap();
    assert!(is_away(&spool, &places[0]));
    let lost_at = spool.folder.lost_at.get().unwrap();
    assert!(lost_at > clock::mono());
    spool.folder.lost_at.set(Some(clock::mono()));
    assert!(spool.read(&places[0]).unwrap_err().is_lost());
}

#[test]
fn what_others_left_is_not_taken_for_all_while_it_is_copied() {
    let root = TempDir::new().unwrap();
    let (mut spool, _) = open(&root, 1);
    spool.append(b"one").unwrap();
    drop(spool);
    let (heir, mut abandoned) = open(&root, 2);
    let path = segments(&root, 1).remove(0);
    let bytes = fs::read(&path).unwrap();
    let folder = root.path().join(boot(1).to_string());
    fs::remove_dir_all(&folder).unwrap();
    fs::create_dir(&folder).unwrap();
    let away = |error: &SpoolError| matches!(error, SpoolError::Away(_));
    assert!(away(&abandoned[0].next_record().unwrap_err()));
    for length in HEAD.len()..bytes.len() {
        fs::write(&path, &bytes[..length]).unwrap();
        assert!(away(&abandoned[0].next_record().unwrap_err()), "{length}");
    }
    fs::write(&path, &bytes).unwrap();
    drop(abandoned);
    let mut again = heir.adopt().unwrap();
    assert_eq!(payloads(&mut again[0]), [b"one".to_vec()]);
    assert_eq!(again[0].damage, Damage::default());
}

#[test]
fn what_is_done_with_while_a_folder_is_away_is_deleted_once_it_is_back() {
    let root = TempDir::new().unwrap();
    let (mut spool, _) = open(&root, 1);
    spool.vouch().unwrap();
    let long = vec![7; 6 << 20];
    let [one, two, three] = [0; 3].map(|_| spool.append(&long).unwrap());
    spool.sync().unwrap();
    assert_eq!(segments(&root, 1).len(), 3);
    let [folder, elsewhere] =
        [boot(1).to_string(), "away".to_owned()].map(|name| root.path().join(name));
    fs::rename(&folder, &elsewhere).unwrap();
    spool.folder.lost_at.set(Some(Duration::ZERO));
    let error = spool.read(&three).unwrap_err();
    assert!(
        matches!(error, SpoolError::Away(_)),
        "it was moved: {error}"
    );
    spool.release(one).unwrap();
    assert!(spool.unvouch().is_err());
    fs::rename(&elsewhere, &folder).unwrap();
    assert_eq!(segments(&root, 1).len(), 3);
    spool.release(two).unwrap();
    assert_eq!(segments(&root, 1).len(), 1);
    spool.unvouch().unwrap();
    assert!(!folder.join("complete").exists());
    assert_eq!(spool.bytes(), 8 + 12 + (6 << 20));
    spool.release(three).unwrap();
}

#[test]
fn a_root_that_is_away_can_be_moved_back() {
    let parent = TempDir::new().unwrap();
    let [root, elsewhere] = ["spool", "away"].map(|name| parent.path().join(name));
    let (spool, _) = Spool::open(&root, MAX, boot(1)).unwrap();
    fs::rename(&root, &elsewhere).unwrap();
    assert!(spool.adopt().is_err());
    assert!(!root.exists());
    fs::rename(&elsewhere, &root).unwrap();
    assert!(spool.adopt().unwrap().is_empty());
}
