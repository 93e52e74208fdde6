//! `weir healthcheck`: asks the admin port of a weir on this machine.

use std::io::Write as _;
use std::net::SocketAddr;

use anyhow::bail;
use hyper::Method;

use super::client::{Call, call};

/// Prints what `/health` says; an error unless it says 200 in time.
pub fn run(address: SocketAddr) -> anyhow::Result<()> {
    let (status, body) = call(Call {
        address,
        method: Method::GET,
        path: "/health",
        token: None,
        body: String::new(),
    })?;
    writeln!(std::io::stdout(), "{body}")?;
    if status != 200 {
        bail!("{address} says {status}");
    }
    Ok(())
}
