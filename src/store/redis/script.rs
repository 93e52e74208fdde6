//! Scripts as commands.

use redis::Cmd;

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
}

impl Script {
    pub fn new(code: &'static str) -> Script {
        let hash = redis::Script::new(code).get_hash().to_owned();
        Script { code, hash }
    }

    /// By the hash of a script that the node is thought to have.
    pub(super) fn by_hash(&self, keys: &[&str], args: &[Arg<'_>]) -> Cmd {
        let mut command = redis::cmd("EVALSHA");
        command.arg(&self.hash);
        fill(command, keys, args)
    }

    /// With its code, which the node keeps.
    pub(super) fn whole(&self, keys: &[&str], args: &[Arg<'_>]) -> Cmd {
        let mut command = redis::cmd("EVAL");
        command.arg(self.code);
        fill(command, keys, args)
    }
}

fn fill(mut command: Cmd, keys: &[&str], args: &[Arg<'_>]) -> Cmd {
    command.arg(keys.len());
    for key in keys {
        command.arg(*key);
    }
    for arg in args {
        match arg {
            Arg::Int(number) => command.arg(*number),
            Arg::Float(number) => command.arg(*number),
            Arg::Text(text) => command.arg(*text),
        };
    }
    command
}
