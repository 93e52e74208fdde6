//! Calls to the admin port of a running weir.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use http_body_util::Full;
use hyper::client::conn::http1;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::{load, parsed, tell, text};
use crate::config::{Admin, Secret, check};
use crate::net::body;

/// All of a call, from the connection to the answer's last byte, unless the caller has less time.
pub(super) const WITHIN: Duration = Duration::from_secs(5);

/// Bytes of an answer, at most; a page of sessions has far fewer.
const MAX_ANSWER: usize = 64 << 20;

/// How an [`AdminToken`] is given.
pub(super) const MEND_OF_401: &str = "; here by -c FILE, --token or WEIR_ADMIN_TOKEN";

/// The admin port of a weir on this machine.
#[derive(clap::Args)]
pub(super) struct AdminPort {
    /// The admin port.
    #[arg(
        long,
        global = true,
        alias = "admin",
        value_name = "IP:PORT",
        default_value = "127.0.0.1:9901"
    )]
    address: SocketAddr,
    /// Ask the admin port of this configuration file.
    #[arg(
        short,
        long,
        global = true,
        value_name = "FILE",
        conflicts_with = "address"
    )]
    config: Option<PathBuf>,
}

/// The token that the admin port wants.
#[derive(clap::Args)]
pub(super) struct AdminToken {
    /// The admin token; with --config that of the file, unless told.
    #[arg(
        long,
        global = true,
        value_name = "TOKEN",
        env = "WEIR_ADMIN_TOKEN",
        hide_env_values = true
    )]
    token: Option<String>,
}

impl AdminToken {
    /// What is given, or else that of the file.
    pub(super) fn or(self, of_file: Option<Secret>) -> Option<String> {
        self.token.or(of_file.map(|Secret(token)| token))
    }
}

impl AdminPort {
    /// Where it is asked; an error if the file has mistakes.
    pub(super) fn address(&self) -> anyhow::Result<SocketAddr> {
        Ok(self.find()?.0)
    }

    /// As [`AdminPort::find`], though the file may have mistakes: whoever runs goes on by what it read before those were made. An error for
    /// a file that cannot be read at all.
    pub(super) fn find_at_least(&self) -> anyhow::Result<(SocketAddr, Option<Secret>)> {
        let Some(file) = &self.config else {
            return Ok((self.address, None));
        };
        let text = text(file)?;
        let (address, token) = match parsed(file, &text) {
            Ok(checked) => {
                let admin = checked.config.admin;
                (admin.address, admin.token)
            }
            Err(error) => {
                let has_admin = text.lines().any(|line| line.starts_with("admin:"));
                let admin = of_admin_alone(&text);
                let why = match &admin {
                    Some(_) if has_admin => "as its `admin` says",
                    Some(_) => "the default",
                    None => "the default, as its `admin` has mistakes, too",
                };
                let (address, token) = match admin {
                    Some(admin) => (admin.address, admin.token),
                    None => (self.address, None),
                };
                tell(&format!(
                    "warning: {error:#}\n  a weir that runs goes on by what it read before; asking {address}, {why}"
                ));
                (address, token)
            }
        };
        Ok((reachable(address), token))
    }

    /// Where it is asked, and the token that it wants as far as the file says; an error if that has mistakes.
    pub(super) fn find(&self) -> anyhow::Result<(SocketAddr, Option<Secret>)> {
        let Some(file) = &self.config else {
            return Ok((self.address, None));
        };
        let admin = load(file)?.admin;
        Ok((reachable(admin.address), admin.token))
    }
}

/// One call.
pub(super) struct Call<'a> {
    pub address: SocketAddr,
    pub method: Method,
    /// With its query.
    pub path: &'a str,
    pub token: Option<&'a str>,
    /// JSON, or empty.
    pub body: String,
    pub within: Duration,
}

/// Why a call was refused, as the answer says.
pub(super) fn detail(answer: &Value) -> &str {
    let detail = answer["detail"].as_str();
    detail.unwrap_or("without a word why: is it weir's admin port?")
}

/// The status and the body of the answer.
pub(super) fn call(call: Call<'_>) -> anyhow::Result<(u16, String)> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let (address, within) = (call.address, call.within);
    let asked = runtime.block_on(async { timeout(within, ask(call)).await });
    asked.with_context(|| {
        format!("{address} did not answer within {within:?}: is it weir's admin port?")
    })?
}

async fn ask(call: Call<'_>) -> anyhow::Result<(u16, String)> {
    let address = call.address;
    let stream = TcpStream::connect(address)
        .await
        .with_context(|| format!("cannot reach the admin port {address}: is weir running?"))?;
    let exchange = exchange(stream, call).await;
    exchange.with_context(|| format!("{address} did not answer as HTTP: is it weir's admin port?"))
}

async fn exchange(stream: TcpStream, call: Call<'_>) -> anyhow::Result<(u16, String)> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let mut request = Request::builder()
        .method(call.method)
        .uri(call.path)
        .header(HOST, call.address.to_string());
    if let Some(token) = call.token {
        request = request.header(AUTHORIZATION, format!("Bearer {token}"));
    }
    if !call.body.is_empty() {
        request = request.header(CONTENT_TYPE, "application/json");
    }
    let request = request.body(Full::<Bytes>::from(call.body))?;
    let response = sender.send_request(request).await?;
    let status = response.status().as_u16();
    let body = body::whole(response.into_body(), MAX_ANSWER).await;
    let body = body.map_err(anyhow::Error::from_boxed)?;
    Ok((status, String::from_utf8_lossy(&body).into_owned()))
}

/// What the file's key `admin` says by itself, or the default where there is none; `None` where that has mistakes, too.
fn of_admin_alone(text: &str) -> Option<Admin> {
    let is_within = |line: &&str| line.is_empty() || line.starts_with([' ', '\t', '#', '}']);
    let mut lines = text.lines().skip_while(|line| !line.starts_with("admin:"));
    let first = lines.next();
    let block: Vec<_> = first
        .into_iter()
        .chain(lines.take_while(is_within))
        .collect();
    let alone = format!(
        "listen: 127.0.0.1:0\nupstream: http://127.0.0.1:1\n{}\n",
        block.join("\n")
    );
    let parsed = check::parse(&alone, &|name| std::env::var(name).ok());
    parsed.ok().map(|config| config.admin)
}

/// Where a port that listens on all addresses is asked from its own machine: `[::]` takes IPv4 as well, and not every machine has `::1`.
fn reachable(address: SocketAddr) -> SocketAddr {
    match address.ip().is_unspecified() {
        true => SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), address.port()),
        false => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_on_all_addresses_is_asked_on_the_loopback() {
        for (address, asked) in [
            ("0.0.0.0:1", "127.0.0.1:1"),
            ("[::]:1", "127.0.0.1:1"),
            ("10.0.0.1:1", "10.0.0.1:1"),
        ] {
            assert_eq!(reachable(address.parse().unwrap()).to_string(), asked);
        }
    }

    #[test]
    fn the_admin_port_is_found_in_a_file_with_mistakes() {
        let check = |text: &str, expected: Option<&str>| {
            let found = of_admin_alone(text).map(|admin| admin.address.to_string());
            assert_eq!(found.as_deref(), expected, "{text:?}");
        };
        let port = Some("127.0.0.1:7");
        check(
            "rotues: []\nadmin: {address: 127.0.0.1:7}\nlisten: x\n",
            port,
        );
        check(
            "routes: [\nadmin:\n  # Ours.\n\n  address: 127.0.0.1:7\nlisten: [",
            port,
        );
        check("admin:\r\n  address: 127.0.0.1:7\r\nlisten: {\r\n", port);
        check("admin: {\n  address: 127.0.0.1:7,\n}\nx: [", port);
        check("listen: [", Some("127.0.0.1:9901"));
        check(
            "# admin: {address: 127.0.0.1:7}\nadministrator: 1",
            Some("127.0.0.1:9901"),
        );
        check("admin: {adress: 127.0.0.1:7}\n", None);
        check("admin: {address: 127.0.0.1:7\n", None);
    }
}
