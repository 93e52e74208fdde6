//! When the file is read again: on SIGHUP, and when the file at its path is another than before; likewise the certificates that
//! it names. A bad file changes nothing.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::Signal;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};
use tracing::{error, info};

use crate::config::Config;
use crate::net::tls::Secured;
use crate::plan::Plan;
use crate::upstream::names::first_look;

/// How often the file is looked at. Asked by its path, so that it is seen when a symbolic link on the way is swapped,
/// as Kubernetes does with a ConfigMap; notifications of file systems miss that, and network mounts send none.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// For the names of endpoints to be looked up before the first request goes to them.
pub const NAMES_WITHIN: Duration = Duration::from_secs(2);

/// Follows the file for ever; `hangup` is SIGHUP. `seen` is its [`fingerprint`] from before it was read, so that a change since then is not
/// missed.
pub async fn follow(
    path: PathBuf,
    mut seen: Option<Fingerprint>,
    load: impl Fn(&Path) -> anyhow::Result<Config>,
    plan: watch::Sender<Arc<Plan>>,
    mut hangup: Signal,
) -> Infallible {
    let mut look = interval(LOOK_EVERY);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut beside = Beside::of(&plan.borrow().config);
    let mut refused = false;
    loop {
        let file_changed = tokio::select! {
            _ = hangup.recv() => true,
            _ = look.tick() => {
                // A path that leads nowhere for a moment is a swap on its way.
                let now = fingerprint(&path);
                now.is_some() && now != seen
            }
        };
        if !file_changed && !beside.has_changed() {
            continue;
        }
        // A new certificate is not to wait for a mistake that has come into the file since.
        let reads_file = file_changed || refused;
        let loaded = match reads_file {
            true => {
                seen = fingerprint(&path);
                load(&path).map_err(|error| format!("{error:#}"))
            }
            false => Ok(plan.borrow().config.clone()),
        };
        beside = match &loaded {
            Ok(config) => Beside::of(config),
            Err(_) => beside.again(),
        };
        let replaced = loaded.and_then(|config| {
            let old = plan.borrow();
            let secured = Secured::read(&config, &old.secured)?;
            old.replaced_by_secured(config, secured)
        });
        refused = replaced.is_err();
        let what = match reads_file {
            true => "configuration",
            false => "certificates",
        };
        match replaced {
            Ok(new) => {
                first_look(&new.upstreams, NAMES_WITHIN).await;
                new.metrics.reloaded(true);
                let old = plan.send_replace(new);
                forget_removed(&old, &plan.borrow());
                info!(file = %path.display(), "{what} reloaded");
            }
            Err(error) => {
                plan.borrow().metrics.reloaded(false);
                error!(file = %path.display(), %error, "{what} not reloaded, the old one stays")
            }
        }
    }
}

/// No alert is to go by how an upstream last was that is there no more.
fn forget_removed(old: &Plan, new: &Plan) {
    let stays: BTreeSet<_> = new.config.upstreams.iter().map(|up| &up.name).collect();
    let gone = old.config.upstreams.iter().map(|up| &up.name);
    for upstream in gone.filter(|name| !stays.contains(name)) {
        new.metrics.forget_upstream(upstream);
    }
}

/// The files that a configuration names for TLS, as they were before they were read.
struct Beside {
    files: Vec<PathBuf>,
    seen: Vec<Option<Fingerprint>>,
}

impl Beside {
    fn of(config: &Config) -> Beside {
        let files = Secured::files(config);
        let seen = files.iter().map(|path| fingerprint(path)).collect();
        Beside { files, seen }
    }

    /// The same files, as they are now.
    fn again(self) -> Beside {
        let seen = self.files.iter().map(|path| fingerprint(path)).collect();
        Beside { seen, ..self }
    }

    /// Whether a file is another than before; not while one leads nowhere.
    fn has_changed(&self) -> bool {
        let now = self.files.iter().map(|path| fingerprint(path));
        let now: Option<Vec<_>> = now.collect();
        now.is_some_and(|now| !now.iter().eq(self.seen.iter().flatten()))
    }
}

/// What differs when a file was written or replaced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fingerprint {
    device: u64,
    inode: u64,
    size: u64,
    /// Seconds and nanoseconds.
    modified: (i64, i64),
}

/// The file's that the path leads to now; `None` for one that cannot be seen.
pub fn fingerprint(path: &Path) -> Option<Fingerprint> {
    let of = |file: Metadata| Fingerprint {
        device: file.dev(),
        inode: file.ino(),
        size: file.size(),
        modified: (file.mtime(), file.mtime_nsec()),
    };
    fs::metadata(path).ok().map(of)
}
