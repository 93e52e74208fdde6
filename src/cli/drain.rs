//! `weir drain`: has a weir on this machine tell its clients to leave.

use anyhow::bail;
use hyper::Method;
use serde_json::Value;

use super::client::{AdminPort, Call, MEND_OF_401, WITHIN, call};
use super::print;
use crate::config::Secret;

#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    admin: AdminPort,
    /// The admin token; with --config that of the file, unless told.
    #[arg(
        long,
        value_name = "TOKEN",
        env = "WEIR_ADMIN_TOKEN",
        hide_env_values = true
    )]
    token: Option<String>,
}

/// An error unless it does so. As with `weir healthcheck`, a file that has got mistakes is no hindrance.
pub fn run(arguments: Arguments) -> anyhow::Result<()> {
    let (address, of_file) = arguments.admin.find_at_least()?;
    let token = arguments.token.or(of_file.map(|Secret(token)| token));
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
        let detail = said["detail"].as_str();
        let detail = detail.unwrap_or("without a word why: is it weir's admin port?");
        let mend = if status == 401 { MEND_OF_401 } else { "" };
        bail!("{address} says {status}: {detail}{mend}");
    }
    print("its clients are told to leave, and served on until it is ended\n")
}
