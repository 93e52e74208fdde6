//! `weir session`: starts, lists, shows and ends sessions over the admin API.

use std::io::{self, ErrorKind, Write as _};
use std::net::SocketAddr;

use anyhow::{Context, bail, ensure};
use clap::{Args, Subcommand};
use hyper::Method;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::{Map, Value, json};

use super::client::{AdminPort, AdminToken, Call, MEND_OF_401, WITHIN, call, detail};
use super::{print, seen};

#[derive(Args)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    admin: AdminPort,
    #[command(flatten)]
    token: AdminToken,
    /// Which sessions, where the configuration has several.
    #[arg(long, global = true, value_name = "NAME")]
    sessions: Option<String>,
}

#[derive(Subcommand)]
enum Command {
    /// Start a session and print it, with its token: the only time that the token is shown.
    #[command(
        after_help = "Example: weir session create ann -c weir.yaml --claim role=customer --claim level=3"
    )]
    Create {
        /// Whose session, as the app is to be told.
        user: String,
        /// What is known of the user; may be given several times. Values are JSON, or else text.
        #[arg(long = "claim", value_name = "NAME=VALUE", value_parser = claim)]
        claims: Vec<(String, Value)>,
    },
    /// List live sessions, a JSON object a line.
    #[command(after_help = "Example: weir session list -c weir.yaml --user ann")]
    List {
        /// Of this user alone.
        #[arg(long)]
        user: Option<String>,
    },
    /// Show one session.
    #[command(
        after_help = "Example: weir session show -c weir.yaml 4f1d7a20c6e98b35d2407f6b91ce03a8"
    )]
    Show {
        /// As `list` shows it.
        id: String,
    },
    /// End one session, or with --user all of a user.
    #[command(
        after_help = "Example: weir session revoke -c weir.yaml 4f1d7a20c6e98b35d2407f6b91ce03a8\nExample: weir session revoke -c weir.yaml --user ann"
    )]
    Revoke(Revoked),
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct Revoked {
    /// As `list` shows it.
    id: Option<String>,
    /// End all sessions of this user.
    #[arg(long)]
    user: Option<String>,
}

/// Does the command; an error tells what the admin API said.
pub fn run(arguments: Arguments) -> anyhow::Result<()> {
    let Arguments {
        command,
        admin,
        token,
        sessions,
    } = arguments;
    let (address, of_file) = admin.find()?;
    let token = token.or(of_file);
    let port = Port {
        address,
        token,
        sessions,
    };
    let mut out = io::stdout();
    match command {
        Command::Create { user, claims } => {
            let claims: Map<_, _> = claims.into_iter().collect();
            let body = json!({ "user": user, "claims": claims });
            let created = port.ask(Method::POST, "", &[], body.to_string(), Some("token"))?;
            print(&seen(&format!("{created:#}\n")))?;
        }
        Command::List { user } => {
            let mut after: Option<String> = None;
            loop {
                let of_user = user.iter().map(|user| ("user", user.as_str()));
                let from = after.iter().map(|id| ("after", id.as_str()));
                let query: Vec<_> = of_user.chain(from).collect();
                let page = port.ask(Method::GET, "", &query, String::new(), Some("sessions"))?;
                for session in page["sessions"].as_array().into_iter().flatten() {
                    match writeln!(out, "{}", seen(&session.to_string())) {
                        // The rest is not asked for.
                        Err(error) if error.kind() == ErrorKind::BrokenPipe => return Ok(()),
                        written => written?,
                    }
                }
                match page["next"].as_str() {
                    Some(next) => after = Some(next.to_owned()),
                    None => break,
                }
            }
        }
        Command::Show { id } => {
            let path = format!("/{}", escaped(&id));
            let session = port.ask(Method::GET, &path, &[], String::new(), Some("id"))?;
            print(&seen(&format!("{session:#}\n")))?;
        }
        Command::Revoke(Revoked { id: Some(id), .. }) => {
            let path = format!("/{}", escaped(&id));
            port.ask(Method::DELETE, &path, &[], String::new(), None)?;
            print("ended 1\n")?;
        }
        Command::Revoke(Revoked { id: None, user }) => {
            let user = user.unwrap_or_default();
            let of_user = [("user", user.as_str())];
            let said = port.ask(Method::DELETE, "", &of_user, String::new(), Some("ended"))?;
            print(&format!("ended {}\n", said["ended"]))?;
        }
    }
    Ok(())
}

/// The admin port, and what each call of it has.
struct Port {
    address: SocketAddr,
    token: Option<String>,
    /// The name of the entry.
    sessions: Option<String>,
}

impl Port {
    /// Asks below `/v1/sessions`. `has` is a key of the answer; `None` where it is to be empty: another server may have an answer of its own to
    /// each path.
    fn ask(
        &self,
        method: Method,
        path: &str,
        query: &[(&str, &str)],
        body: String,
        has: Option<&str>,
    ) -> anyhow::Result<Value> {
        let address = self.address;
        let named = self.sessions.iter();
        let named = named.map(|name| ("sessions", name.as_str()));
        let pairs = query.iter().copied().chain(named);
        let query: Vec<_> = pairs
            .map(|(key, value)| format!("{key}={}", escaped(value)))
            .collect();
        let (status, answer) = call(Call {
            address,
            method,
            path: &format!("/v1/sessions{path}?{}", query.join("&")),
            token: self.token.as_deref(),
            body,
            within: WITHIN,
        })?;
        let answer: Value = match answer.as_str() {
            "" => Value::Null,
            json => serde_json::from_str(json).with_context(|| {
                format!("{address} did not answer in JSON ({status}): is it weir's admin port?")
            })?,
        };
        if !(200..300).contains(&status) {
            let detail = detail(&answer);
            let mend = match status {
                401 => MEND_OF_401,
                400 if detail.contains("sessions=NAME") => "; here by --sessions NAME",
                _ => "",
            };
            bail!("{address} says {status}: {detail}{mend}");
        }
        let is_there = match has {
            Some(key) => !answer[key].is_null(),
            None => answer.is_null(),
        };
        ensure!(
            is_there,
            "{address} answered something else ({status}): is it weir's admin port?"
        );
        Ok(answer)
    }
}

fn escaped(text: &str) -> String {
    utf8_percent_encode(text, NON_ALPHANUMERIC).to_string()
}

fn claim(text: &str) -> Result<(String, Value), String> {
    let (name, value) = text
        .split_once('=')
        .filter(|(name, _)| !name.is_empty())
        .ok_or("use NAME=VALUE, for example role=customer")?;
    let value = serde_json::from_str(value).unwrap_or_else(|_| json!(value));
    Ok((name.to_owned(), value))
}
