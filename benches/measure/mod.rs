//! What benches measure by, and how they write it down: CPU time from the kernel, memory, versions, and a page of results.

#![allow(
    dead_code,
    unreachable_pub,
    reason = "each bench is a crate and uses the part that it needs"
)]

pub mod events;
pub mod link;

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use crate::harness::redis::Cluster;

/// How a bench is run.
pub struct Options {
    /// Whether `cargo bench` runs it; `cargo test` wants to know that it works, in seconds.
    pub whole: bool,
    /// Where results go, beside standard output.
    pub write: Option<PathBuf>,
    /// Cases whose names hold this.
    pub only: Option<String>,
    /// How long a case takes, where the bench lets that be said.
    pub seconds: Option<u64>,
    /// Whatever else was said.
    pub rest: Vec<String>,
}

impl Options {
    pub fn read() -> Options {
        let mut options = Options {
            whole: false,
            write: None,
            only: None,
            seconds: None,
            rest: Vec::new(),
        };
        let mut args = std::env::args().skip(1);
        while let Some(arg) = args.next() {
            match arg.as_str() {
                "--bench" => options.whole = true,
                "--write" => options.write = args.next().map(PathBuf::from),
                "--only" => options.only = args.next(),
                "--seconds" => {
                    options.seconds = args.next().map(|seconds| seconds.parse().unwrap())
                }
                _ => options.rest.push(arg),
            }
        }
        options
    }

    pub fn takes(&self, case: &str) -> bool {
        let only = self.only.as_deref();
        only.is_none_or(|part| case.contains(part))
    }

    /// Shows a page, and keeps it if that was asked.
    pub fn publish(&self, page: &str) {
        println!("{page}");
        if let Some(path) = &self.write {
            fs::write(path, page).unwrap();
        }
    }
}

/// CPU time of this thread, user's and the kernel's.
pub fn thread_cpu() -> Duration {
    on_cpu("/proc/thread-self/schedstat")
}

/// CPU time of all threads of all servers of a cluster.
pub fn servers_cpu(cluster: &Cluster) -> Duration {
    let nodes = cluster.nodes.iter();
    nodes.map(|node| process_cpu(node.pid())).sum()
}

/// CPU time of all threads of a process that live.
pub fn process_cpu(pid: u32) -> Duration {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let stats = threads.map(|thread| thread.unwrap().path().join("schedstat"));
    stats.map(|stat| on_cpu(stat.to_str().unwrap())).sum()
}

/// CPU time of this process's threads of these names that live.
pub fn threads_cpu(names: &[&str]) -> Duration {
    let threads = fs::read_dir("/proc/self/task").unwrap();
    let threads = threads.map(|thread| thread.unwrap().path());
    // One may end meanwhile.
    let named = threads.filter(|thread| {
        let name = fs::read_to_string(thread.join("comm"));
        name.is_ok_and(|name| names.contains(&name.trim_end()))
    });
    named
        .map(|thread| on_cpu(thread.join("schedstat").to_str().unwrap()))
        .sum()
}

/// CPU time of a process and of all its children, those that have ended too: Postgres has a process for each connection.
pub fn family_cpu(pid: u32) -> Duration {
    // In ticks of 10 ms, since those that have ended are counted nowhere else: cutime and cstime, proc_pid_stat(5).
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let (_, fields) = stat.rsplit_once(") ").unwrap();
    let ticks = fields.split(' ').skip(13).take(2);
    let ended: u32 = ticks.map(|ticks| ticks.parse::<u32>().unwrap()).sum();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    let children = children.split_whitespace();
    // One may end meanwhile.
    let live = children.filter_map(|pid| fs::read_to_string(format!("/proc/{pid}/schedstat")).ok());
    let live: Duration = live.map(|stat| first_nanos(&stat)).sum();
    process_cpu(pid) + live + Duration::from_millis(10) * ended
}

fn on_cpu(stat: &str) -> Duration {
    first_nanos(&fs::read_to_string(stat).unwrap())
}

/// The first number of a schedstat is what was spent on a CPU, in nanoseconds.
fn first_nanos(stat: &str) -> Duration {
    let nanos = stat.split(' ').next().unwrap();
    Duration::from_nanos(nanos.parse().unwrap())
}

/// Resident bytes of this process.
pub fn resident() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib: u64 = line
        .unwrap()
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .unwrap();
    kib * 1024
}

pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<_> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// 1234567.0 as `1,234,567`.
pub fn grouped(number: f64) -> String {
    let digits = format!("{number:.0}");
    let groups: Vec<_> = digits.as_bytes().rchunks(3).rev().collect();
    String::from_utf8(groups.join(&b',')).unwrap()
}

/// What a page of results opens with that a cluster had a part in.
pub fn opening(title: &str, target: &str, what: &str) -> String {
    let servers = format!(
        "Redis {}, three masters and three replicas on this machine",
        redis()
    );
    opening_with(title, target, what, &servers)
}

/// The version.
pub fn redis() -> String {
    let said = said("redis-server", &["--version"]);
    let version = said.split(' ').find_map(|part| part.strip_prefix("v="));
    version.unwrap_or("of an unknown version").to_owned()
}

/// What a program prints, or nothing.
pub fn said(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output();
    let output = output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    output.unwrap_or_default()
}

/// What a page of results opens with. `servers`: which ones had a part in it.
pub fn opening_with(title: &str, target: &str, what: &str, servers: &str) -> String {
    let commit = said("git", &["rev-parse", "--short", "HEAD"]);
    let changed = match said(
        "git",
        &["status", "--porcelain", "-uno", "--", ".", ":!benches/*.md"],
    )
    .as_str()
    {
        "" => "",
        _ => ", changed since",
    };
    let rustc = said("rustc", &["-V"]);
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cpu = cpu.lines().find_map(|line| line.strip_prefix("model name"));
    format!(
        "# {title}\n\n`make {target}` wrote this. {what}\n\n\
         - weir {} at `{commit}`{changed}, {}\n\
         - {servers}\n\
         - Linux {}, {}, {} cores\n\n",
        env!("CARGO_PKG_VERSION"),
        rustc.split(" (").next().unwrap(),
        said("uname", &["-r"]),
        cpu.unwrap_or_default().trim_start_matches(['\t', ':', ' ']),
        std::thread::available_parallelism().unwrap(),
    )
}
