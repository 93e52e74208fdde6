//! The kernel's rules by which what comes in goes through weir, as a text for `nft`. Owns what is redirected and what is not; runs nothing.

use std::fmt::Write as _;
use std::ops::RangeInclusive;
use std::str::FromStr;

/// Takes the rules out; where there are none, it changes nothing. A table that is not there cannot be deleted, and so it is made first.
pub const REMOVE: &str = "table inet weir\ndelete table inet weir\n";

/// What is told of a redirection.
#[derive(Debug, Clone)]
pub struct Rules {
    /// The port of a transparent listener of weir's.
    pub to: u16,
    /// Whose connections are weir's own.
    pub uid: u32,
    /// What is not redirected.
    pub skipped: Ports,
}

/// Ports in ascending order, those that touch as one range.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ports(Vec<RangeInclusive<u16>>);

impl Rules {
    /// One transaction that puts the table in the place of any that was there before. The table itself is written as `nft list` writes it.
    ///
    /// What comes in and what the pod sends to its own addresses, which the kernel keeps on lo, go the same way. Such a connection is
    /// decided about in `output`, and seen again in `prerouting` on lo.
    pub fn transaction(&self) -> String {
        let Rules { to, uid, skipped } = self;
        let skipped = skipped.clone().with(*to);
        format!(
            "{REMOVE}table inet weir {{
\tchain prerouting {{
\t\ttype nat hook prerouting priority dstnat; policy accept;
\t\tiifname \"lo\" return comment \"output has decided\"
\t\tgoto inbound
\t}}

\tchain output {{
\t\ttype nat hook output priority -100; policy accept;
\t\tmeta skuid {uid} return comment \"weir itself\"
\t\toifname != \"lo\" return comment \"to elsewhere\"
\t\tip daddr 127.0.0.0/8 return
\t\tip6 daddr ::1 return
\t\tgoto inbound
\t}}

\tchain inbound {{
\t\ttcp dport {} return comment \"weir's own, and skipped\"
\t\tmeta l4proto tcp redirect to :{to}
\t}}
}}
",
            skipped.expression()
        )
    }
}

impl Ports {
    fn with(mut self, port: u16) -> Ports {
        self.0.push(port..=port);
        Ports::merged(self.0)
    }

    fn merged(mut ranges: Vec<RangeInclusive<u16>>) -> Ports {
        ranges.sort_by_key(|range| *range.start());
        let mut merged: Vec<RangeInclusive<u16>> = Vec::new();
        for range in ranges {
            match merged.last_mut() {
                Some(last) if *range.start() <= last.end().saturating_add(1) => {
                    *last = *last.start()..=*last.end().max(range.end());
                }
                Some(_) | None => merged.push(range),
            }
        }
        Ports(merged)
    }

    /// As nft has it: one alone, or a set.
    fn expression(&self) -> String {
        let mut listed = String::new();
        for range in &self.0 {
            let comma = if listed.is_empty() { "" } else { ", " };
            let _ = match range.start() == range.end() {
                true => write!(listed, "{comma}{}", range.start()),
                false => write!(listed, "{comma}{}-{}", range.start(), range.end()),
            };
        }
        match self.0.len() {
            1 => listed,
            _ => format!("{{ {listed} }}"),
        }
    }
}

/// Ports and ranges by commas, in any order; an empty text is none.
impl FromStr for Ports {
    type Err = String;

    fn from_str(text: &str) -> Result<Ports, String> {
        if text.trim().is_empty() {
            return Ok(Ports::default());
        }
        let ranges: Result<_, _> = text.split(',').map(|part| range(part.trim())).collect();
        ranges.map(Ports::merged)
    }
}

/// A number from 1 to 65535.
pub fn port(text: &str) -> Result<u16, String> {
    match text.parse() {
        Ok(0) | Err(_) => Err(format!(
            "{text:?} is no port: give a number from 1 to 65535"
        )),
        Ok(port) => Ok(port),
    }
}

fn range(text: &str) -> Result<RangeInclusive<u16>, String> {
    let Some((first, last)) = text.split_once('-') else {
        let port = port(text).map_err(|error| format!("{error}, or a range as in 9000-9010"))?;
        return Ok(port..=port);
    };
    let (first, last) = (port(first.trim())?, port(last.trim())?);
    if first > last {
        return Err(format!(
            "{text} ends before it begins: write {last}-{first}"
        ));
    }
    Ok(first..=last)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn skipped_ports_are_a_set_with_weir_s_own_in_order() {
        let check = |skipped: &str, expected| {
            let ports: Ports = skipped.parse().unwrap();
            assert_eq!(ports.with(9900).expression(), expected, "{skipped}");
        };
        check("", "9900");
        check("9900,9900", "9900");
        check("9902,9090,25", "{ 25, 9090, 9900, 9902 }");
        check(" 9000-9010, 25 ,25", "{ 25, 9000-9010, 9900 }");
        check("9010-9020,9000-9010,9021", "{ 9000-9021, 9900 }");
        check("9899,9901", "9899-9901");
        check("1-65535", "1-65535");
        check("65535,1", "{ 1, 9900, 65535 }");
    }

    #[test]
    fn what_is_no_port_is_told_with_the_mend() {
        let check = |skipped: &str, expected: &str| {
            let error = skipped.parse::<Ports>().unwrap_err();
            assert!(error.contains(expected), "{skipped}: {error}");
        };
        check("0", "\"0\" is no port: give a number from 1 to 65535, or a");
        check("65536", "\"65536\" is no port");
        check("http", "\"http\" is no port");
        check("80,,81", "\"\" is no port");
        check("80-", "\"\" is no port: give a number from 1 to 65535");
        check("0-10", "\"0\" is no port");
        check("90-80", "90-80 ends before it begins: write 80-90");
    }

    proptest! {
        #[test]
        fn merged_ranges_hold_the_same_ports(parts in prop::collection::vec((1..200u16, 0..20u16), 0..20), port in 1..250u16) {
            let ranges: Vec<_> = parts.iter().map(|(first, more)| *first..=first + more).collect();
            let Ports(merged) = Ports::merged(ranges.clone());
            let held = |ranges: &[RangeInclusive<u16>]| ranges.iter().any(|range| range.contains(&port));
            prop_assert_eq!(held(&ranges), held(&merged));
            let apart = merged.windows(2).all(|pair| pair[0].end() + 1 < *pair[1].start());
            prop_assert!(apart, "{:?}", merged);
        }
    }
}
