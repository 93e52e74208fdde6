//! When the file is read again: on SIGHUP, and when the file at its path is another than before. A bad file changes
//! nothing.

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
use crate::plan::Plan;

/// How often the file is looked at. Asked by its path, so that it is seen when a symbolic link on the way is swapped,
/// as Kubernetes does with a ConfigMap; notifications of file systems miss that, and network mounts send none.
const LOOK_EVERY: Duration = Duration::from_secs(1);

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
    loop {
        tokio::select! {
            _ = hangup.recv() => {}
            _ = look.tick() => {
                // A path that leads nowhere for a moment is a swap on its way.
                let now = fingerprint(&path);
                if now.is_none() || now == seen {
                    continue;
                }
            }
        }
        seen = fingerprint(&path);
        let loaded = load(&path).map_err(|error| format!("{error:#}"));
        match loaded.and_then(|config| plan.borrow().replaced_by(config)) {
            Ok(new) => {
                new.metrics.reload("loaded").inc();
                plan.send_replace(new);
                info!(file = %path.display(), "configuration reloaded");
            }
            Err(error) => {
                plan.borrow().metrics.reload("refused").inc();
                error!(file = %path.display(), %error, "configuration not reloaded, the old one stays")
            }
        }
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
