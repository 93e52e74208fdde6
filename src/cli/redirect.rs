//! `weir redirect`: the step before a pod begins, in which the kernel is told to hand weir what comes in.

use std::io::{ErrorKind, Write as _};
use std::num::NonZeroU16;
use std::process::{Command, Stdio};

use anyhow::{Context, bail};

use super::print;
use crate::inject::rules::{REMOVE, Rules};

/// What applies rules, of Debian's package nftables.
const NFT: &str = "nft";

#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    act: Act,
    /// The port of weir's listener, which has to be transparent.
    #[arg(long, value_name = "PORT", default_value = "9900")]
    to: NonZeroU16,
    /// The user that weir runs as: what it sends is not redirected.
    #[arg(long, default_value_t = 65532, value_parser = clap::value_parser!(u32).range(1..))]
    uid: u32,
    /// Ports that keep what comes to them, with commas between.
    #[arg(long, value_name = "PORTS", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..))]
    skip_inbound_ports: Vec<u16>,
}

#[derive(clap::Args)]
#[group(required = true, multiple = false)]
struct Act {
    /// Replace the rules that are there.
    #[arg(long)]
    apply: bool,
    /// Print the rules and apply nothing.
    #[arg(long)]
    print: bool,
    /// Take the rules out.
    #[arg(long)]
    remove: bool,
}

pub fn run(arguments: Arguments) -> anyhow::Result<()> {
    let rules = Rules {
        to: arguments.to,
        uid: arguments.uid,
        skip: arguments.skip_inbound_ports.into_iter().collect(),
    };
    if arguments.act.print {
        return print(&rules.to_string());
    }
    apply(&match arguments.act.remove {
        true => REMOVE.to_owned(),
        false => rules.to_string(),
    })
}

fn apply(rules: &str) -> anyhow::Result<()> {
    let started = Command::new(NFT)
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn();
    let mut nft = match started {
        Err(error) if error.kind() == ErrorKind::NotFound => bail!(
            "there is no nft here: install nftables; in Kubernetes use the image for this step, weir-redirect"
        ),
        started => started.context("cannot run nft")?,
    };
    // It may end before it has read all; then it says why.
    let told = nft
        .stdin
        .take()
        .map(|mut input| input.write_all(rules.as_bytes()));
    let output = nft.wait_with_output().context("cannot run nft")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let mend = if said.contains("Operation not permitted") {
            "; it needs the capability NET_ADMIN in this network namespace: securityContext.capabilities.add [NET_ADMIN], and user 0"
        } else if said.contains("Operation not supported") || said.contains("No such file") {
            "; the kernel needs nf_tables with nat (modules nft_chain_nat and nft_redir): use the port mode where it has none"
        } else {
            ""
        };
        bail!("nft refused the rules: {}{mend}", said.trim());
    }
    told.transpose().context("cannot give nft the rules")?;
    Ok(())
}
