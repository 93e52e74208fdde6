//! `weir drain`: has a weir on this machine tell its clients to leave.

use anyhow::bail;
use hyper::Method;
use serde_json::Value;

use super::client::{AdminPort, AdminToken, Call, MEND_OF_401, WITHIN, call, detail};
use super::print;

#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    admin: AdminPort,
    #[command(flatten)]
    token: AdminToken,
}

/// An error unless it does so. As with `weir healthcheck`, a file that has got mistakes is no hindrance.
pub fn run(arguments: Arguments) -> anyhow::Result<()> {
    let (address, of_file) = arguments.admin.find_at_least()?;
    let token = arguments.token.or(of_file);
    let (status, body) = call(Call {
        address,
        method: Method::POST,
        path: "/v1/drain",
        token: token.as_deref(),
        body: String::new(),
        within: WITHIN,
    })?;
    if status != 204 {
        let said: Value = serde_json::from_str(&body).unwrap_or_default();
        let detail = detail(&said);
        let mend = if status == 401 { MEND_OF_401 } else { "" };
        bail!("{address} says {status}: {detail}{mend}");
    }
    print("its clients are told to leave, and served on until it is ended\n")
}
