//! Reads the file again on SIGHUP and once it, or one that a value brings in, has changed; likewise the certificates that it names, by a
//! process without lanes those of stores alone. A bad file changes nothing, and a bad certificate no other. Must not know what a plan holds.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::io;
use std::mem::replace;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use rustix::io::Errno;
use tokio::signal::unix::Signal;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};
use tracing::{error, info, warn};

use super::watched_files::{ConfigFiles, LOOK_EVERY, TlsFiles};
use crate::clock;
use crate::config::Config;
use crate::net::tls::Secured;
use crate::plan::Plan;
use crate::telemetry::log;
use crate::upstream::names::first_look;

/// For the names of endpoints to be looked up before the first request goes to them.
pub(super) const NAMES_WITHIN: Duration = Duration::from_secs(2);

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

#[cfg(test)]
mod tests {
    use std::fs;

    use tokio::signal::unix::{SignalKind, signal};
    use tokio::time::{sleep, timeout};

    use super::super::watched_files::tests::{SECOND, write};
    use super::*;
    use crate::config::check;
    use crate::plan::Process;

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
