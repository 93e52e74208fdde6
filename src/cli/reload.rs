//! When the file is read again: on SIGHUP, and when the file at its path, or one that a value brings in, is another than before; likewise
//! the certificates that it names, by a process without lanes those of stores alone. A bad file changes nothing, and a bad certificate
//! no other. Must not know what a plan holds.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::fs::{self, Metadata};
use std::io;
use std::mem::replace;
use std::os::unix::fs::MetadataExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use rustix::io::Errno;
use tokio::signal::unix::Signal;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};
use tracing::{error, info, warn};

use super::named_files;
use crate::clock;
use crate::config::Config;
use crate::net::tls::Secured;
use crate::plan::Plan;
use crate::telemetry::log;
use crate::upstream::names::first_look;

/// How often the file is looked at. Asked by its path, so that it is seen when a symbolic link on the way is swapped,
/// as Kubernetes does with a ConfigMap; notifications of file systems miss that, and network mounts send none.
pub(super) const LOOK_EVERY: Duration = Duration::from_secs(1);

/// For how many looks a certificate may be gone: one that is replaced is for a moment, as is one whose symbolic link is swapped.
const GONE_FOR: u32 = 3;

/// For the names of endpoints to be looked up before the first request goes to them.
pub(super) const NAMES_WITHIN: Duration = Duration::from_secs(2);

/// How long ago a file is to be written before it is taken up: whoever wrote it may not be done.
const WRITTEN_AGO: Duration = Duration::from_secs(1);

/// For how many looks a file of any time is to be the same, so that one of the future is taken up.
const SAME_FOR: u32 = 3;

/// Reads the file again on each change, for ever; `hangup` is SIGHUP. `files` and `tls_files` are as they were before they were read, so that
/// no change since then is missed.
pub(super) async fn on_change(
    files: ConfigFiles,
    tls_files: TlsFiles,
    load: impl Fn(&Path) -> anyhow::Result<Config>,
    plan: watch::Sender<Arc<Plan>>,
    mut hangup: Signal,
) -> Infallible {
    let mut look = interval(LOOK_EVERY);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut reloads = Reloads {
        files,
        tls_files,
        load,
        plan,
        refused: false,
        starved: false,
        replaced_plans: Vec::new(),
    };
    loop {
        let asked_or_changed = tokio::select! {
            _ = hangup.recv() => {
                // Who asks is told, whatever was told before.
                reloads.starved = false;
                true
            }
            _ = look.tick() => {
                reloads.files.look(clock::wall()) || (reloads.starved && !reloads.files.are_changing())
            }
        };
        // A plan takes effect whole, and files are watched on. A panic in what is read is told as a mistake in it: this is of what else there is.
        let done = AssertUnwindSafe(reloads.go_on(asked_or_changed)).catch_unwind();
        if done.await.is_err() {
            reloads.note_panic();
        }
    }
}

/// What goes from one reload to the next.
struct Reloads<L> {
    files: ConfigFiles,
    tls_files: TlsFiles,
    load: L,
    plan: watch::Sender<Arc<Plan>>,
    /// Whether the file was, when it was read last.
    refused: bool,
    /// Whether a file could not be read then since the process has as many open as it may. It is tried again with each look, and told once.
    starved: bool,
    /// Freed here, once no lane goes by them: of a large one that is the work of many milliseconds, which a lane would miss.
    replaced_plans: Vec<Arc<Plan>>,
}

impl<L: Fn(&Path) -> anyhow::Result<Config>> Reloads<L> {
    /// Reads what is asked for or has changed.
    async fn go_on(&mut self, asked_or_changed: bool) {
        self.replaced_plans.retain(|old| Arc::strong_count(old) > 1);
        let certificates_changed = self.tls_files.look();
        if !asked_or_changed && !certificates_changed {
            return;
        }
        // What was refused may be as it should be now.
        let reads_file = asked_or_changed || (self.refused && !self.files.are_changing());
        let loaded = reads_file.then(|| {
            self.files = ConfigFiles::of(self.files.path.clone());
            let load = || (self.load)(&self.files.path).map_err(|error| format!("{error:#}"));
            self.unless_it_panics(load)
        });
        // Those of the running configuration too: it may stay.
        let mut named = Secured::files(&self.plan.borrow().config);
        named.extend(loaded.iter().flatten().flat_map(Secured::files));
        self.tls_files = self.tls_files.go_on_with(named);
        let Some(loaded) = loaded else {
            let wrong = self.renew().await;
            self.starved = wrong.iter().any(|error| lacks_files(error));
            self.plan.borrow().metrics.reloads.note(wrong.is_empty());
            tell(&wrong);
            return;
        };
        let replaced = loaded
            .and_then(|config| self.unless_it_panics(|| replaced_by(&self.plan.borrow(), config)));
        let was_refused = self.refused;
        self.refused = replaced.is_err();
        let is_starved = replaced.as_ref().is_err_and(|error| lacks_files(error));
        let was_starved = replace(&mut self.starved, is_starved);
        match replaced {
            Ok(new) => {
                let is_as_before = {
                    let old = self.plan.borrow();
                    let is_config = !was_refused && new.config == old.config;
                    is_config && !certificates_changed && new.secured.believes_as(&old.secured)
                };
                self.go_on_with(new).await;
                self.plan.borrow().metrics.reloads.note(true);
                let said = match is_as_before {
                    true => "configuration read again: nothing changed",
                    false => "configuration reloaded",
                };
                info!(file = %self.files.path.display(), "{said}");
            }
            // Told when it began.
            Err(_) if is_starved && was_starved => {}
            Err(error) => {
                self.plan.borrow().metrics.reloads.note(false);
                let file = self.files.path.display();
                error!(%file, %error, "configuration not reloaded, the old one stays");
                if certificates_changed {
                    // A new certificate does not wait until a file that is refused is mended.
                    tell(&self.renew().await);
                }
            }
        }
    }

    /// Goes on by the running configuration with what its files hold now; what of them cannot be used.
    async fn renew(&mut self) -> Vec<String> {
        let (replaced, mut wrong) = {
            let old = self.plan.borrow();
            let (secured, wrong) = old.secured.renewed(&old.config);
            (old.replaced_by(old.config.clone(), secured), wrong)
        };
        match replaced {
            Ok(new) => self.go_on_with(new).await,
            Err(error) => wrong.push(error),
        }
        wrong
    }

    async fn go_on_with(&mut self, new: Arc<Plan>) {
        first_look(new.live_upstreams(), NAMES_WITHIN).await;
        let old = new.publish(&self.plan);
        // Whatever becomes of the rest.
        self.replaced_plans.push(old.clone());
        let new = self.plan.borrow();
        if new.config.log.level != old.config.log.level {
            log::set_level(new.config.log.level);
        }
        forget_removed(&old, &new);
        warn_of_dates(&new.secured);
    }

    /// What weir itself is at fault for refuses the file as a mistake in it does.
    fn unless_it_panics<T>(&self, read: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
        catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(|_| {
            self.plan.borrow().metrics.tasks.panics.inc();
            Err("weir panicked, which is a mistake of its own".to_owned())
        })
    }

    /// It is not known how far it came. The file is read again with the next change, be it of a certificate.
    fn note_panic(&mut self) {
        self.refused = true;
        let plan = self.plan.borrow();
        plan.metrics.tasks.panics.inc();
        plan.metrics.reloads.note(false);
        error!(
            "weir panicked while it read files again, which is a mistake of its own: it goes on by what had taken effect"
        );
    }
}

/// Whether this is told of a file that could not be opened since too many are.
fn lacks_files(error: &str) -> bool {
    let lacks = |errno: Errno| error.contains(&io::Error::from(errno).to_string());
    lacks(Errno::MFILE) || lacks(Errno::NFILE)
}

/// Of a renewal, with what was wrong.
fn tell(wrong: &[String]) {
    for error in wrong {
        error!(%error, "certificates not reloaded, those before stay");
    }
    match wrong.is_empty() {
        true => info!("certificates reloaded"),
        false => info!("all other certificates reloaded"),
    }
}

/// Reads the files of the stores of `plan` alone again on each change, for ever: for a process that serves no requests, and has no other
/// TLS. `tls_files` is of them, from before they were read.
pub(super) async fn stores_on_change(plan: Arc<Plan>, mut tls_files: TlsFiles) -> Infallible {
    let mut secured = plan.secured.clone();
    let mut look = interval(LOOK_EVERY);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // As with those of lanes.
    let mut starved = false;
    loop {
        look.tick().await;
        if !tls_files.look() && !starved {
            continue;
        }
        let (renewed, wrong) = secured.renewed(&plan.config);
        secured = renewed;
        secured.take_effect();
        plan.metrics
            .tls
            .certificates
            .note_lifetimes(secured.certificates());
        let is_starved = wrong.iter().any(|error| lacks_files(error));
        let other = |error: &String| !lacks_files(error);
        if replace(&mut starved, is_starved) && is_starved && !wrong.iter().any(other) {
            continue;
        }
        plan.metrics.reloads.note(wrong.is_empty());
        tell(&wrong);
        warn_of_dates(&secured);
    }
}

/// The plan of `config` in place of `old`, with what its files hold now.
fn replaced_by(old: &Plan, config: Config) -> Result<Arc<Plan>, String> {
    let secured = Secured::read(&config, &old.secured)?;
    old.replaced_by(config, secured)
}

/// Says which certificates that are shown do not hold now; the alerts go by metrics.
pub(super) fn warn_of_dates(secured: &Secured) {
    for (file, said) in secured.out_of_date(clock::wall()) {
        warn!(%file, "{said}");
    }
}

/// No alert is to go by how an upstream, or an entry of sessions, last was that is there no more.
fn forget_removed(old: &Plan, new: &Plan) {
    let stays: BTreeSet<_> = new.config.upstreams.iter().map(|it| &it.name).collect();
    let gone = old.config.upstreams.iter().map(|it| &it.name);
    for upstream in gone.filter(|name| !stays.contains(name)) {
        new.metrics.upstreams.forget(upstream);
    }
    let stays: BTreeSet<_> = new.config.sessions.iter().map(|it| &it.name).collect();
    let gone = old.config.sessions.iter().map(|it| &it.name);
    for entry in gone.filter(|name| !stays.contains(name)) {
        new.metrics.sessions.forget(entry);
    }
}

/// The configuration's file and those that its values bring in, as they were before they were read.
#[derive(Debug)]
pub(super) struct ConfigFiles {
    path: PathBuf,
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
    fn look(&mut self, now: Duration) -> bool {
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
    fn are_changing(&self) -> bool {
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
    fn go_on_with(&self, paths: impl IntoIterator<Item = PathBuf>) -> TlsFiles {
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

/// The file's that the path leads to now; `None` for one that cannot be seen.
fn fingerprint(path: &Path) -> Option<Fingerprint> {
    let of = |file: Metadata| Fingerprint {
        device: file.dev(),
        inode: file.ino(),
        size: file.size(),
        modified: (file.mtime(), file.mtime_nsec()),
    };
    fs::metadata(path).ok().map(of)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::time::UNIX_EPOCH;

    use tokio::signal::unix::{SignalKind, signal};
    use tokio::time::{sleep, timeout};

    use super::*;
    use crate::config::check;
    use crate::plan::Process;

    const SECOND: Duration = Duration::from_secs(1);

    /// Writes the file, as of `modified` since the epoch.
    fn write(path: &Path, text: &str, modified: Duration) {
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

    fn parse(text: &str) -> anyhow::Result<Config> {
        let config = check::parse(text, &|_| None);
        config.map_err(|mistakes| anyhow::anyhow!("{mistakes:?}"))
    }

    fn upstream_at(url: &str) -> String {
        format!("listen: 127.0.0.1:1\nupstream: {url}\n")
    }

    /// Else the process would end for what it may never have been asked to take.
    #[tokio::test(start_paused = true)]
    async fn a_panic_refuses_the_file_and_no_later_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weir.yaml");
        let [old, bad, good] = [
            "http://127.0.0.1:1",
            "http://127.0.0.1:2",
            "http://127.0.0.1:3",
        ]
        .map(upstream_at);
        let written = clock::wall() - 9 * SECOND;
        write(&path, &old, written);
        let files = ConfigFiles::of(path.clone());
        let plan = Plan::first(parse(&old).unwrap(), Secured::default(), Process::default());
        let metrics = plan.metrics.clone();
        let (plan, mut lane) = watch::channel(plan);
        let reloads = on_change(
            files,
            TlsFiles::default(),
            |path| {
                let text = fs::read_to_string(path)?;
                assert_ne!(text, bad, "a panic that is meant");
                parse(&text)
            },
            plan,
            signal(SignalKind::hangup()).unwrap(),
        );
        let follows = async {
            write(&path, &bad, written - SECOND);
            sleep(5 * LOOK_EVERY).await;
            assert!(!lane.has_changed().unwrap());
            let text = metrics.text();
            for told in [
                "weir_panics_total 1\n",
                "weir_config_reloads_total{result=\"refused\"} 1\n",
                "weir_config_last_reload_successful 0\n",
            ] {
                assert!(text.contains(told), "{told} {text}");
            }
            write(&path, &good, written - 2 * SECOND);
            lane.changed().await.unwrap();
            assert_eq!(lane.borrow().config, parse(&good).unwrap());
        };
        tokio::select! {
            () = follows => {}
            never = reloads => match never {},
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_panic_by_the_file_holds_up_no_certificate() {
        let folder = tempfile::tempdir().unwrap();
        let [path, ca] = ["weir.yaml", "ca.pem"].map(|name| folder.path().join(name));
        let old = format!(
            "listen: 127.0.0.1:1\nupstreams: {{app: {{endpoints: 'https://127.0.0.1:1', tls: {{ca: {}}}}}}}\nroutes: [{{upstream: app}}]\n",
            ca.display()
        );
        let written = clock::wall() - 9 * SECOND;
        write(&path, &old, written);
        write(&ca, "", written);
        let config = parse(&old).unwrap();
        let (files, tls_files) = (ConfigFiles::of(path.clone()), TlsFiles::of(&config));
        let plan = Plan::first(config.clone(), Secured::default(), Process::default());
        let metrics = plan.metrics.clone();
        let (plan, mut lane) = watch::channel(plan);
        let reloads = on_change(
            files,
            tls_files,
            |path| {
                let text = fs::read_to_string(path)?;
                assert_ne!(text, "bad", "a panic that is meant");
                parse(&text)
            },
            plan,
            signal(SignalKind::hangup()).unwrap(),
        );
        let follows = async {
            write(&path, "bad", written - SECOND);
            sleep(5 * LOOK_EVERY).await;
            assert!(!lane.has_changed().unwrap());
            // What it holds goes for nothing here: it is read for a plan that takes effect.
            for n in 1..=2 {
                write(&ca, "", written - n * SECOND);
                let renewed = timeout(5 * LOOK_EVERY, lane.changed()).await;
                renewed.expect("the certificates are renewed").unwrap();
                assert_eq!(lane.borrow_and_update().config, config);
                let text = metrics.text();
                // The file is read with each: it may be as it should be now.
                assert!(
                    text.contains(&format!("weir_panics_total {}\n", n + 1)),
                    "{text}"
                );
                assert!(
                    text.contains("weir_config_last_reload_successful 0\n"),
                    "{text}"
                );
            }
        };
        tokio::select! {
            () = follows => {}
            never = reloads => match never {},
        }
    }

    /// A lane that still goes by a plan may be the last, and to free a large one is the work of many milliseconds.
    #[tokio::test(start_paused = true)]
    async fn no_lane_frees_a_plan() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weir.yaml");
        let [old, new] = ["http://127.0.0.1:1", "http://127.0.0.1:2"].map(upstream_at);
        let written = clock::wall() - 9 * SECOND;
        write(&path, &old, written);
        let files = ConfigFiles::of(path.clone());
        write(&path, &new, written - SECOND);
        let plan = Plan::first(parse(&old).unwrap(), Secured::default(), Process::default());
        let (plan, mut lane) = watch::channel(plan);
        let reloads = on_change(
            files,
            TlsFiles::default(),
            |path| parse(&fs::read_to_string(path)?),
            plan,
            signal(SignalKind::hangup()).unwrap(),
        );
        let of_lane = lane.borrow().clone();
        let left = Arc::downgrade(&of_lane);
        let follows = async {
            lane.changed().await.unwrap();
            sleep(3 * LOOK_EVERY).await;
            drop(of_lane);
            assert_eq!(left.strong_count(), 1);
            sleep(2 * LOOK_EVERY).await;
            assert_eq!(left.strong_count(), 0);
        };
        tokio::select! {
            () = follows => {}
            never = reloads => match never {},
        }
    }
}
