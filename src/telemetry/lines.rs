//! Lines of text on their way to a stream that may take none for a while: a bounded text, and the thread that writes it. Whoever has a
//! line never waits, and what does not fit is counted.

use std::io::{self, ErrorKind, Write};
use std::mem::{replace, take};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

/// Lines that wait, and what became of the others.
#[derive(Debug)]
pub(super) struct Lines {
    /// Bytes that wait, at most; as many are being written.
    room: usize,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    waiting: Vec<u8>,
    is_writing: bool,
    counts: Counts,
    /// Lost ones that nobody was told of.
    untold: u64,
}

/// What became of lines.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    pub written: u64,
    pub lost: u64,
}

impl Lines {
    pub(super) const fn new(room: usize) -> Lines {
        Lines {
            room,
            state: Mutex::new(State {
                waiting: Vec::new(),
                is_writing: false,
                counts: Counts {
                    written: 0,
                    lost: 0,
                },
                untold: 0,
            }),
            changed: Condvar::new(),
        }
    }

    /// Lays whole lines behind those that wait, or lets go of them where there is no room.
    pub(super) fn push(&self, text: &[u8]) {
        let mut state = self.state.lock();
        if state.waiting.len() + text.len() > self.room {
            state.lose(count(text));
            return;
        }
        state.waiting.extend_from_slice(text);
        self.changed.notify_all();
    }

    /// Waits until all lines are out, for at most `within`; whether they are.
    pub(super) fn flush(&self, within: Duration) -> bool {
        let mut state = self.state.lock();
        let waits = |state: &mut State| state.is_writing || !state.waiting.is_empty();
        let waited = self.changed.wait_while_for(&mut state, waits, within);
        !waited.timed_out()
    }

    pub(super) fn counts(&self) -> Counts {
        self.state.lock().counts
    }

    /// Writes what comes, for ever. `fails` is told why lines cannot be written, at the first of such failures in a row; `tell` how many
    /// were lost, once others are out. Both may push some themselves.
    pub(super) fn write(
        &self,
        out: impl Write,
        fails: impl Fn(&io::Error),
        tell: impl Fn(u64),
    ) -> ! {
        let mut out = Whole::to(out);
        let mut is_failing = false;
        loop {
            let text = self.next();
            let (lines, written) = out.write(&text);
            let mut state = self.state.lock();
            state.counts.written += lines;
            let is_first = !replace(&mut is_failing, written.is_err());
            if let Err(error) = written {
                state.lose(count(&text) - lines);
                drop(state);
                if is_first {
                    fails(&error);
                }
                continue;
            }
            // Else what is told would be lost, too.
            let has_room = state.waiting.len() < self.room / 2;
            let untold = if has_room { take(&mut state.untold) } else { 0 };
            drop(state);
            if untold > 0 {
                tell(untold);
            }
        }
    }

    /// All that waits, once there is something; what was taken before is dealt with.
    fn next(&self) -> Vec<u8> {
        let mut state = self.state.lock();
        state.is_writing = false;
        self.changed.notify_all();
        let is_idle = |state: &mut State| state.waiting.is_empty();
        self.changed.wait_while(&mut state, is_idle);
        state.is_writing = true;
        take(&mut state.waiting)
    }
}

impl State {
    fn lose(&mut self, lines: u64) {
        self.counts.lost += lines;
        self.untold += lines;
    }
}

/// Writes lines to a stream that may fail in the midst of one: what comes behind half a line begins a new one.
#[derive(Debug)]
struct Whole<W> {
    out: W,
    is_torn: bool,
}

impl<W: Write> Whole<W> {
    fn to(out: W) -> Whole<W> {
        Whole {
            out,
            is_torn: false,
        }
    }

    /// How many of these lines are out, and what kept the others from it.
    fn write(&mut self, text: &[u8]) -> (u64, io::Result<()>) {
        if self.is_torn {
            if let Err(error) = self.out.write_all(b"\n") {
                return (0, Err(error));
            }
            self.is_torn = false;
        }
        let mut done = 0;
        let written = loop {
            if done == text.len() {
                break Ok(());
            }
            match self.out.write(&text[done..]) {
                Ok(0) => break Err(ErrorKind::WriteZero.into()),
                Ok(more) => done += more,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => break Err(error),
            }
        };
        self.is_torn = text[..done].last().is_some_and(|last| *last != b'\n');
        (count(&text[..done]), written)
    }
}

fn count(text: &[u8]) -> u64 {
    text.iter().filter(|byte| **byte == b'\n').count() as u64
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
    use std::thread;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);
    const ROOM: usize = 1 << 20;

    /// Takes as many texts as are asked for.
    struct Reluctant {
        begun: SyncSender<()>,
        taken: SyncSender<Vec<u8>>,
    }

    impl Write for Reluctant {
        fn write(&mut self, text: &[u8]) -> io::Result<usize> {
            self.begun.send(()).unwrap();
            self.taken.send(text.to_vec()).unwrap();
            Ok(text.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn next(texts: &Receiver<Vec<u8>>) -> String {
        String::from_utf8(texts.recv_timeout(PATIENCE).unwrap()).unwrap()
    }

    #[test]
    fn lines_that_do_not_fit_are_lost_and_told_once_there_is_room() {
        static LINES: Lines = Lines::new(ROOM);
        let ((begun, has_begun), (taken, texts)) = (sync_channel(9), sync_channel(0));
        thread::spawn(move || {
            let tell = |lost| LINES.push(format!("{lost} lost\n").as_bytes());
            LINES.write(Reluctant { begun, taken }, |_| {}, tell)
        });
        LINES.push(b"first\n");
        has_begun.recv_timeout(PATIENCE).unwrap();
        // No one takes it, and so none of these.
        let long = [&vec![b'x'; ROOM - 8], &b"\n"[..]].concat();
        LINES.push(&long);
        LINES.push(b"no room\n");
        LINES.push(b"nor\nhere\n");
        LINES.push(b"fits\n");
        assert!(!LINES.flush(Duration::from_millis(1)));
        let counts = Counts {
            written: 0,
            lost: 3,
        };
        assert_eq!(LINES.counts(), counts);
        assert_eq!(next(&texts), "first\n");
        let text = next(&texts);
        assert!(text.ends_with("x\nfits\n") && text.len() == long.len() + 5);
        assert_eq!(next(&texts), "3 lost\n");
        assert!(LINES.flush(PATIENCE));
        let counts = Counts {
            written: 4,
            lost: 3,
        };
        assert_eq!(LINES.counts(), counts);
    }

    #[test]
    fn what_comes_behind_half_a_line_begins_a_new_one() {
        // A pipe that takes a page, and no more before that is read.
        let (mut read, write) = io::pipe().unwrap();
        rustix::fs::fcntl_setfl(&write, rustix::fs::OFlags::NONBLOCK).unwrap();
        let mut out = Whole::to(write);
        let (line, mut room) = (vec![b'x'; 99], 0);
        let line = [&line[..], b"\n"].concat();
        // It takes half of the last one.
        let text = line.repeat(10_000);
        let (lines, written) = out.write(&text);
        assert_eq!(written.unwrap_err().kind(), ErrorKind::WouldBlock);
        while room < 65_536 {
            room += io::Read::read(&mut read, &mut [0; 65_536]).unwrap();
        }
        assert_eq!((lines, room % 100), (655, 36));
        let (lines, written) = out.write(b"a\nb\n");
        written.unwrap();
        assert_eq!(lines, 2);
        let mut rest = [0; 9];
        let length = io::Read::read(&mut read, &mut rest).unwrap();
        assert_eq!(&rest[..length], b"\na\nb\n");
    }

    /// Fails, but for what it is asked to take.
    struct Full;

    impl Write for Full {
        fn write(&mut self, text: &[u8]) -> io::Result<usize> {
            match text.starts_with(b"taken") {
                true => Ok(text.len()),
                false => Err(ErrorKind::StorageFull.into()),
            }
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn lines_that_fail_are_lost_and_told_once_others_are_out() {
        static LINES: Lines = Lines::new(ROOM);
        let (failed, failures) = sync_channel(9);
        let (lost, told) = sync_channel(9);
        thread::spawn(move || {
            let fails = |error: &io::Error| failed.send(error.kind()).unwrap();
            LINES.write(Full, fails, |lines| lost.send(lines).unwrap())
        });
        let push = |text: &[u8]| {
            LINES.push(text);
            assert!(LINES.flush(PATIENCE));
        };
        push(b"a\n");
        push(b"b\nc\n");
        let counts = Counts {
            written: 0,
            lost: 3,
        };
        assert_eq!(LINES.counts(), counts);
        // Once in a row, and no one is there for the count.
        assert_eq!(failures.try_iter().count(), 1);
        assert_eq!(told.try_iter().count(), 0);
        push(b"taken\n");
        assert_eq!(told.try_iter().collect::<Vec<_>>(), [3]);
        push(b"d\n");
        assert_eq!(failures.try_iter().count(), 1);
    }
}
