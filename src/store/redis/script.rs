//! Scripts as commands: by their hash, or whole where a node does not know it.

use redis::{Cmd, Value};
use smallvec::SmallVec;

/// A script of `lua/`.
#[derive(Debug)]
pub struct Script {
    code: &'static str,
    /// SHA-1 in hexadecimal digits, as `SCRIPT LOAD` answers it.
    hash: String,
}

/// An argument of a script.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Arg<'a> {
    Int(u64),
    Float(f64),
    Text(&'a str),
    Bytes(&'a [u8]),
}

/// Numbers as one argument, or one reply: doubles of 8 bytes, little-endian, as `struct.pack('<d…')` of a script makes them.
#[derive(Debug, Default)]
pub struct Doubles(SmallVec<[u8; 128]>);

impl Doubles {
    pub fn push(&mut self, number: f64) {
        self.0.extend_from_slice(&number.to_le_bytes());
    }

    pub fn as_arg(&self) -> Arg<'_> {
        Arg::Bytes(&self.0)
    }

    /// Those of a reply; none where it is no such text.
    pub fn of(reply: &Value) -> Option<impl Iterator<Item = f64>> {
        let Value::BulkString(bytes) = reply else {
            return None;
        };
        let (doubles, rest) = bytes.as_chunks();
        rest.is_empty()
            .then(|| doubles.iter().copied().map(f64::from_le_bytes))
    }
}

impl Extend<f64> for Doubles {
    fn extend<I: IntoIterator<Item = f64>>(&mut self, numbers: I) {
        numbers.into_iter().for_each(|number| self.push(number));
    }
}

impl Script {
    pub fn new(code: &'static str) -> Script {
        let hash = redis::Script::new(code).get_hash().to_owned();
        Script { code, hash }
    }

    /// By the hash of a script that the node is thought to have.
    pub(super) fn by_hash(&self, keys: &[&str], args: &[Arg<'_>]) -> Cmd {
        fill("EVALSHA", &self.hash, keys, args)
    }

    /// With its code, which the node keeps.
    pub(super) fn whole(&self, keys: &[&str], args: &[Arg<'_>]) -> Cmd {
        fill("EVAL", self.code, keys, args)
    }
}

fn fill(name: &str, script: &str, keys: &[&str], args: &[Arg<'_>]) -> Cmd {
    // Room for all of it at once: most numbers are short, and a text of another length costs one more allocation.
    let bytes = name.len() + script.len() + keys.iter().map(|key| key.len()).sum::<usize>();
    let long = args.iter().map(|arg| match arg {
        Arg::Bytes(bytes) => bytes.len(),
        Arg::Int(_) | Arg::Float(_) | Arg::Text(_) => 12,
    });
    let bytes = bytes + 4 + long.sum::<usize>();
    let mut command = Cmd::with_capacity(3 + keys.len() + args.len(), bytes);
    command.arg(name).arg(script).arg(keys.len());
    for key in keys {
        command.arg(*key);
    }
    put(&mut command, args);
    command
}

pub(super) fn put(command: &mut Cmd, args: &[Arg<'_>]) {
    for arg in args {
        match arg {
            Arg::Int(number) => command.arg(*number),
            // Told as a whole number where it is one, which takes a fraction of the time.
            Arg::Float(number) if number.fract() == 0.0 && (0.0..1e15).contains(number) => {
                command.arg(*number as u64)
            }
            Arg::Float(number) => command.arg(*number),
            Arg::Text(text) => command.arg(*text),
            Arg::Bytes(bytes) => command.arg(*bytes),
        };
    }
}
