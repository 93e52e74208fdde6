//! The shell that a server of a test's own is a child of. It waits on a pipe from the test process, so that however that process
//! ends, the pipe ends with it, and the shell ends its own child and removes the server's folder: nothing is left by a panic, a kill
//! or a server in a static.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

#[derive(Debug)]
pub struct Keeper {
    shell: Child,
    orders: Option<ChildStdin>,
    pids: BufReader<ChildStdout>,
    /// Of the server that it began last.
    pub pid: u32,
}

impl Keeper {
    /// By a script that reads a line for each start, answers with the server's process id, and ends all when there is nothing more
    /// to read.
    pub fn new(shell: &mut Command) -> Keeper {
        let shell = shell.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut shell = shell.spawn().unwrap();
        Keeper {
            orders: shell.stdin.take(),
            pids: BufReader::new(shell.stdout.take().unwrap()),
            shell,
            pid: 0,
        }
    }

    /// Starts the server.
    pub fn begin(&mut self) -> u32 {
        self.orders.as_mut().unwrap().write_all(b"\n").unwrap();
        let mut pid = String::new();
        self.pids.read_line(&mut pid).unwrap();
        self.pid = pid.trim().parse().unwrap();
        self.pid
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        drop(self.orders.take());
        let _ = self.shell.wait();
    }
}
