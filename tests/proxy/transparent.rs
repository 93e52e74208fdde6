//! Transparent listeners behind iptables' REDIRECT, in network namespaces of the test's own. It needs root, iproute2 and iptables.

use super::harness::metrics::value;
use super::harness::netns::Net;
use super::harness::process::file;

const RULES: &str = "
    for tables in iptables ip6tables; do
        ip netns exec $N-b $tables -t nat -A PREROUTING -p tcp -m multiport --dports 80,81,82 -j REDIRECT --to-ports 15006
        # What weir sends to this one comes back to it.
        ip netns exec $N-b $tables -t nat -A OUTPUT -p tcp --dport 82 -j REDIRECT --to-ports 15006
    done";

#[test]
fn requests_go_where_their_connections_were_to_go_and_never_round() {
    let mut net = Net::new("way");
    net.shell(RULES);
    let config = file(
        "listeners: [{name: in, address: '[::]:15006', transparent: true}]\n\
         upstreams: {app: {endpoints: ['http://127.0.0.1:9']}}\nroutes: [{upstream: app}]\n\
         admin: {address: '127.0.0.1:9901'}\nruntime: {lanes: 1}\n",
    );
    // Two apps at each address.
    for address in [
        "10.77.0.2:80",
        "10.77.0.2:81",
        "[fd77::2]:80",
        "[fd77::2]:81",
    ] {
        net.start(&["echo", "--address", address], "address=");
    }
    let path = config.path().to_str().unwrap();
    net.start(&["run", "-c", path], "listening");
    for host in ["10.77.0.2", "[fd77::2]"] {
        for port in [80, 81] {
            let body = net.curl("a", &[&format!("http://{host}:{port}/hello")]);
            assert!(body.contains("/hello"), "{host}:{port}: {body}");
            // It came through weir, which tells who asks.
            let client = if host.starts_with('[') {
                "fd77::1"
            } else {
                "10.77.0.1"
            };
            assert!(
                body.contains(&format!("\"x-forwarded-for\": \"{client}\"")),
                "{body}"
            );
            // Nothing but the destination tells the apps apart: the Host is the client's own.
            let other = net.curl(
                "a",
                &["-H", "Host: other.test", &format!("http://{host}:{port}/")],
            );
            assert!(other.contains("other.test"), "{other}");
        }
        let status = |port: u16| {
            let url = format!("http://{host}:{port}/");
            net.curl("a", &["-o", "/dev/null", "-D", "-", &url])
        };
        // What was not redirected would go to weir itself.
        let direct = status(15006);
        assert!(
            direct.contains(" 502 ") && direct.contains("not_redirected"),
            "{direct}"
        );
        // What weir sends comes back to it.
        let round = status(82);
        assert!(
            round.contains(" 502 ") && round.contains("details=\"loop\""),
            "{round}"
        );
    }
    // It served all of these, and has no connections beyond those of its idle clients.
    let metrics = net.curl("b", &["http://127.0.0.1:9901/metrics"]);
    let loops = value(&metrics, "weir_rejections_total{reason=\"loop\"}");
    assert_eq!(loops, Some(2.0));
}

#[test]
fn idle_connections_to_one_destination_make_room_for_another() {
    let mut net = Net::new("room");
    net.shell(RULES);
    let config = file(
        "listeners: [{name: in, address: '[::]:15006', transparent: true}]\n\
         upstreams: {app: {endpoints: ['http://127.0.0.1:9'], concurrency: {max_connections: 1}}}\nroutes: [{upstream: app}]\n\
         admin: {address: '127.0.0.1:9901'}\nruntime: {lanes: 1}\n",
    );
    for port in [80, 81] {
        let address = format!("10.77.0.2:{port}");
        net.start(&["echo", "--address", &address], "address=");
    }
    let path = config.path().to_str().unwrap();
    net.start(&["run", "-c", path], "listening");
    for port in [80, 81, 80] {
        let body = net.curl("a", &[&format!("http://10.77.0.2:{port}/hello")]);
        assert!(body.contains("/hello"), "{port}: {body}");
    }
}
