//! Names to addresses, by DNS; no other module knows the crate that speaks it.
//!
//! By a resolver of its own, not the system's: that one says nothing of how long an answer holds, and keeps a thread for each call.
//! This one reads `/etc/resolv.conf` and `/etc/hosts` as the system's does, search domains included.

use std::net::SocketAddr;
use std::time::Duration;

use futures_util::future::{join_all, select_ok};
use hickory_resolver::TokioResolver;
use hickory_resolver::config::{
    ConnectionConfig, LookupIpStrategy, NameServerConfig, ResolveHosts, ResolverConfig,
    ResolverOpts,
};
use hickory_resolver::lookup_ip::LookupIp;
use hickory_resolver::net::NetError;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::proto::rr::{Name, RecordType};
use hickory_resolver::system_conf::read_system_conf;
use thiserror::Error;
use tokio::time::timeout;

use crate::clock;
use crate::config::upstreams::DnsName;

/// For all tries of one look.
const WITHIN: Duration = Duration::from_secs(10);

/// What a name stands for.
#[derive(Debug)]
pub(super) struct Resolved {
    /// IPv4 ones, or IPv6 ones where there are no others; at least one.
    pub addresses: Vec<SocketAddr>,
    pub holds_for: Duration,
}

#[derive(Debug, Error)]
pub(super) enum ResolveError {
    #[error("{0}")]
    Failed(#[from] NetError),
    /// All name servers say so: none has failed.
    #[error("the name has no address")]
    Nothing,
    #[error("no name server answered in time")]
    Late,
}

/// Looks the name up.
pub(super) async fn resolve(name: &DnsName) -> Result<Resolved, ResolveError> {
    // Made for each look, which is rare: so a resolv.conf or hosts file that has changed is read, and nothing is remembered for longer than
    // the file of weir says.
    let (config, options) = configuration(name)?;
    let resolver = resolver(config.clone(), options.clone())?;
    let look = async {
        let error = match resolver.lookup_ip(name.name.as_str()).await {
            Ok(found) => return Ok(found),
            Err(error) => error,
        };
        if let Some(found) = by_any(&config, &options, name).await {
            return Ok(found);
        }
        match error.is_no_records_found() && is_nowhere(&config, &options, name).await {
            true => Err(ResolveError::Nothing),
            false => Err(error.into()),
        }
    };
    let found = timeout(WITHIN, look)
        .await
        .map_err(|_| ResolveError::Late)??;
    let addresses: Vec<_> = found
        .iter()
        .map(|ip| SocketAddr::new(ip, name.port))
        .collect();
    match addresses.is_empty() {
        true => Err(ResolveError::Nothing),
        false => Ok(Resolved {
            addresses,
            holds_for: found.valid_until().saturating_duration_since(clock::now()),
        }),
    }
}

/// The first answer of several name servers, each asked by itself: where they are asked together, that of one which fails may end the look.
async fn by_any(
    config: &ResolverConfig,
    options: &ResolverOpts,
    name: &DnsName,
) -> Option<LookupIp> {
    if config.name_servers().len() < 2 {
        return None;
    }
    let looks = config.name_servers().iter().map(|server| {
        Box::pin(async {
            let (domain, search) = (config.domain().cloned(), config.search().to_vec());
            let alone = ResolverConfig::from_parts(domain, search, vec![server.clone()]);
            let resolver = resolver(alone, options.clone())?;
            resolver.lookup_ip(name.name.as_str()).await
        })
    });
    select_ok(looks).await.ok().map(|(found, _)| found)
}

/// Whether each name server says so, of the name itself and of the name in each search domain. A look's own error is not enough: it is that
/// of the last name tried, and one server's "there is none" outweighs that another did not answer.
async fn is_nowhere(config: &ResolverConfig, options: &ResolverOpts, name: &DnsName) -> bool {
    let Ok(relative) = Name::from_ascii(&name.name) else {
        return false;
    };
    let mut suffixes = vec![Name::root()];
    if !relative.is_fqdn() {
        suffixes.extend(config.search().iter().chain(config.domain()).cloned());
    }
    // One that would be too long is not there.
    let full = |suffix| relative.clone().append_domain(suffix).ok();
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
fn configuration(name: &DnsName) -> Result<(ResolverConfig, ResolverOpts), NetError> {
    let (config, mut options) = match name.servers.as_slice() {
        [] => read_system_conf()?,
        servers => {
            let servers = servers.iter().map(|server| {
                let by = |mut way: ConnectionConfig| {
                    way.port = server.port();
                    way
                };
                let ways = vec![by(ConnectionConfig::udp()), by(ConnectionConfig::tcp())];
                NameServerConfig::new(server.ip(), true, ways)
            });
            let mut options = ResolverOpts::default();
            options.use_hosts_file = ResolveHosts::Never;
            let config = ResolverConfig::from_name_servers(servers.collect());
            (config, options)
        }
    };
    // One address of a pod or server that has both is enough: two would count as two endpoints.
    options.ip_strategy = LookupIpStrategy::Ipv4thenIpv6;
    Ok((config, options))
}

fn resolver(config: ResolverConfig, options: ResolverOpts) -> Result<TokioResolver, NetError> {
    let provider = TokioRuntimeProvider::default();
    let builder = TokioResolver::builder_with_config(config, provider);
    builder.with_options(options).build()
}
