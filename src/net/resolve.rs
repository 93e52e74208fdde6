//! Names to addresses, by DNS; no other module knows the crate that speaks it. Must not know when a name is looked up.
//!
//! By a resolver of its own, not the system's: that one says nothing of how long an answer holds, and keeps a thread for each call.
//! This one reads `/etc/resolv.conf` and `/etc/hosts` as the system's does, search domains included.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::future::{join_all, select_ok};
use hickory_resolver::config::{
    ConnectionConfig, LookupIpStrategy, NameServerConfig, ResolveHosts, ResolverConfig,
    ResolverOpts,
};
use hickory_resolver::lookup_ip::LookupIp;
use hickory_resolver::net::NetError;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::proto::op::Query;
use hickory_resolver::proto::rr::{Name, RecordType};
use hickory_resolver::system_conf::read_system_conf;
use hickory_resolver::{Hosts, TokioResolver};
use thiserror::Error;
use tokio::time::timeout;
use tracing::dispatcher::{self, Dispatch};

use crate::clock;

/// For all tries of one look.
const WITHIN: Duration = Duration::from_secs(10);

/// The shortest time that an answer holds, and the first wait behind a failure.
pub const SOONEST: Duration = Duration::from_secs(1);

/// A name has no address any more once so many looks in a row have found none. One alone may have come in between a service's end and
/// its next start.
pub const GONE_AFTER: u32 = 3;

/// How long what the machine itself says of a name holds: it may change, and is looked at for little.
const AT_HAND: Duration = Duration::from_secs(1);

/// Which addresses of a name are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    All,
    /// IPv4 ones, or IPv6 ones where there are no others.
    OneFamily,
}

/// What a name stands for.
#[derive(Debug)]
pub struct Resolved {
    /// At least one.
    pub addresses: Vec<IpAddr>,
    pub holds_for: Duration,
}

#[derive(Debug, Error)]
pub enum ResolveError {
    #[error("{0}")]
    Failed(#[from] NetError),
    /// All name servers say so: none has failed.
    #[error("the name has no address")]
    Nothing,
    /// It has IPv6 addresses.
    #[error("no name server says whether the name has IPv4 addresses")]
    Half,
    #[error("no name server answered in time")]
    Late,
}

/// Looks the name up, by these name servers, or as the system does where there are none. One that `had_ipv4` addresses has none any more
/// where a name server says so, and not where it has none to say.
pub async fn resolve(
    name: &str,
    servers: &[SocketAddr],
    wanted: Wanted,
    had_ipv4: bool,
) -> Result<Resolved, ResolveError> {
    if let Ok(address) = name.parse() {
        return Ok(Resolved {
            addresses: vec![address],
            holds_for: AT_HAND,
        });
    }
    // Not as UTF-8, which takes no underscore.
    let name = &Name::from_ascii(name).map_err(NetError::from)?;
    if servers.is_empty()
        && let Some(addresses) = at_hand(name, wanted)
    {
        return Ok(Resolved {
            addresses,
            holds_for: AT_HAND,
        });
    }
    // Made for each look, which is rare: so a resolv.conf or hosts file that has changed is read, and nothing is remembered for longer than
    // the file of weir says.
    let (config, options) = configuration(servers, wanted)?;
    let resolver = resolver(config.clone(), options.clone())?;
    let look = async {
        let whole = async |found: LookupIp| {
            let has_ipv4 = found.iter().any(|address| address.is_ipv4());
            let full = found.query().name();
            let is_whole = !had_ipv4 || has_ipv4 || has_no_ipv4(&config, &options, full).await;
            is_whole.then_some(found).ok_or(ResolveError::Half)
        };
        let error = match resolver.lookup_ip(name.clone()).await {
            Ok(found) => return whole(found).await,
            Err(error) => error,
        };
        if let Some(found) = by_any(&config, &options, name).await {
            return whole(found).await;
        }
        match error.is_no_records_found() && is_nowhere(&config, &options, name).await {
            true => Err(ResolveError::Nothing),
            false => Err(error.into()),
        }
    };
    let found = timeout(WITHIN, look)
        .await
        .map_err(|_| ResolveError::Late)??;
    let addresses: Vec<_> = found.iter().collect();
    match addresses.is_empty() {
        true => Err(ResolveError::Nothing),
        false => Ok(Resolved {
            addresses,
            holds_for: found.valid_until().saturating_duration_since(clock::now()),
        }),
    }
}

/// What the hosts file says of a name goes before what name servers say, as the system has it, of both families together: what has an IPv4
/// address there is not asked for elsewhere. `localhost` is known where nothing says so.
fn at_hand(name: &Name, wanted: Wanted) -> Option<Vec<IpAddr>> {
    static TOLD: AtomicBool = AtomicBool::new(false);
    let mut hosts = Hosts::default();
    // Not as UTF-8: one comment that is none would take all of the file with it.
    if let Ok(bytes) = fs::read("/etc/hosts") {
        let text = String::from_utf8_lossy(&bytes);
        let _ = telling_once(&TOLD, || hosts.read_hosts_conf(text.as_bytes()));
    }
    let of = |kind| hosts.lookup_static_host(&Query::query(name.clone(), kind));
    let found: Vec<_> = [of(RecordType::A), of(RecordType::AAAA)]
        .iter()
        .flatten()
        .flat_map(|lookup| lookup.answers())
        .filter_map(|record| record.data.ip_addr())
        .collect();
    let mut absolute = name.clone();
    absolute.set_fqdn(true);
    let mut addresses = match found.is_empty() && absolute.is_localhost() {
        true => vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()],
        false => found,
    };
    if wanted == Wanted::OneFamily && addresses.iter().any(IpAddr::is_ipv4) {
        addresses.retain(IpAddr::is_ipv4);
    }
    (!addresses.is_empty()).then_some(addresses)
}

/// The first answer of several name servers, each asked by itself: where they are asked together, that of one which fails may end the look.
async fn by_any(config: &ResolverConfig, options: &ResolverOpts, name: &Name) -> Option<LookupIp> {
    if config.name_servers().len() < 2 {
        return None;
    }
    let looks = config.name_servers().iter().map(|server| {
        Box::pin(async {
            let (domain, search) = (config.domain().cloned(), config.search().to_vec());
            let alone = ResolverConfig::from_parts(domain, search, vec![server.clone()]);
            let resolver = resolver(alone, options.clone())?;
            resolver.lookup_ip(name.clone()).await
        })
    });
    select_ok(looks).await.ok().map(|(found, _)| found)
}

/// Whether a name server says so: that one fails for IPv4 and answers for IPv6 is no such word.
async fn has_no_ipv4(config: &ResolverConfig, options: &ResolverOpts, name: &Name) -> bool {
    let looks = config.name_servers().iter().map(async |server| {
        let alone = ResolverConfig::from_name_servers(vec![server.clone()]);
        let Ok(resolver) = resolver(alone, options.clone()) else {
            return false;
        };
        let looked = resolver.lookup(name.clone(), RecordType::A).await;
        looked.is_err_and(|error| error.is_no_records_found())
    });
    join_all(looks).await.into_iter().any(|says_so| says_so)
}

/// Whether each name server says so, of the name itself and of the name in each search domain. A look's own error is not enough: it is that
/// of the last name tried, and one server's "there is none" outweighs that another did not answer.
async fn is_nowhere(config: &ResolverConfig, options: &ResolverOpts, name: &Name) -> bool {
    let mut suffixes = vec![Name::root()];
    if !name.is_fqdn() {
        suffixes.extend(config.search().iter().chain(config.domain()).cloned());
    }
    // One that would be too long is not there.
    let full = |suffix| name.clone().append_domain(suffix).ok();
    let names: Vec<_> = suffixes.iter().filter_map(full).collect();
    let servers = config.name_servers().iter().map(async |server| {
        let alone = ResolverConfig::from_name_servers(vec![server.clone()]);
        let Ok(resolver) = resolver(alone, options.clone()) else {
            return false;
        };
        for name in &names {
            for kind in [RecordType::A, RecordType::AAAA] {
                let looked = resolver.lookup(name.clone(), kind).await;
                if !looked.is_err_and(|error| error.is_no_records_found()) {
                    return false;
                }
            }
        }
        true
    });
    join_all(servers).await.into_iter().all(|says_so| says_so)
}

/// Whom to ask, and how.
fn configuration(
    servers: &[SocketAddr],
    wanted: Wanted,
) -> Result<(ResolverConfig, ResolverOpts), NetError> {
    static TOLD: AtomicBool = AtomicBool::new(false);
    let (config, mut options) = match servers {
        [] => telling_once(&TOLD, read_system_conf)?,
        servers => {
            let servers = servers.iter().map(|server| {
                let by = |mut way: ConnectionConfig| {
                    way.port = server.port();
                    way
                };
                let ways = vec![by(ConnectionConfig::udp()), by(ConnectionConfig::tcp())];
                NameServerConfig::new(server.ip(), true, ways)
            });
            let config = ResolverConfig::from_name_servers(servers.collect());
            (config, ResolverOpts::default())
        }
    };
    options.use_hosts_file = ResolveHosts::Never;
    options.ip_strategy = match wanted {
        Wanted::All => LookupIpStrategy::Ipv4AndIpv6,
        Wanted::OneFamily => LookupIpStrategy::Ipv4thenIpv6,
    };
    Ok((config, options))
}

/// What the crate has against a file it would tell with each look.
fn telling_once<T>(told: &AtomicBool, read: impl FnOnce() -> T) -> T {
    match told.swap(true, Ordering::Relaxed) {
        false => read(),
        true => dispatcher::with_default(&Dispatch::none(), read),
    }
}

fn resolver(config: ResolverConfig, options: ResolverOpts) -> Result<TokioResolver, NetError> {
    let provider = TokioRuntimeProvider::default();
    let builder = TokioResolver::builder_with_config(config, provider);
    builder.with_options(options).build()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_address_stands_for_itself() {
        for text in ["10.0.0.5", "::1"] {
            let resolved = resolve(text, &[], Wanted::OneFamily, false).await.unwrap();
            assert_eq!(resolved.addresses, [text.parse::<IpAddr>().unwrap()]);
        }
    }
}
