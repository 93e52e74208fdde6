//! Names to addresses, by DNS; no other module knows the crate that speaks it.
//!
//! By a resolver of its own, not the system's: that one says nothing of how long an answer holds, and keeps a thread for each call.
//! This one reads `/etc/resolv.conf` and `/etc/hosts` as the system's does, search domains included.

use std::net::SocketAddr;
use std::time::Duration;

use hickory_resolver::TokioResolver;
use hickory_resolver::config::{
    ConnectionConfig, LookupIpStrategy, NameServerConfig, ResolveHosts, ResolverConfig,
};
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
pub(super) struct Found {
    /// IPv4 ones, or IPv6 ones where there are no others; at least one.
    pub addresses: Vec<SocketAddr>,
    pub holds_for: Duration,
}

#[derive(Debug, Error)]
pub(super) enum ResolveError {
    #[error("{0}")]
    Failed(#[from] NetError),
    /// Name servers say so: nobody has failed.
    #[error("the name has no address")]
    Nothing,
    #[error("no name server answered in time")]
    Late,
}

/// Looks the name up.
pub(super) async fn resolve(name: &DnsName) -> Result<Found, ResolveError> {
    // Made for each look, which is rare: so a resolv.conf or hosts file that has changed is read, and nothing is remembered for longer than
    // the file of weir says.
    let (resolver, suffixes) = resolver(name)?;
    let look = async {
        match resolver.lookup_ip(name.name.as_str()).await {
            Err(error)
                if error.is_no_records_found() && is_nowhere(&resolver, name, &suffixes).await =>
            {
                Err(ResolveError::Nothing)
            }
            looked => Ok(looked?),
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
        false => Ok(Found {
            addresses,
            holds_for: found.valid_until().saturating_duration_since(clock::now()),
        }),
    }
}

/// Whether name servers say so of the name itself and of the name in each search domain: a look's own error is that of the last one
/// tried, and another may have had no answer.
async fn is_nowhere(resolver: &TokioResolver, name: &DnsName, suffixes: &[Name]) -> bool {
    let Ok(relative) = Name::from_ascii(&name.name) else {
        return false;
    };
    let suffixes = match relative.is_fqdn() {
        true => &[],
        false => suffixes,
    };
    let longer = suffixes
        .iter()
        .map(|suffix| relative.clone().append_domain(suffix));
    for full in [relative.clone().append_domain(&Name::root())]
        .into_iter()
        .chain(longer)
    {
        // One that would be too long is not there.
        let Ok(full) = full else { continue };
        for kind in [RecordType::A, RecordType::AAAA] {
            let looked = resolver.lookup(full.clone(), kind).await;
            if !looked.is_err_and(|error| error.is_no_records_found()) {
                return false;
            }
        }
    }
    true
}

/// And the domains that a name is searched in.
fn resolver(name: &DnsName) -> Result<(TokioResolver, Vec<Name>), NetError> {
    let mut suffixes = Vec::new();
    let mut builder = match name.servers.as_slice() {
        [] => {
            let (config, options) = read_system_conf()?;
            suffixes.extend(config.search().iter().chain(config.domain()).cloned());
            let provider = TokioRuntimeProvider::default();
            TokioResolver::builder_with_config(config, provider).with_options(options)
        }
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
            let provider = TokioRuntimeProvider::default();
            let mut builder = TokioResolver::builder_with_config(config, provider);
            builder.options_mut().use_hosts_file = ResolveHosts::Never;
            builder
        }
    };
    // One address of a pod or server that has both is enough: two would count as two endpoints.
    builder.options_mut().ip_strategy = LookupIpStrategy::Ipv4thenIpv6;
    Ok((builder.build()?, suffixes))
}
