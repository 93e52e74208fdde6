//! What the service manager that started weir is told, where it asks to be (sd_notify(3), systemd's `Type=notify`): that weir serves, and
//! that it begins to end. Must not know when that is.

use sd_notify::NotifyState;
use tracing::warn;

/// Units that are ordered behind weir's may begin.
pub(super) fn ready() {
    tell(NotifyState::Ready);
}

pub(super) fn stopping() {
    tell(NotifyState::Stopping);
}

/// A manager that cannot be told changes nothing of what weir does.
fn tell(state: NotifyState<'_>) {
    let text = state.to_string();
    if let Err(error) = sd_notify::notify(&[state]) {
        warn!(%error, "the service manager cannot be told {text} (NOTIFY_SOCKET)");
    }
}
