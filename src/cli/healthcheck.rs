//! `weir healthcheck`: asks the admin port of a weir on this machine.

use anyhow::bail;
use hyper::Method;
use serde_json::Value;

use super::client::{AdminPort, Call, WITHIN, call};
use super::print;

#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    admin: AdminPort,
    /// Ask /ready: whether it can take traffic.
    #[arg(long)]
    ready: bool,
    /// Ask /live: whether it goes on, or needs a restart.
    #[arg(long, conflicts_with = "ready")]
    live: bool,
}

/// Prints what is said; an error unless that is 200, in time. A file that has got mistakes takes nothing that runs out of service: they are warned of.
pub fn run(arguments: Arguments) -> anyhow::Result<()> {
    let address = arguments.admin.find_at_least()?.0;
    let path = match (arguments.ready, arguments.live) {
        (true, _) => "/ready",
        (_, true) => "/live",
        (false, false) => "/health",
    };
    let (status, body) = call(Call {
        address,
        method: Method::GET,
        path,
        token: None,
        body: String::new(),
        within: WITHIN,
    })?;
    if let Ok(said) = serde_json::from_str(&body) {
        print(&format!("{}\n", summary(&said)))?;
    }
    print(&format!("{body}\n"))?;
    if status != 200 {
        bail!("{address}{path} says {status}");
    }
    Ok(())
}

/// Status, uptime and memory, as far as they are told.
fn summary(said: &Value) -> String {
    let mut summary = said["status"].as_str().unwrap_or("unknown").to_owned();
    if let Some(seconds) = said["uptime_seconds"].as_u64() {
        summary += &format!(", up {seconds} s");
    }
    if let Some(bytes) = said["checks"]["memory"]["resident_bytes"].as_u64() {
        summary += &format!(", {} MiB of memory", bytes >> 20);
    }
    summary
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_first_line_says_status_uptime_and_memory() {
        let said = json!({"status": "ok", "uptime_seconds": 7, "checks": {"memory": {"resident_bytes": 9 << 20}}});
        assert_eq!(summary(&said), "ok, up 7 s, 9 MiB of memory");
        assert_eq!(summary(&json!({"status": "ready"})), "ready");
    }
}
