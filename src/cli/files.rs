//! How many files a process may have open: raised at the start, and warned of where connections could come to more; and that one which may not grow
//! ends no process.

use std::io;

use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use tracing::warn;

use crate::config::Config;

/// Raises the bound as far as may be: the soft one is low for the sake of programs that use select(2), which weir is not.
pub(super) fn raise() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: maximum,
        maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        warn!(%error, "the bound on open files cannot be raised to the hard one");
    }
}

/// Has what may not grow any more (RLIMIT_FSIZE) fail to be written, as on a full disk, where the kernel would end the process.
pub(super) fn outlive_long_ones() -> io::Result<()> {
    // Its handler stays.
    signal(SignalKind::from_raw(Signal::XFSZ.as_raw())).map(drop)
}

/// Warns where the listeners' connections need more.
pub(super) fn warn_of_few(config: &Config) {
    // One for the client, one for the upstream.
    let needed = config
        .listeners
        .iter()
        .map(|listener| 2 * listener.max_connections as u64)
        .sum::<u64>();
    if let Some(most) = getrlimit(Resource::Nofile)
        .current
        .filter(|most| *most < needed)
    {
        warn!(
            most,
            needed,
            "fewer files may be open than connections of listeners need, two for each: raise the hard limit (ulimit -Hn, LimitNOFILE), or lower limits.max_connections"
        );
    }
}
