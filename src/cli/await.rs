//! `weir await`: waits until a weir on this machine is ready.

use std::time::Duration;

use anyhow::bail;
use hyper::Method;

use super::client::{AdminPort, Call, WITHIN, call};
use crate::clock;
use crate::config::units::TimeLength;

/// Between questions.
const PAUSE: Duration = Duration::from_millis(100);

#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    admin: AdminPort,
    /// How long to wait.
    #[arg(long, value_name = "DURATION", default_value = "2m")]
    timeout: TimeLength,
}

/// Returns once /ready says 200; an error with the last answer if that takes too long.
pub fn run(arguments: Arguments) -> anyhow::Result<()> {
    let address = arguments.admin.address()?;
    let TimeLength(within) = arguments.timeout;
    let deadline = clock::now() + within;
    loop {
        let left = deadline.saturating_duration_since(clock::now());
        let last = match call(Call {
            address,
            method: Method::GET,
            path: "/ready",
            token: None,
            body: String::new(),
            within: left.min(WITHIN),
        }) {
            Ok((200, _)) => return Ok(()),
            Ok((status, body)) => format!("it says {status}: {}", body.trim_end()),
            Err(error) => format!("{error:#}"),
        };
        if clock::now() + PAUSE >= deadline {
            bail!(
                "{address}/ready was not 200 within {}: {last}",
                TimeLength(within)
            );
        }
        std::thread::sleep(PAUSE);
    }
}
