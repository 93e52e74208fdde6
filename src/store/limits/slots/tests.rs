//! Whole fleets of processes around a model of `lua/slots.lua`, by schedules that a seed draws: calls come late, in any order or never, answers are
//! lost, and processes are paused, or cut off from Redis, for longer than their slots last.

mod model;

use fastrand::Rng;
use proptest::prelude::*;

use super::*;
use model::Script;

const MS: Duration = Duration::from_millis(1);
const TTL: Duration = Duration::from_millis(1_000);

#[derive(Debug, Clone, Copy)]
struct Call {
    process: usize,
    turn: u64,
    asked: Asked,
}

#[derive(Default)]
struct Process {
    held: Held,
    turn: u64,
    /// What the requests under way have.
    requests: Vec<u64>,
    /// The call that is waited for, when it was made, and the cost of the request that asks by it.
    awaits: Option<(u64, Duration, Option<u64>)>,
    is_paused: bool,
    is_cut_off: bool,
}

struct Sim {
    random: Rng,
    now: Duration,
    limit: u64,
    script: Script,
    processes: Vec<Process>,
    calls: Vec<Call>,
    answers: Vec<(Call, Told)>,
    admitted: u64,
    /// Whether requests were counted that no one may take away, beside those to whom their slots were given meanwhile.
    is_over: bool,
}

impl Sim {
    fn new(seed: u64) -> Sim {
        let mut random = Rng::with_seed(seed);
        Sim {
            now: Duration::from_secs(100),
            limit: random.u64(1..8),
            script: Script::default(),
            processes: (0..random.usize(2..5))
                .map(|_| Process::default())
                .collect(),
            calls: Vec::new(),
            answers: Vec::new(),
            admitted: 0,
            is_over: false,
            random,
        }
    }

    fn ask(&self, cost: u64) -> Ask<'static> {
        Ask {
            key: Key(0),
            limit: "a",
            parts: &[],
            slots: self.limit,
            cost,
            hold_ttl: TTL,
            patience: 20 * MS,
        }
    }

    /// A request comes, or looks again.
    fn begin(&mut self, n: usize, cost: u64) {
        let ask = self.ask(cost);
        if cost > ask.slots {
            return;
        }
        let (now, process) = (self.now, &mut self.processes[n]);
        match process.held.take(&ask, now) {
            Step::Taken => {
                process.requests.push(cost);
                self.admitted += 1;
                let used = process.held.used;
                let has = self.script.has(n, now);
                assert!(used <= has, "process {n} uses {used} and has {has}");
            }
            Step::Refused => {}
            Step::Ask => {
                let asked = process.held.asks(cost);
                self.send(n, asked, Some(cost));
            }
            // It gives up.
            Step::Wait(_) => process.held.waiting -= cost,
        }
    }

    fn send(&mut self, n: usize, asked: Asked, cost: Option<u64>) {
        let process = &mut self.processes[n];
        process.turn += 1;
        process.awaits = Some((process.turn, self.now, cost));
        let call = Call {
            process: n,
            turn: process.turn,
            asked,
        };
        if !process.is_cut_off {
            self.calls.push(call);
        }
    }

    fn tell(&mut self, n: usize) {
        let tells = self.processes[n].held.tells(TTL, self.now);
        if let Tells::Used(asked) = tells {
            self.send(n, asked, None);
        }
    }

    /// Redis runs a call, however late it comes.
    fn run(&mut self, index: usize) {
        let call = self.calls.swap_remove(index);
        let Call {
            process,
            turn,
            asked,
        } = call;
        let Asked { used, want, needs } = asked;
        let asks = model::Call {
            process,
            turn,
            held: used,
            want,
            needs,
        };
        let (granted, others) = self.script.call(&asks, self.limit, TTL, self.now);
        let told = Told { granted, others };
        self.is_over |= self.script.taken(self.now) > self.limit;
        self.answers.push((call, told));
    }

    fn answer(&mut self, index: usize) {
        let (call, told) = self.answers.swap_remove(index);
        let (now, process) = (self.now, &mut self.processes[call.process]);
        let Some((_, asked_at, cost)) = process.awaits.take_if(|(turn, ..)| *turn == call.turn)
        else {
            return;
        };
        process.held.told(told, asked_at, TTL);
        if cost.is_some() && told.granted < call.asked.want {
            process.held.refused_until = now + REFUSED;
        }
        process.held.asking = false;
        if let Some(cost) = cost {
            self.begin(call.process, cost);
        }
    }

    fn give_up(&mut self, n: usize) {
        let process = &mut self.processes[n];
        if let Some((.., cost)) = process.awaits.take() {
            process.held.asking = false;
            if cost.is_none() {
                process.held.tell_after = self.now + TELL_AGAIN;
            }
        }
    }

    fn end(&mut self, n: usize) {
        let process = &mut self.processes[n];
        if !process.requests.is_empty() {
            let index = self.random.usize(..process.requests.len());
            let cost = process.requests.swap_remove(index);
            process.held.used -= cost;
            process.held.refused_until = Duration::ZERO;
        }
    }

    fn step(&mut self) {
        let n = self.random.usize(..self.processes.len());
        let runs = !self.processes[n].is_paused;
        let draw = self.random.u8(..100);
        match draw {
            0..30 => {
                let most = match self.random.u8(..40) {
                    0 => 1_500,
                    1..4 => 400,
                    _ => 15,
                };
                self.now += self.random.u32(..most) * MS;
            }
            30..50 if runs => {
                let cost = self.random.u64(1..3);
                self.begin(n, cost);
            }
            50..62 if runs => self.end(n),
            62..70 if runs => self.tell(n),
            70..82 if !self.calls.is_empty() => {
                let index = self.random.usize(..self.calls.len());
                self.run(index);
            }
            82..92 if !self.answers.is_empty() => {
                let index = self.random.usize(..self.answers.len());
                let is_paused = self.processes[self.answers[index].0.process].is_paused;
                match self.random.u8(..8) {
                    0 => drop(self.answers.swap_remove(index)),
                    _ if is_paused => {}
                    _ => self.answer(index),
                }
            }
            92 if !self.calls.is_empty() => {
                let index = self.random.usize(..self.calls.len());
                self.calls.swap_remove(index);
            }
            93..96 if runs => self.give_up(n),
            96 | 97 => self.processes[n].is_paused ^= true,
            98 | 99 => self.processes[n].is_cut_off ^= true,
            _ => {}
        }
    }

    /// All hear each other again, and all requests end.
    fn settle(&mut self) {
        self.calls.clear();
        self.answers.clear();
        for n in 0..self.processes.len() {
            let process = &mut self.processes[n];
            (process.is_paused, process.is_cut_off) = (false, false);
            self.give_up(n);
            while !self.processes[n].requests.is_empty() {
                self.end(n);
            }
        }
        // What came late for a process that has nothing comes back by itself.
        self.now += 2 * TTL;
        for n in 0..self.processes.len() {
            self.tell(n);
            while !self.calls.is_empty() {
                self.run(0);
                self.answer(0);
            }
            let tells = self.processes[n].held.tells(TTL, self.now);
            assert_eq!(tells, Tells::Over, "process {n}");
        }
        assert_eq!(self.script.taken(self.now), 0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 0, ..ProptestConfig::with_cases(2_000) })]

    #[test]
    fn no_process_admits_by_slots_that_others_may_have(seed in any::<u64>()) {
        let mut sim = Sim::new(seed);
        for _ in 0..300 {
            sim.step();
            // From then on it is the requests under way that are too many, whatever anyone does.
            if sim.is_over {
                break;
            }
        }
        sim.settle();
    }
}
