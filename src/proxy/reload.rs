//! When the file is read again: on SIGHUP, and when the file at its path is another than before. A bad file changes
//! nothing.

use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};
use tracing::{error, info};

use crate::config::Config;
use crate::plan::Plan;

/// How often the file is looked at. Asked by its path, so that it is seen when a symbolic link on the way is swapped,
/// as Kubernetes does with a ConfigMap; notifications of file systems miss that, and network mounts send none.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Follows the file for ever.
pub async fn follow(
    path: PathBuf,
    load: impl Fn(&Path) -> anyhow::Result<Config>,
    plan: watch::Sender<Arc<Plan>>,
) -> std::io::Result<()> {
    let mut hangup = signal(SignalKind::hangup())?;
    let mut look = interval(LOOK_EVERY);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut seen = fingerprint(&path);
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
fn fingerprint(path: &Path) -> Option<(u64, u64, u64, i64, i64)> {
    let of = |file: Metadata| {
        (
            file.dev(),
            file.ino(),
            file.size(),
            file.mtime(),
            file.mtime_nsec(),
        )
    };
    fs::metadata(path).ok().map(of)
}
