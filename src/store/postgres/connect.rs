//! A connection to one of a URL's hosts: each in turn, and none for longer than its time. tokio-postgres alone bounds how long a host takes
//! to accept a connection; one that hangs accepts it, says nothing, and would keep all from the next. Must not choose a server for reads.

use std::pin::Pin;

use deadpool_postgres::Connect;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_postgres::config::{Host, LoadBalanceHosts};
use tokio_postgres::tls::{MakeTlsConnect, TlsConnect};
use tokio_postgres::{Client, Config, Error, Socket};
use tracing::warn;

/// What is connected by, with TLS or without.
pub(super) struct EachInTime<T>(pub(super) T);

type Connecting<'a> =
    Pin<Box<dyn Future<Output = Result<(Client, JoinHandle<()>), Error>> + Send + 'a>>;

impl<T> Connect for EachInTime<T>
where
    T: MakeTlsConnect<Socket> + Clone + Sync + Send + 'static,
    T::Stream: Sync + Send,
    T::TlsConnect: Sync + Send,
    <T::TlsConnect as TlsConnect<Socket>>::Future: Send,
{
    fn connect(&self, config: &Config) -> Connecting<'_> {
        let config = config.clone();
        Box::pin(async move {
            let (hosts, last) = hosts(&config);
            for host in hosts {
                // As libpq has it, the time is for all that is said until the connection can be used.
                let within = host.get_connect_timeout().copied();
                let connected = timeout(within.unwrap_or_default(), host.connect(self.0.clone()));
                if let Ok(Ok((client, connection))) = connected.await {
                    return Ok((client, keep(connection)));
                }
            }
            // The pool bounds the whole.
            let (client, connection) = last.connect(self.0.clone()).await?;
            Ok((client, keep(connection)))
        })
    }
}

fn keep(connection: impl Future<Output = Result<(), Error>> + Send + 'static) -> JoinHandle<()> {
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            warn!(%error, "a connection to postgres was lost");
        }
    })
}

/// Each host alone, in the order in which they are tried, and the last one of them; that is all of `config` where it has one host, or what
/// tokio-postgres has to say no to.
fn hosts(config: &Config) -> (Vec<Config>, Config) {
    let (names, addresses) = (config.get_hosts().len(), config.get_hostaddrs().len());
    let ports = config.get_ports().len();
    let count = names.max(addresses);
    let is_odd =
        (names > 0 && addresses > 0 && names != addresses) || (ports > 1 && ports != count);
    if count < 2 || is_odd || config.get_connect_timeout().is_none() {
        return (Vec::new(), config.clone());
    }
    let mut hosts: Vec<_> = (0..count).map(|n| alone(config, n)).collect();
    if config.get_load_balance_hosts() == LoadBalanceHosts::Random {
        fastrand::shuffle(&mut hosts);
    }
    let last = hosts.pop().unwrap_or_else(|| config.clone());
    (hosts, last)
}

/// The `n`th host.
fn alone(config: &Config, n: usize) -> Config {
    let mut one = Config::new();
    if let Some(user) = config.get_user() {
        one.user(user);
    }
    if let Some(name) = config.get_dbname() {
        one.dbname(name);
    }
    if let Some(options) = config.get_options() {
        one.options(options);
    }
    if let Some(name) = config.get_application_name() {
        one.application_name(name);
    }
    if let Some(password) = config.get_password() {
        one.password(password);
    }
    match config.get_hosts().get(n) {
        Some(Host::Tcp(name)) => {
            one.host(name);
        }
        #[cfg(unix)]
        Some(Host::Unix(path)) => {
            one.host_path(path);
        }
        None => {}
    }
    if let Some(address) = config.get_hostaddrs().get(n) {
        one.hostaddr(*address);
    }
    let ports = config.get_ports();
    if let Some(port) = ports.get(n).or(ports.first()) {
        one.port(*port);
    }
    if let Some(within) = config.get_connect_timeout() {
        one.connect_timeout(*within);
    }
    if let Some(within) = config.get_tcp_user_timeout() {
        one.tcp_user_timeout(*within);
    }
    if let Some(interval) = config.get_keepalives_interval() {
        one.keepalives_interval(interval);
    }
    if let Some(retries) = config.get_keepalives_retries() {
        one.keepalives_retries(retries);
    }
    one.keepalives(config.get_keepalives())
        .keepalives_idle(config.get_keepalives_idle())
        .ssl_mode(config.get_ssl_mode())
        .ssl_negotiation(config.get_ssl_negotiation())
        .target_session_attrs(config.get_target_session_attrs())
        .channel_binding(config.get_channel_binding())
        .load_balance_hosts(config.get_load_balance_hosts());
    one
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(url: &str) -> Config {
        url.parse().unwrap()
    }

    #[test]
    fn a_host_alone_has_all_that_the_url_says() {
        let keys = "user=u password=p dbname=d options='-c a=b' application_name=n sslmode=require sslnegotiation=direct \
            connect_timeout=3 tcp_user_timeout=4 keepalives=0 keepalives_idle=5 keepalives_interval=6 keepalives_retries=7 \
            target_session_attrs=read-write channel_binding=require load_balance_hosts=random";
        let of = |hosts: &str| parsed(&format!("{hosts} {keys}"));
        let both = of("host=a,/b hostaddr=127.0.0.1,::1 port=1,2");
        assert_eq!(alone(&both, 0), of("host=a hostaddr=127.0.0.1 port=1"));
        assert_eq!(alone(&both, 1), of("host=/b hostaddr=::1 port=2"));
        let both = of("host=a,b port=1");
        assert_eq!(alone(&both, 1), of("host=b port=1"));
    }

    #[test]
    fn hosts_are_tried_in_turn() {
        let tried = |url: &str| {
            let (before, last) = hosts(&parsed(url));
            let each = before.iter().chain([&last]);
            each.map(|it| it.get_hosts().to_vec()).collect::<Vec<_>>()
        };
        let host = |name: &str| vec![Host::Tcp(name.to_owned())];
        let all = ["a", "b", "c"].map(host);
        assert_eq!(tried("host=a,b,c connect_timeout=1"), all);
        assert_eq!(tried("host=a connect_timeout=1"), all[..1]);
        assert_eq!(tried("host=a,b,c"), [all.concat()]);
        // Not for this to judge.
        let odd = "host=a,b,c port=1,2 connect_timeout=1";
        assert_eq!(tried(odd), [all.concat()]);
    }
}
