//! The rules by which the kernel hands what comes into a pod to weir: text for `nft -f`, which applies it as a whole or not at all.

use std::collections::BTreeSet;
use std::fmt::{self, Write as _};
use std::num::NonZeroU16;

/// Takes the rules out, whether they are there or not: `delete` alone fails where they are not.
pub const REMOVE: &str = "table inet weir\ndelete table inet weir\n";

/// What is redirected where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    /// weir's transparent listener.
    pub to: NonZeroU16,
    /// Whom weir runs as.
    pub uid: u32,
    /// Ports that keep what comes to them.
    pub skip: BTreeSet<u16>,
}

impl fmt::Display for Rules {
    /// One transaction, which replaces what was there: applied twice it is there once.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Rules { to, uid, skip } = self;
        let mut kept = to.to_string();
        for port in skip.iter().filter(|port| **port != to.get()) {
            write!(kept, ", {port}")?;
        }
        write!(
            f,
            "{REMOVE}\
             table inet weir {{
\tchain prerouting {{
\t\ttype nat hook prerouting priority -100; policy accept;
\t\tiifname \"lo\" return
\t\ttcp dport {{ {kept} }} return
\t\tmeta l4proto tcp redirect to :{to}
\t}}

\tchain output {{
\t\ttype nat hook output priority -100; policy accept;
\t\tmeta skuid {uid} return
\t\tip daddr 127.0.0.0/8 return
\t\tip6 daddr ::1 return
\t\ttcp dport {{ {kept} }} return
\t\toifname \"lo\" meta l4proto tcp redirect to :{to}
\t}}
}}
"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weirs_own_port_is_kept_once() {
        let rules = Rules {
            to: NonZeroU16::new(9900).unwrap(),
            uid: 65532,
            skip: BTreeSet::from([9902, 25, 9900]),
        };
        let text = rules.to_string();
        assert!(text.starts_with(REMOVE));
        assert_eq!(
            text.matches("tcp dport { 9900, 25, 9902 } return\n")
                .count(),
            2
        );
        assert_eq!(text.matches("redirect to :9900\n").count(), 2);
        assert!(text.contains("meta skuid 65532 return\n"));
    }
}
