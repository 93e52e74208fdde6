//! What the process does for itself, checked: by what it refuses requests while it is overloaded.

use std::time::Duration;

/// When requests are refused since the process has more to do than it can.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Shed {
    /// How long a lane may be behind; `None`: for ever.
    pub loop_delay: Option<Duration>,
    pub memory: Option<MemoryBound>,
}

/// What the process may use of memory before requests are refused.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum MemoryBound {
    /// Of what the control group allows; from 0 to 1.
    Share(f64),
    Bytes(u64),
}
