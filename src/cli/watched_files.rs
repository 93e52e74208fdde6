//! Files that are read again once they have changed: the configuration's, with those that its values bring in, and those of TLS. Owns when a
//! change is over. Must not know what is read.

use std::collections::BTreeMap;
use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::named_files;
use crate::config::Config;
use crate::net::tls::Secured;

/// How often files are looked at. Asked by their paths, so that it is seen when a symbolic link on the way is swapped,
/// as Kubernetes does with a ConfigMap; notifications of file systems miss that, and network mounts send none.
pub(super) const LOOK_EVERY: Duration = Duration::from_secs(1);

/// For how many looks a certificate may be gone: one that is replaced is for a moment, as is one whose symbolic link is swapped.
const GONE_FOR: u32 = 3;

/// How long ago a file is to be written before it is taken up: whoever wrote it may not be done.
const WRITTEN_AGO: Duration = Duration::from_secs(1);

/// For how many looks a file of any time is to be the same, so that one of the future is taken up.
const SAME_FOR: u32 = 3;

/// The configuration's file and those that its values bring in, as they were before they were read.
#[derive(Debug)]
pub(super) struct ConfigFiles {
    /// The configuration's own.
    pub(super) path: PathBuf,
    seen: Seen,
    /// What was found that is another, and by how many looks in a row.
    changing: Option<(Seen, u32)>,
}

type Seen = BTreeMap<PathBuf, Option<Fingerprint>>;

impl ConfigFiles {
    /// Those of the file at this path, as they are now.
    pub(super) fn of(path: PathBuf) -> ConfigFiles {
        // Before its text is read.
        let of_path = fingerprint(&path);
        let named = named_files(&path).into_iter();
        let named = named.map(|path| (path.clone(), fingerprint(&path)));
        ConfigFiles {
            seen: named.chain([(path.clone(), of_path)]).collect(),
            path,
            changing: None,
        }
    }

    /// Looks at them, `now` since the epoch: whether one is another than before, and nobody writes to it any more.
    pub(super) fn look(&mut self, now: Duration) -> bool {
        let paths = self.seen.keys();
        let found: Seen = paths
            .map(|path| (path.clone(), fingerprint(path)))
            .collect();
        // A path that leads nowhere for a moment is a swap on its way.
        if found == self.seen || found[&self.path].is_none() {
            self.changing = None;
            return false;
        }
        let looks = match self.changing.take() {
            Some((before, looks)) if before == found => looks + 1,
            Some(_) | None => 1,
        };
        let others = found.iter().filter(|(path, it)| self.seen[*path] != **it);
        let mut others = others.filter_map(|(_, it)| it.as_ref());
        let is_fresh = others.any(|it| it.modified() + WRITTEN_AGO >= now);
        self.changing = Some((found, looks));
        looks >= SAME_FOR || looks > 1 && !is_fresh
    }

    /// Whether one was another at the last look.
    pub(super) fn are_changing(&self) -> bool {
        self.changing.is_some()
    }
}

/// The files that configurations name for TLS, as they were before they were read.
#[derive(Debug, Default)]
pub(super) struct TlsFiles {
    seen: Seen,
    /// For how many looks one has been gone that was there.
    gone_for: u32,
}

impl TlsFiles {
    /// Those of `config`, as they are now.
    pub(super) fn of(config: &Config) -> TlsFiles {
        TlsFiles::at(Secured::files(config))
    }

    /// Those of the stores of `config` alone, likewise.
    pub(super) fn of_stores(config: &Config) -> TlsFiles {
        TlsFiles::at(Secured::files_of_stores(config))
    }

    /// Those at these paths, likewise.
    pub(super) fn at(paths: impl IntoIterator<Item = PathBuf>) -> TlsFiles {
        TlsFiles::default().go_on_with(paths)
    }

    /// These files, as they were seen last, so that what has changed since is seen; what was not looked at yet, as it is now. So is one that is gone,
    /// since what is about to be read lacks it.
    pub(super) fn go_on_with(&self, paths: impl IntoIterator<Item = PathBuf>) -> TlsFiles {
        let seen = paths.into_iter().map(|path| {
            let now = fingerprint(&path);
            let seen = now.and_then(|now| self.seen.get(&path).cloned().unwrap_or(Some(now)));
            (path, seen)
        });
        TlsFiles {
            seen: seen.collect(),
            gone_for: self.gone_for,
        }
    }

    /// Looks at them: whether one is another than before, or gone for good. While one is gone for a moment the others wait for it.
    pub(super) fn look(&mut self) -> bool {
        let now = self.seen.keys();
        let now: BTreeMap<_, _> = now.map(|path| (path.clone(), fingerprint(path))).collect();
        let mut both = self.seen.values().zip(now.values());
        let is_gone = both.any(|(seen, now)| seen.is_some() && now.is_none());
        self.gone_for = match is_gone {
            true => self.gone_for + 1,
            false => 0,
        };
        if (1..GONE_FOR).contains(&self.gone_for) || now == self.seen {
            return false;
        }
        self.seen = now;
        true
    }
}

/// What differs when a file was written or replaced.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Fingerprint {
    device: u64,
    inode: u64,
    size: u64,
    /// Seconds and nanoseconds.
    modified: (i64, i64),
}

impl Fingerprint {
    /// Since the epoch.
    fn modified(&self) -> Duration {
        let (seconds, nanos) = self.modified;
        Duration::new(
            u64::try_from(seconds).unwrap_or_default(),
            u32::try_from(nanos).unwrap_or_default(),
        )
    }
}

/// The file's that the path leads to now; `None` for one that cannot be seen, and for a pipe, which is no other file when someone writes to it.
fn fingerprint(path: &Path) -> Option<Fingerprint> {
    let of = |file: Metadata| Fingerprint {
        device: file.dev(),
        inode: file.ino(),
        size: file.size(),
        modified: (file.mtime(), file.mtime_nsec()),
    };
    fs::metadata(path).ok().filter(Metadata::is_file).map(of)
}

#[cfg(test)]
pub(super) mod tests {
    use std::fs::File;
    use std::time::UNIX_EPOCH;

    use super::*;
    use crate::clock;

    pub(in crate::cli) const SECOND: Duration = Duration::from_secs(1);

    /// Writes the file, as of `modified` since the epoch.
    pub(in crate::cli) fn write(path: &Path, text: &str, modified: Duration) {
        fs::write(path, text).unwrap();
        let file = File::options().write(true).open(path).unwrap();
        file.set_modified(UNIX_EPOCH + modified).unwrap();
    }

    #[test]
    fn a_change_is_taken_once_it_is_over() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weir.yaml");
        let (then, day) = (clock::wall(), 86_400 * SECOND);
        for modified in [then, then + day, then - day] {
            write(&path, "a", then - day - SECOND);
            let mut files = ConfigFiles::of(path.clone());
            assert!(!files.look(then) && !files.are_changing());
            write(&path, "ab", modified);
            assert!(!files.look(then) && files.are_changing());
            write(&path, "abc", modified);
            assert!(!files.look(then + SECOND));
            let looks = (2..).map(|n| files.look(then + n * SECOND));
            let waited = looks.take_while(|is_taken| !is_taken).count();
            assert_eq!(waited, usize::from(modified > then), "{modified:?}");
        }
    }

    #[test]
    fn what_is_as_before_again_or_gone_is_no_change() {
        let folder = tempfile::tempdir().unwrap();
        let [path, aside] = ["weir.yaml", "aside"].map(|name| folder.path().join(name));
        let now = clock::wall();
        write(&path, "a", now - 9 * SECOND);
        let mut files = ConfigFiles::of(path.clone());
        fs::rename(&path, &aside).unwrap();
        assert!([(); 5].iter().all(|()| !files.look(now)));
        assert!(!files.are_changing());
        fs::rename(&aside, &path).unwrap();
        assert!(!files.look(now));
    }

    /// It is another by its times once someone has written to it, and can be read once.
    #[test]
    fn a_pipe_never_changes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weir.yaml");
        let made = std::process::Command::new("mkfifo").arg(&path).status();
        assert!(made.unwrap().success());
        let now = clock::wall();
        let mut files = ConfigFiles::of(path.clone());
        // Who opens it for both waits for nobody.
        let pipe = File::options().read(true).write(true).open(&path).unwrap();
        pipe.set_modified(UNIX_EPOCH + now - 9 * SECOND).unwrap();
        assert!([(); 5].iter().all(|()| !files.look(now)));
        assert!(!files.are_changing());
    }

    #[test]
    fn files_that_values_bring_in_are_looked_at() {
        let folder = tempfile::tempdir().unwrap();
        let [path, secret] = ["weir.yaml", "secret"].map(|name| folder.path().join(name));
        let text = format!(
            "a: [{{b: 'x${{file:{}}}'}}, '$${{file:/c}}']",
            secret.display()
        );
        let now = clock::wall();
        write(&path, &text, now - 9 * SECOND);
        let mut files = ConfigFiles::of(path.clone());
        assert_eq!(files.seen.keys().collect::<Vec<_>>(), [&secret, &path]);
        assert!(!files.look(now));
        write(&secret, "s", now - 9 * SECOND);
        assert!(!files.look(now) && files.look(now));
        // As any of a Kubernetes volume that is replaced whole.
        files = ConfigFiles::of(path);
        fs::remove_file(&secret).unwrap();
        assert!(!files.look(now) && files.look(now));
    }
}
