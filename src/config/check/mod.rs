//! From the file as written to a [`Config`]: names resolved, defaults filled in, every mistake told at once. Reads no files.

mod addresses;
mod audit;
mod breakers;
pub mod limits;
mod listeners;
mod places;
mod postgres;
mod redis;
mod rewrite;
mod routes;
mod runtime;
mod sessions;
mod telemetry;
mod unused;
mod upstreams;
mod values;
mod ways_round;
mod worker;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use addresses::Listening;
use unused::{Kind, Named, RouteAt};
use values::{secret, time};

use crate::config::audit::Level;
use crate::config::breakers::CircuitBreaker;
use crate::config::raw;
use crate::config::tls::PemFile;
use crate::config::yaml::{self, At, Lookup, Mistake, Places, Position, told};
use crate::config::{Admin, Config};

const SECOND: Duration = Duration::from_secs(1);
const DAY: Duration = Duration::from_secs(86_400);

/// Of so many mistakes a mend is told with each that is an unknown name. It may be all names that there are, and is sought among them: of more, a
/// text of 64 KiB would make some 500 MB of messages.
const MENDED: usize = 100;

/// A file without mistakes.
pub struct Checked {
    pub config: Config,
    /// What weir does as the file says, and what is hardly meant; a file is no worse a file for it.
    pub warnings: Vec<Mistake>,
}

/// Reads the text of a file; `lookup` gives environment variables.
pub fn parse(text: &str, lookup: Lookup<'_>) -> Result<Config, Vec<Mistake>> {
    checked(text, lookup).map(|checked| checked.config)
}

/// Likewise, with the warnings.
pub fn checked(text: &str, lookup: Lookup<'_>) -> Result<Checked, Vec<Mistake>> {
    with_pem_files(text, lookup).0
}

/// Likewise; and right or wrong with every PEM file that the file names, of which none is read here.
pub fn with_pem_files(
    text: &str,
    lookup: Lookup<'_>,
) -> (Result<Checked, Vec<Mistake>>, Vec<PemFile>) {
    let (file, mut of_form, brought_in) = yaml::parse::<raw::File>(text, lookup);
    help(text, &mut of_form);
    let Some(file) = file else {
        return (Err(of_form), Vec::new());
    };
    let mut checker = Checker {
        of_form,
        brought_in,
        ..Checker::default()
    };
    let config = checker.file(file);
    let in_order = |mut said: Vec<Mistake>| {
        Mistake::sort(&mut said);
        said
    };
    checker.mistakes.append(&mut checker.of_form);
    let read = match checker.mistakes.is_empty() {
        true => Ok(Checked {
            config,
            warnings: in_order(checker.warnings),
        }),
        false => Err(in_order(checker.mistakes)),
    };
    (read, checker.pem_files)
}

/// Says where to begin in an empty file, and where help is to those who give a file of another proxy.
fn help(text: &str, mistakes: &mut [Mistake]) {
    let is_block = |line: &str| {
        let name = line.trim().strip_suffix('{').unwrap_or_default();
        let is_named = name.starts_with("location ") || name.starts_with("upstream ");
        is_named || ["server", "http"].contains(&name.trim_end())
    };
    let says = |line: &str| !matches!(line.trim().as_bytes(), [] | [b'#', ..] | b"---");
    if !text.lines().any(says) {
        for mistake in &mut *mistakes {
            "the file is empty: begin with \"listen: 127.0.0.1:8080\" and \"upstream: http://127.0.0.1:3000\", the app's address".clone_into(&mut mistake.message);
        }
    }
    let is_section = |line: &str| {
        let line = line.trim_end();
        let is_named = line.starts_with("frontend ") || line.starts_with("backend ");
        is_named || ["global", "defaults"].contains(&line)
    };
    let is_traefiks = |line: &str| ["routers:", "services:", "middlewares:"].contains(&line.trim());
    for mistake in mistakes {
        let is_of_several = ["a list stands", "a map stands"]
            .iter()
            .any(|start| mistake.message.starts_with(start));
        let long_form = match mistake.place.path.as_str() {
            "listen" => "listeners: [{address: \"0.0.0.0:8080\"}]",
            "upstream" => "upstreams: {app: {endpoints: [\"http://127.0.0.1:3000\"]}}",
            _ => "",
        };
        if is_of_several && !long_form.is_empty() {
            let (found, _) = mistake.message.split_once(':').unwrap_or_default();
            mistake.message =
                format!("{found}: for several, or one with settings, write {long_form}");
        }
        let proxy = match mistake.place.path.as_str() {
            "static_resources" | "dynamic_resources" => "Envoy",
            "entryPoints" | "providers" => "Traefik",
            "http" if text.lines().any(is_traefiks) => "Traefik",
            "" if text.lines().any(is_block) => "nginx",
            "" if text.lines().any(is_section) => "HAProxy",
            "apiVersion" => {
                mistake.message += "; this looks like a manifest of Kubernetes: give weir the text that stands in it";
                continue;
            }
            _ => continue,
        };
        mistake.message += &format!(
            "; this looks like a file of {proxy}: docs/coming-from.md says what stands for what"
        );
    }
}

#[derive(Default)]
struct Checker {
    /// What the file's reader could not read, by place: left out of what is checked.
    of_form: Vec<Mistake>,
    /// What variables and files brought in: it is not shown.
    brought_in: Places,
    /// The fields of a route whose values are not shown, once they are read.
    hidden: BTreeSet<String>,
    mistakes: Vec<Mistake>,
    warnings: Vec<Mistake>,
    pem_files: Vec<PemFile>,
    /// Where each entry stands that others name.
    named: Vec<Named>,
    /// Where each route stands that was read.
    routes_at: Vec<RouteAt>,
    /// The names of the upstreams that may start and end sessions, and where each says so.
    trusted: Vec<(String, Position)>,
    /// The index of each upstream in the configuration.
    upstreams: BTreeMap<String, usize>,
    /// The index of each limit.
    limits: BTreeMap<String, usize>,
    /// How many windows of each limit one request can meet; many routes ask.
    most_rules: Vec<usize>,
    /// The names of the limits that count by the session, by index.
    of_session: BTreeMap<usize, String>,
    breakers: BTreeMap<String, CircuitBreaker>,
    /// Whether the file has `redis`; right or wrong.
    has_redis: bool,
    /// Likewise, `postgres`.
    has_postgres: bool,
    /// Of routes that do not say; `None` where the file has no audit.
    audit_level: Option<Level>,
    /// Where the audit's `capture` stands, if it names headers.
    captures_at: Option<Position>,
    /// Whether a route goes to an upstream, or does not say where.
    needs_upstream: bool,
    /// Request fields that tell upstreams who asks, as [`crate::http1::hygiene::folded`].
    identity_fields: Vec<Vec<u8>>,
    /// The index of each entry of `sessions`.
    sessions: BTreeMap<String, usize>,
    /// By how many bits listeners tell IPv6 clients apart.
    ipv6_prefixes: BTreeSet<u8>,
    /// What the process listens on.
    listening: Vec<Listening>,
    /// The endpoints that are no names of DNS, each as it is written in the configuration.
    endpoints: Vec<(Position, String)>,
}

impl Checker {
    fn file(&mut self, file: raw::File) -> Config {
        if let Some(At {
            value: Some(version),
            place,
        }) = file.version
            && version != 1
        {
            self.say(&place, format!("version {version} is not known: use 1"));
        }
        self.name(Kind::Limit, &file.rate_limits);
        self.name(Kind::Breaker, &file.circuit_breakers);
        self.name(Kind::Sessions, &file.sessions);
        self.name(Kind::Upstream, &file.upstreams);
        self.name_short(file.upstream.as_ref());
        self.has_redis = file.redis.is_some();
        self.has_postgres = file.postgres.is_some();
        let redis = file.redis.and_then(|at| self.redis(at));
        self.breakers(file.circuit_breakers);
        self.needs_upstream = file.routes.as_ref().is_none_or(|at| {
            let routes = at.value.iter().flatten();
            let mut routes = routes.filter_map(|at| at.value.as_ref());
            routes.any(|route| route.redirect.is_none() && route.reply.is_none())
        });
        let upstreams = self.upstreams(file.upstream, file.upstreams);
        let listeners = self.listeners(file.listen, file.listeners);
        self.ipv6_prefixes = listeners
            .iter()
            .map(|listener| listener.ipv6_prefix)
            .collect();
        let defaults = told(file.rate_limit_defaults).unwrap_or_default();
        let limit_defaults = self.limit_defaults(defaults);
        let on_loss = limit_defaults.on_redis_loss;
        let (limits, on_every_route) = self.limits(file.rate_limit, file.rate_limits, on_loss);
        let sessions = self.sessions(file.sessions);
        self.identity_fields = rewrite::identity_fields(&sessions);
        let has_audit = file.audit.is_some();
        let postgres = file.postgres.and_then(|at| self.postgres(at, has_audit));
        let worker = self.worker(told(file.worker).unwrap_or_default());
        let audit = told(file.audit).map(|raw| self.audit(raw));
        self.audit_level = audit.as_ref().map(|audit| audit.level);
        let routes = self.routes(file.routes, upstreams.len(), &on_every_route);
        let (lanes, shed) = self.runtime(told(file.runtime).unwrap_or_default());
        let shutdown = told(file.shutdown).unwrap_or_default();
        let admin = self.admin(told(file.admin).unwrap_or_default());
        let metrics = told(file.metrics).unwrap_or_default();
        let metrics_address = metrics.address;
        let metrics_address = metrics_address.map(|at| self.control_address(at));
        let telemetry = self.telemetry(told(file.telemetry).unwrap_or_default());
        let listening = std::mem::take(&mut self.listening);
        self.one_place_each(&listening);
        self.warn_of_circles(&listening);
        let config = Config {
            log: telemetry.log,
            access_log: telemetry.access_log,
            traces: telemetry.traces,
            admin,
            metrics_address,
            max_series: told(metrics.max_series).map_or(2_000, |series| series as usize),
            listeners,
            upstreams,
            routes,
            limits,
            limit_defaults,
            sessions,
            redis,
            audit,
            postgres,
            worker,
            lanes,
            shed,
            propagation_delay: time(shutdown.propagation_delay, Duration::ZERO),
            drain: time(shutdown.drain, 25 * SECOND),
        };
        self.warn_of_unused(&config);
        config
    }

    fn admin(&mut self, raw: raw::Admin) -> Admin {
        let has_token = raw.token.is_some();
        let token = raw.token.and_then(|at| {
            let spelt = self.is_spelt(&at);
            self.read(at, |text| match text {
                "" => {
                    Err("an empty token guards nothing: set one, or leave the key out".to_owned())
                }
                token => secret(token, spelt),
            })
        });
        let Some(at) = raw.address else {
            let address = SocketAddr::from(([127, 0, 0, 1], 9901));
            let place = Position::default().named("admin.address");
            self.listening.push(Listening::port(place, address));
            return Admin { address, token };
        };
        let place = at.place.clone();
        // What is no address is told as that alone.
        let text = at.value.as_deref().unwrap_or_default();
        let is_address = text.parse::<SocketAddr>().is_ok();
        let address = self.control_address(at);
        if is_address && !address.ip().is_loopback() && !has_token {
            let message =
                "an address that others reach needs admin.token: set one, or use 127.0.0.1";
            self.say(&place, message);
        }
        Admin { address, token }
    }

    /// Of what the control thread serves.
    fn control_address(&mut self, at: At<String>) -> SocketAddr {
        let place = at.place.clone();
        let address = self.address(at);
        self.listening.push(Listening::port(place, address));
        address
    }

    fn warn(&mut self, place: &Position, message: impl Into<String>) {
        let message = self.brought_in.told(place, message.into());
        self.warnings.push(Mistake {
            place: place.clone(),
            message,
        });
    }

    /// Says what is wrong with a value beside others, or that one lacks: unless that may be because of what was not read, in the
    /// same entry; anywhere, if it is about the file as a whole.
    fn say(&mut self, place: &Position, message: impl Into<String>) {
        let path = &place.path;
        let may_follow = |told: &Mistake| {
            let other = &told.place.path;
            is_own_key(path) || entry(other) == entry(path)
        };
        if !self.of_form.iter().any(may_follow) {
            self.refuse(place, message);
        }
    }

    /// Likewise of what stands beside other sections: unless that may also be because of one of the file's own keys.
    fn say_of_file(&mut self, place: &Position, message: impl Into<String>) {
        let mut of_form = self.of_form.iter();
        if !of_form.any(|told| is_own_key(&told.place.path)) {
            self.say(place, message);
        }
    }

    /// Says that nothing has a name that is used: unless it may have, where it was not read.
    fn say_unknown(&mut self, kind: Kind, place: &Position, name: &str) {
        let known = self.names(kind);
        let mut of_form = self.of_form.iter();
        if known.contains(name) || of_form.any(|told| is_own_key(&told.place.path)) {
            return;
        }
        if self.mistakes.len() >= MENDED {
            return self.refuse(place, format!("unknown {kind} \"{name}\""));
        }
        let mend = match kind {
            Kind::Limit if name.contains('/') => {
                "a route names limits: define one under rate_limits, such as \"per_client: {limit: 100/s, by: client.ip}\"".to_owned()
            }
            _ => yaml::did_you_mean_own(name, &Vec::from_iter(known)),
        };
        self.refuse(place, format!("unknown {kind} \"{name}\"; {mend}"));
    }

    /// Says what is wrong with a value by itself.
    fn refuse(&mut self, place: &Position, message: impl Into<String>) {
        let message = self.brought_in.told(place, message.into());
        self.mistakes.push(Mistake {
            place: place.clone(),
            message,
        });
    }
}

/// Whether the path is that of a key of the file's own, such as a section.
fn is_own_key(path: &str) -> bool {
    !path.contains(['.', '['])
}

/// The part of a path that tells a section or, of a section of several, the entry.
fn entry(path: &str) -> &str {
    let section = path.find(['.', '[']).unwrap_or(path.len());
    let of_several = [
        "listeners",
        "upstreams",
        "routes",
        "rate_limits",
        "circuit_breakers",
        "sessions",
    ];
    if !of_several.contains(&&path[..section]) || section == path.len() {
        return &path[..section];
    }
    let name = section + 1;
    let end = path[name..].find(['.', '[', ']']);
    end.map_or(path, |length| &path[..name + length])
}

#[cfg(test)]
mod tests;
