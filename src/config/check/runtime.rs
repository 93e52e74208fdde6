//! What the process does for itself, from the file as written to [`Shed`].

use std::num::NonZeroUsize;
use std::time::Duration;

use super::Checker;
use crate::config::raw::{self, Lanes};
use crate::config::runtime::{MemoryBound, Shed};
use crate::config::units::{ByteSize, Percent};
use crate::config::yaml::At;

/// The shares of memory that may be named: more leaves no room for what is on its way.
const MOST: f64 = 0.95;

/// Each is a thread with sockets of its own: more are hardly meant, and no machine has so many cores.
const MOST_LANES: NonZeroUsize = NonZeroUsize::new(4096).expect("it is not zero");

impl Checker {
    /// Threads, `None` for one a core; and when requests are refused.
    pub(super) fn runtime(&mut self, raw: raw::Runtime) -> (Option<NonZeroUsize>, Shed) {
        let lanes = raw.lanes.and_then(|at| match at.value? {
            Lanes::Count(count) => {
                if count > MOST_LANES {
                    let message = format!(
                        "{count} is out of bounds: use 1 to {MOST_LANES}, or auto for one a core"
                    );
                    self.say(&at.place, message);
                }
                Some(count)
            }
            Lanes::Auto(raw::Auto::Auto) => None,
        });
        let shed = raw.shed.map(|at| self.shed(at)).unwrap_or_default();
        (lanes, shed)
    }

    fn shed(&mut self, at: At<raw::Shed>) -> Shed {
        let Some(raw) = at.value else {
            return Shed::default();
        };
        if raw.loop_delay.is_none() && raw.memory.is_none() {
            let message = "this names nothing to shed by: use loop_delay, memory or both, for example {loop_delay: 100ms, memory: 90%}";
            self.say(&at.place, message);
        }
        let (usual, most) = (Duration::from_millis(100), Duration::from_secs(60));
        let loop_delay = raw.loop_delay;
        Shed {
            loop_delay: loop_delay.map(|at| self.time_within(Some(at), usual, most)),
            memory: raw.memory.and_then(|at| self.read(at, memory_bound)),
        }
    }
}

/// `90%` or `512MiB`.
fn memory_bound(text: &str) -> Result<MemoryBound, String> {
    if text.ends_with('%') {
        let Percent(share) = text.parse()?;
        return match share > 0.0 && share <= MOST {
            true => Ok(MemoryBound::Share(share)),
            false => Err(format!(
                "{text} is out of bounds: use 1% to 95% of what the control group allows, for example 90%"
            )),
        };
    }
    match text.parse() {
        Ok(ByteSize(0)) => Err("0 bytes would refuse every request: use 64MiB or more".to_owned()),
        Ok(ByteSize(bytes)) => Ok(MemoryBound::Bytes(bytes)),
        Err(_) => Err(format!(
            "\"{text}\" is not a bound of memory: use a share of what the control group allows or a size, for example 90% or 512MiB"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::config::check::tests::fixture;

    fn read(runtime: &str) -> Result<Config, String> {
        let text =
            format!("listen: 127.0.0.1:1\nupstream: http://app\nruntime: {{shed: {runtime}}}\n");
        fixture::read(&text).map_err(|said| said[0].clone())
    }

    #[test]
    fn more_lanes_than_any_machine_has_cores_are_refused() {
        let read = |lanes: &str| {
            let text =
                format!("listen: 127.0.0.1:1\nupstream: http://app\nruntime: {{lanes: {lanes}}}\n");
            fixture::read(&text).map(|config| config.lanes.map(NonZeroUsize::get))
        };
        assert_eq!(read("auto"), Ok(None));
        assert_eq!(read("4096"), Ok(Some(4096)));
        for (lanes, told) in [
            ("4097", "4097 is out of bounds: use 1 to 4096, or auto"),
            ("18446744073709551615", "is out of bounds: use 1 to 4096"),
            ("0", "\"0\" lanes: use auto or a number from 1"),
        ] {
            let said = read(lanes).unwrap_err();
            assert!(said[0].contains(told), "{said:?}");
        }
    }

    #[test]
    fn what_is_left_out_is_not_shed_by() {
        let (loop_delay, memory) = (Some(Duration::from_millis(50)), MemoryBound::Share(0.9));
        for (text, expected) in [
            (
                "{loop_delay: 50ms}",
                Shed {
                    loop_delay,
                    memory: None,
                },
            ),
            (
                "{loop_delay: 50ms, memory: 90%}",
                Shed {
                    loop_delay,
                    memory: Some(memory),
                },
            ),
            (
                "{memory: 64MiB}",
                Shed {
                    loop_delay: None,
                    memory: Some(MemoryBound::Bytes(64 << 20)),
                },
            ),
        ] {
            assert_eq!(read(text).unwrap().shed, expected, "{text}");
        }
        let none = fixture::read("listen: 127.0.0.1:1\nupstream: http://app\n");
        assert_eq!(none.unwrap().shed, Shed::default());
    }

    #[test]
    fn mistakes_tell_the_mend() {
        for (text, part) in [
            ("{}", "runtime.shed: this names nothing to shed by"),
            ("{loop_delay: 0s}", "use 1ms to 1m, for example 100ms"),
            ("{memory: 96%}", "use 1% to 95%"),
            ("{memory: 0B}", "use 64MiB or more"),
            ("{memory: lots}", "\"lots\" is not a bound of memory"),
        ] {
            let told = read(text).unwrap_err();
            assert!(told.contains(part), "{text}: {told}");
        }
    }
}
