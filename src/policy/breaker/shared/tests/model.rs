//! The script of a shared breaker, for simulations.

use std::collections::BTreeMap;

use super::*;

pub(super) const PROBES: u32 = 3;

const OTHERS_WITHIN: Duration = Duration::from_secs(3);

pub(super) fn settings() -> Settings {
    Settings {
        window: Window::Time(10 * SECOND),
        minimum_calls: 4,
        failure_rate: 0.5,
        consecutive_failures: 0,
        slow_call: Some(SlowCall {
            duration: SECOND,
            rate: 0.5,
        }),
        open_for: SECOND,
        max_open_for: 8 * SECOND,
        jitter: 0.0,
        half_open: HalfOpen {
            probes: PROBES,
            success_rate: 0.6,
            probe_timeout: 2 * SECOND,
        },
        recover_over: SECOND,
    }
}

/// What `lua/breaker_sync.lua` does, with a window that forgets nothing but by its number.
pub(super) struct Script {
    pub settings: Settings,
    pub quorum: usize,
    pub generation: u64,
    pub state: State,
    pub ends: Duration,
    pub next_open_for: Duration,
    pub window: Delta,
    /// Probes that ended well and badly, by process.
    pub ended: BTreeMap<usize, (u32, u32)>,
    pub last_slot: u64,
    pub wanted: Option<Duration>,
    /// Whether it may have lost what it had.
    pub forgets: bool,
    pub members: BTreeMap<usize, Duration>,
    /// When each was heard last, and by how many calls it doubts.
    pub doubters: BTreeMap<usize, (Duration, u64)>,
    pub slots: BTreeMap<(usize, u64), Duration>,
    pub said: Vec<Word>,
    /// Deltas counted, by process and generation.
    pub counted: BTreeMap<(usize, u64), u64>,
}

impl Script {
    pub(super) fn new(quorum: usize) -> Script {
        Script {
            settings: settings(),
            quorum,
            generation: 0,
            state: State::Closed,
            ends: Duration::ZERO,
            next_open_for: SECOND,
            window: Delta::default(),
            ended: BTreeMap::new(),
            last_slot: 0,
            wanted: None,
            forgets: false,
            members: BTreeMap::new(),
            doubters: BTreeMap::new(),
            slots: BTreeMap::new(),
            said: Vec::new(),
            counted: BTreeMap::new(),
        }
    }

    /// Probes that ended well and badly.
    pub(super) fn probed(&self) -> (u32, u32) {
        let add = |(good, bad), (goods, bads): &(u32, u32)| (good + goods, bad + bads);
        self.ended.values().fold((0, 0), add)
    }

    fn word(&self, now: Duration) -> Word {
        let lasts = matches!(self.state, State::Open | State::Recovering);
        Word {
            generation: self.generation,
            state: self.state,
            left: match lasts {
                true => self.ends.saturating_sub(now),
                false => Duration::ZERO,
            },
        }
    }

    pub(super) fn go(&mut self, to: State, now: Duration, lasts: Duration) {
        let ramp_ended = self.state == State::Recovering && to == State::Closed;
        if to != State::Open && !ramp_ended {
            self.window = Delta::default();
        }
        if to != State::Closed {
            self.doubters.clear();
        }
        self.generation += 1;
        (self.state, self.ends) = (to, now + lasts);
        self.wanted = None;
        self.ended.clear();
        self.slots.clear();
        let word = self.word(now);
        self.said.push(word);
    }

    fn open(&mut self, now: Duration) {
        let lasts = self.next_open_for;
        self.next_open_for = (lasts * 2).min(self.settings.max_open_for);
        self.go(State::Open, now, lasts);
    }

    /// What time alone does.
    pub(super) fn advance(&mut self, now: Duration) {
        if self.state == State::Open && now >= self.ends {
            self.go(State::HalfOpen, now, Duration::ZERO);
        } else if self.state == State::Recovering && now >= self.ends {
            self.go(State::Closed, now, Duration::ZERO);
            self.next_open_for = self.settings.open_for;
        }
    }

    /// It lost what this process knows.
    fn restore(&mut self, known: Word, now: Duration) {
        (self.generation, self.state, self.ends) =
            (known.generation, known.state, now + known.left);
        self.wanted = None;
        self.ended.clear();
        self.next_open_for = match known.state {
            State::Open => (self.settings.open_for * 2).min(self.settings.max_open_for),
            State::Closed => self.settings.open_for,
            State::HalfOpen | State::Recovering | State::ForcedOpen | State::ForcedClosed => {
                self.next_open_for
            }
        };
        self.window = Delta::default();
        self.doubters.clear();
        self.slots.clear();
    }

    pub(super) fn sync(&mut self, process: usize, report: &Report, now: Duration) -> Reply {
        if report.known.generation > self.generation {
            assert!(self.forgets, "from nowhere");
            self.restore(report.known, now);
        }
        self.advance(now);
        let counts = report.known.generation == self.generation;
        self.members.insert(process, now);
        self.members.retain(|_, at| now < *at + 5 * SECOND);
        match report.doubts > 0 && counts {
            true => self.doubters.insert(process, (now, report.doubts)),
            false => self.doubters.remove(&process),
        };
        self.doubters.retain(|_, (at, _)| now < *at + 3 * SECOND);
        let sure = self.doubters.values().filter(|(_, doubts)| *doubts > 1);
        let peers = usize::try_from(report.peers).unwrap();
        let alive = self.members.len().max(peers);
        let doubters = match self.quorum > 1 && self.doubters.len() < alive {
            true => sure.count(),
            false => self.doubters.len(),
        };
        if counts {
            self.window = Delta {
                calls: self.window.calls + report.delta.calls,
                failures: self.window.failures + report.delta.failures,
                slow: self.window.slow + report.delta.slow,
                ..Delta::default()
            };
            *self.counted.entry((process, self.generation)).or_default() += report.delta.calls;
        }
        let closed = matches!(self.state, State::Closed | State::Recovering);
        if counts && closed && (report.delta.calls > 0 || report.doubts > 0) {
            let all = self.window.calls;
            let trips = all >= u64::from(self.settings.minimum_calls)
                && (reaches(self.window.failures, all, self.settings.failure_rate)
                    || reaches(self.window.slow, all, 0.5));
            if trips && doubters >= self.quorum.min(alive) {
                self.open(now);
            }
        }
        let (mut given, mut recall, mut starved) = (Vec::new(), false, false);
        if self.state == State::HalfOpen {
            self.slots.retain(|_, ends| now < *ends);
            if counts {
                for (id, well) in &report.results {
                    if self.slots.remove(&(process, *id)).is_some() {
                        let (good, bad) = self.ended.entry(process).or_default();
                        *(if *well { good } else { bad }) += 1;
                    }
                }
                self.slots.retain(|(owner, id), _| {
                    *owner != process || report.held.contains(id) || *id > report.last_slot
                });
            }
            let lasts = HOLD + self.settings.half_open.probe_timeout + SLOT_GRACE;
            if counts {
                for ((owner, id), ends) in &mut self.slots {
                    if *owner == process && report.held.contains(id) {
                        *ends = now + lasts;
                    }
                }
            }
            let passes = |n: u32| {
                reaches(
                    n.into(),
                    PROBES.into(),
                    self.settings.half_open.success_rate,
                )
            };
            let (good, bad) = self.probed();
            let sick = self.ended.values().filter(|(_, bad)| *bad > 0).count();
            let doubted = sick >= self.quorum.min(alive);
            let waits = !doubted && now < self.ends + OTHERS_WITHIN;
            let others_are_well = self.ended.values().any(|it| it.0 > 0 && it.1 == 0);
            let too_many = !passes(PROBES - bad);
            let fails = too_many && !(waits && good + bad < PROBES);
            if passes(good) || fails && !doubted && others_are_well {
                self.go(State::Recovering, now, self.settings.recover_over);
            } else if fails {
                self.open(now);
            } else {
                let taken = u32::try_from(self.slots.len()).unwrap() + good + bad;
                let free = PROBES.saturating_sub(taken);
                let share = PROBES.div_ceil(u32::try_from(alive).unwrap());
                let mine = self.slots.keys().filter(|(owner, _)| *owner == process);
                let mine = u32::try_from(mine.count()).unwrap();
                let failed = self.ended.get(&process).is_some_and(|(_, bad)| *bad > 0);
                let share = if too_many && failed { 0 } else { share };
                let asked = report.want.min(share.saturating_sub(mine));
                let mut grant = asked.min(free);
                let wanted = self.wanted.is_some_and(|at| now <= at + SECOND);
                if report.demanded {
                    starved = grant < report.want;
                    if grant < asked {
                        self.wanted = Some(now);
                    }
                } else if wanted {
                    grant = 0;
                }
                for _ in 0..grant {
                    self.last_slot += 1;
                    given.push(self.last_slot);
                    self.slots.insert((process, self.last_slot), now + lasts);
                }
                recall = free == 0 && wanted && self.wanted.is_some_and(|at| at < now);
            }
        }
        Reply {
            word: self.word(now),
            calls: self.window.calls,
            failures: self.window.failures,
            slow: self.window.slow,
            processes: self.members.len() as u64,
            doubters: doubters as u64,
            recall,
            starved,
            last_slot: self.last_slot,
            probes: given,
        }
    }
}
