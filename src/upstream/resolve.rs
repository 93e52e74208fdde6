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
use thiserror::Error;
use tokio::time::timeout;

use crate::clock;
use crate::config::upstreams::DnsName;

/// For all tries of one look.
const WITHIN: Duration = Duration::from_secs(10);

/// What a name stands for.
#[derive(Debug)]
pub struct Found {
    /// IPv4 ones, or IPv6 ones where there are no others; at least one.
    pub addresses: Vec<SocketAddr>,
    pub holds_for: Duration,
}

#[derive(Debug, Error)]
pub enum ResolveError {
    #[error("{0}")]
    Failed(#[from] NetError),
    #[error("the name has no address")]
    Nothing,
    #[error("no name server answered in time")]
    Late,
}

/// Looks the name up.
pub async fn resolve(name: &DnsName) -> Result<Found, ResolveError> {
    // Made for each look, which is rare: so a resolv.conf or hosts file that has changed is read, and nothing is remembered for longer than
    // the file of weir says.
    let resolver = resolver(name)?;
    let looked = timeout(WITHIN, resolver.lookup_ip(name.name.as_str())).await;
    let found = looked.map_err(|_| ResolveError::Late)??;
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

fn resolver(name: &DnsName) -> Result<TokioResolver, NetError> {
    let mut builder = match name.servers.as_slice() {
        [] => TokioResolver::builder_tokio()?,
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
    builder.build()
}
