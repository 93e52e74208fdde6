//! `weir redirect`: the kernel's rules, printed or given to `nft`.

use std::io::{self, Write as _};
use std::process::{Command, Stdio};

use anyhow::{Context, anyhow, bail};

use super::print;
use crate::redirect::{Ports, REMOVE, Rules, port};

#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    action: Action,
    /// The port of weir's transparent listener.
    #[arg(long, value_name = "PORT", value_parser = port, required_unless_present = "remove", conflicts_with = "remove")]
    to: Option<u16>,
    /// The number of the user that weir runs as, whose connections are left alone; no other program may run as that user.
    #[arg(long, value_name = "UID", value_parser = uid, required_unless_present = "remove", conflicts_with = "remove")]
    uid: Option<u32>,
    /// What is not redirected: ports and ranges by commas, weir's admin and metrics ports among them unless they are on the loopback.
    #[arg(
        long,
        value_name = "PORTS",
        default_value = "",
        hide_default_value = true,
        conflicts_with = "remove"
    )]
    skip_inbound_ports: Ports,
}

#[derive(clap::Args)]
#[group(required = true, multiple = false)]
struct Action {
    /// Print the rules.
    #[arg(long)]
    print: bool,
    /// Put the rules into the kernel by nft, in the place of those of a run before.
    #[arg(long)]
    apply: bool,
    /// Take the rules out.
    #[arg(long)]
    remove: bool,
}

pub fn run(arguments: Arguments) -> anyhow::Result<()> {
    let (Some(to), Some(uid)) = (arguments.to, arguments.uid) else {
        return nft(REMOVE);
    };
    let rules = Rules {
        to,
        uid,
        skipped: arguments.skip_inbound_ports,
    };
    match arguments.action.apply {
        true => nft(&rules.transaction()),
        false => print(&rules.transaction()),
    }
}

/// Gives a transaction to the kernel, which takes all of it or nothing.
fn nft(transaction: &str) -> anyhow::Result<()> {
    let mut child = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(cannot_run)?;
    let mut stdin = child.stdin.take().context("nft has no standard input")?;
    // One that ends before it has read all says why below.
    let _ = stdin.write_all(transaction.as_bytes());
    drop(stdin);
    let output = child.wait_with_output().context("cannot wait for nft")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("nft: {}{}", first_line(&said), mend(&said));
    }
    Ok(())
}

fn cannot_run(error: io::Error) -> anyhow::Error {
    match error.kind() {
        io::ErrorKind::NotFound => anyhow!(
            "there is no nft on the PATH: use weir's image for redirect mode, which has it (--target redirect of Dockerfile.production), or \
             install the package nftables"
        ),
        _ => anyhow!(error).context("cannot run nft"),
    }
}

/// nft repeats the line at fault below what it says of it.
fn first_line(said: &str) -> &str {
    said.trim()
        .lines()
        .next()
        .unwrap_or("failed without a word")
}

/// What to do about what nft says, by the words of the C library for what the kernel answers.
fn mend(said: &str) -> &'static str {
    let says = |words: &[&str]| words.iter().any(|word| said.contains(word));
    if says(&["Operation not permitted", "Permission denied"]) {
        ": it needs root and the capability NET_ADMIN in this network namespace (in Kubernetes securityContext.capabilities.add: [NET_ADMIN] and \
         runAsUser: 0, which Pod Security's baseline and restricted refuse: use port mode there)"
    } else if says(&[
        "No such file or directory",
        "not supported",
        "Invalid argument",
    ]) {
        ": the kernel has no NAT by nftables: it needs Linux 5.2 with nf_tables, nft_chain_nat and nft_redir, on the node: modprobe nft_chain_nat \
         nft_redir"
    } else {
        ""
    }
}

fn uid(text: &str) -> Result<u32, String> {
    match text.parse() {
        // The kernel's word for nobody at all.
        Ok(u32::MAX) | Err(_) => Err(format!(
            "{text:?} is no user's number, as `id -u` prints: in Kubernetes it is weir's securityContext.runAsUser"
        )),
        Ok(uid) => Ok(uid),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_refuses_has_its_mend() {
        let check = |said: &str, line: &str, part: &str| {
            assert_eq!(first_line(said), line);
            assert!(mend(said).contains(part), "{said}: {}", mend(said));
        };
        check(
            "netlink: Error: cache initialization failed: Operation not permitted\n",
            "netlink: Error: cache initialization failed: Operation not permitted",
            "NET_ADMIN",
        );
        check(
            "/dev/stdin:4:8-17: Error: Could not process rule: No such file or directory\n\tchain prerouting {\n\t      ^^^^^^^^^^\n",
            "/dev/stdin:4:8-17: Error: Could not process rule: No such file or directory",
            "modprobe nft_chain_nat",
        );
        check(
            "netlink: Error: cache initialization failed: Protocol not supported",
            "netlink: Error: cache initialization failed: Protocol not supported",
            "Linux 5.2",
        );
        check("", "failed without a word", "");
        assert_eq!(mend("Error: syntax error"), "");
    }
}
