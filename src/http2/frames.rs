//! Where in the frames of a connection its reader is (RFC 9113 sections 3.4, 4.1 and 4.3): so much as is needed to tell a client
//! that is idle from one that has begun a head and does not go on, or that still takes in bodies. What the frames say is the `h2` crate's
//! business.

/// Of the preface, in bytes.
const PREFACE: usize = 24;
/// Of a frame's head, in bytes.
const HEAD: usize = 9;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const CONTINUATION: u8 = 9;
const ACK: u8 = 1;
const END_HEADERS: u8 = 4;

/// Told of every byte that one side sends, in order.
#[derive(Debug)]
pub struct Frames {
    /// Of the preface, still due.
    preface: usize,
    head: [u8; HEAD],
    /// How much of the head is here.
    have: usize,
    /// How much of the payload is due.
    payload: usize,
    kind: u8,
    /// Whether frames of the same head are due.
    goes_on: bool,
    /// How many things were whole: heads, and frames of other kinds. The first are the client's settings.
    whole: u64,
    /// Bytes of bodies.
    bodies: u64,
}

impl Default for Frames {
    fn default() -> Frames {
        Frames {
            preface: PREFACE,
            head: [0; HEAD],
            have: 0,
            payload: 0,
            kind: DATA,
            goes_on: false,
            whole: 0,
            bodies: 0,
        }
    }
}

impl Frames {
    /// Of a server, which says no preface.
    pub fn of_server() -> Frames {
        Frames {
            preface: 0,
            ..Frames::default()
        }
    }

    /// How many bytes of bodies there were.
    pub fn bodies(&self) -> u64 {
        self.bodies
    }

    /// Takes the bytes that came next, from the preface on, however they are cut.
    pub fn read(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let due = match (self.preface, self.payload) {
                (0, 0) => HEAD - self.have,
                (0, payload) => payload,
                (preface, _) => preface,
            };
            let (here, rest) = bytes.split_at(due.min(bytes.len()));
            bytes = rest;
            if self.preface > 0 {
                self.preface -= here.len();
            } else if self.payload > 0 {
                self.payload -= here.len();
                if self.kind == DATA {
                    self.bodies += here.len() as u64;
                }
                self.end();
            } else {
                self.head[self.have..self.have + here.len()].copy_from_slice(here);
                self.have += here.len();
                if self.have == HEAD {
                    self.begin();
                }
            }
        }
    }

    fn begin(&mut self) {
        let [high, middle, low, kind, flags, ..] = self.head;
        self.have = 0;
        self.kind = kind;
        self.payload = usize::from(high) << 16 | usize::from(middle) << 8 | usize::from(low);
        if matches!(kind, HEADERS | CONTINUATION) {
            self.goes_on = flags & END_HEADERS == 0;
        }
        self.end();
    }

    fn end(&mut self) {
        let is_begun = self.whole > 0 || (self.kind, self.head[4] & ACK) == (SETTINGS, 0);
        self.whole += u64::from(self.payload == 0 && !self.goes_on && is_begun);
    }

    /// `None` while nothing is due that the client has begun; otherwise a number that changes when another thing is due. A body may
    /// take its time: it is no such thing, and has a deadline of its own.
    pub fn due(&self) -> Option<u64> {
        let is_body = self.payload > 0 && self.kind == DATA;
        let is_begun = self.have > 0 || self.payload > 0 || self.goes_on;
        (self.whole == 0 || (is_begun && !is_body)).then_some(self.whole)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETTINGS: &[u8] = &[0, 0, 0, 4, 0, 0, 0, 0, 0];

    fn begun() -> Frames {
        let mut frames = Frames::default();
        frames.read(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
        frames.read(SETTINGS);
        frames
    }

    #[test]
    fn what_is_due_is_known_at_every_byte() {
        let headers = [0, 0, 3, 1, 0, 0, 0, 0, 1, 7, 7, 7];
        let goes_on = [0, 0, 2, 9, 0, 0, 0, 0, 1, 7, 7];
        let ends = [0, 0, 2, 9, 4, 0, 0, 0, 1, 7, 7];
        let data = [0, 0, 4, 0, 0, 0, 0, 0, 1, 7, 7, 7, 7];
        let ping = [0, 0, 1, 6, 0, 0, 0, 0, 0, 7];
        let all = [SETTINGS, &headers, &goes_on, &ends, &data, &ping].concat();
        let mut frames = Frames::default();
        frames.read(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
        let due = all.iter().map(|byte| {
            frames.read(&[*byte]);
            let due = frames.due().map(|due| u8::try_from(due).unwrap());
            due.map_or('.', |due| char::from(b'0' + due))
        });
        let settings = "00000000.";
        let head = "111111111111 11111111111 1111111111.".replace(' ', "");
        let (body, ping) = ("22222222.....", "333333333.");
        assert_eq!(
            due.collect::<String>(),
            [settings, &head, body, ping].concat()
        );
    }

    #[test]
    fn it_is_the_same_in_whatever_pieces_it_comes() {
        let frame = [0, 0, 3, 1, 4, 0, 0, 0, 1, 7, 7, 7];
        let bytes = [SETTINGS, &frame, &frame, &[0, 0, 9, 0, 0]].concat();
        for step in 1..bytes.len() {
            let mut frames = begun();
            bytes.chunks(step).for_each(|piece| frames.read(piece));
            assert_eq!(frames.due(), Some(4), "{step}");
        }
    }

    #[test]
    fn bodies_alone_are_counted() {
        let ping = [&[0, 0, 8, 6, 1, 0, 0, 0, 0][..], &[7; 8]].concat();
        let head = [0, 0, 3, 1, 4, 0, 0, 0, 1, 7, 7, 7];
        let data = [0, 0, 4, 0, 1, 0, 0, 0, 1, 7, 7, 7, 7];
        let mut frames = Frames::of_server();
        frames.read(&[SETTINGS, &ping, &head].concat());
        assert_eq!(frames.bodies(), 0);
        frames.read(&data[..10]);
        assert_eq!(frames.bodies(), 1);
        frames.read(&[&data[10..], &ping, &data].concat());
        assert_eq!(frames.bodies(), 8);
    }

    #[test]
    fn until_the_settings_are_whole_they_are_due() {
        let mut frames = Frames::default();
        assert_eq!(frames.due(), Some(0));
        frames.read(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
        assert_eq!(frames.due(), Some(0));
        frames.read(&[0, 0, 6, 4, 0, 0, 0, 0, 0, 0, 3]);
        assert_eq!(frames.due(), Some(0));
        frames.read(&[0, 0, 0, 1]);
        assert_eq!(frames.due(), None);
    }
}
