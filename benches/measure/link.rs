//! A connection to Redis that says and hears bytes, which the tests' one cannot, and sends commands ahead.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;

use crate::harness::redis::Server;

/// What Redis answers.
#[derive(Debug)]
pub enum Reply {
    Nil,
    Int(i64),
    Bytes(Vec<u8>),
    List(Vec<Reply>),
}

pub struct Link(BufReader<TcpStream>);

impl Link {
    pub fn to(server: &Server) -> Link {
        let stream = TcpStream::connect(server.address()).unwrap();
        stream.set_nodelay(true).unwrap();
        Link(BufReader::with_capacity(1 << 20, stream))
    }

    /// Sends all at once; none of them may fail.
    pub fn send(&mut self, commands: &[&[&[u8]]]) -> Vec<Reply> {
        let mut bytes = Vec::new();
        for command in commands {
            write!(bytes, "*{}\r\n", command.len()).unwrap();
            for part in *command {
                write!(bytes, "${}\r\n", part.len()).unwrap();
                bytes.extend_from_slice(part);
                bytes.extend_from_slice(b"\r\n");
            }
        }
        self.0.get_mut().write_all(&bytes).unwrap();
        commands.iter().map(|_| self.reply()).collect()
    }

    fn reply(&mut self) -> Reply {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        let (kind, rest) = line.trim_end().split_at(1);
        match (kind, rest) {
            ("$" | "*", "-1") => Reply::Nil,
            ("$", length) => {
                let mut bytes = vec![0; length.parse::<usize>().unwrap() + 2];
                self.0.read_exact(&mut bytes).unwrap();
                bytes.truncate(bytes.len() - 2);
                Reply::Bytes(bytes)
            }
            ("*", count) => {
                Reply::List((0..count.parse().unwrap()).map(|_| self.reply()).collect())
            }
            (":", number) => Reply::Int(number.parse().unwrap()),
            ("+", text) => Reply::Bytes(text.as_bytes().to_vec()),
            _ => panic!("{line}"),
        }
    }
}

impl Reply {
    /// Nothing is an empty list.
    pub fn list(self) -> Vec<Reply> {
        match self {
            Reply::List(list) => list,
            Reply::Nil => Vec::new(),
            other => panic!("not a list: {other:?}"),
        }
    }

    pub fn bytes(self) -> Vec<u8> {
        match self {
            Reply::Bytes(bytes) => bytes,
            other => panic!("not bytes: {other:?}"),
        }
    }
}
