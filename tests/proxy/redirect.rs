//! `weir redirect` in network namespaces of the test's own, with the real kernel, nft and `weir proxy`. It needs root, iproute2 and nftables.

use super::harness;
use std::process::Command;

use super::harness::netns::{Net, said};
use super::harness::process::file;

const WEIR: &str = env!("CARGO_BIN_EXE_weir");
/// What `weir inject` writes.
const INJECTED: &str = include_str!("../inject/redirect.injected.yaml");
const PAGE: &str = include_str!("../../docs/ways-in.md");

/// As the user that weir is in a pod, but that it may read what the test has built and written.
const AS_WEIR: [&str; 7] = [
    "setpriv",
    "--reuid=65532",
    "--regid=65532",
    "--clear-groups",
    "--inh-caps=+dac_read_search",
    "--ambient-caps=+dac_read_search",
    "--",
];

/// root with no more than the rules take.
const AS_INIT_STEP: [&str; 4] = [
    "setpriv",
    "--bounding-set=-all,+net_admin,+dac_read_search",
    "--inh-caps=-all",
    "--",
];

/// The arguments of the injector's init container.
fn injected() -> Vec<&'static str> {
    let line = INJECTED.lines().find_map(|line| {
        let line = line.trim().strip_prefix("args: [redirect, ")?;
        line.strip_suffix(']')
    });
    let arguments = line.unwrap().split(", ");
    arguments.map(|word| word.trim_matches('"')).collect()
}

/// `weir redirect` where nothing can come of it; its exit code, and what it says.
fn redirect(arguments: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(WEIR)
        .arg("redirect")
        .args(arguments)
        .env("PATH", "/nonexistent")
        .output();
    (output.as_ref().unwrap().status.code(), said(output))
}

/// A pod with an app at two ports and weir at 9900, as the injector has it, but for the rules.
struct Pod(Net);

impl Pod {
    fn new(name: &str) -> Pod {
        let mut net = Net::new(name);
        // An address that is the pod's without being that of its cable.
        net.shell("ip -n $N-b addr add 10.88.0.1/32 dev lo");
        for address in ["[::]:80", "[::]:9005"] {
            net.start(&["echo", "--address", address], "address=");
        }
        let mut elsewhere = net.command("a", WEIR);
        elsewhere.args(["echo", "--address", "[::]:80"]);
        net.keep(elsewhere, "address=");

        let config = file(
            "version: 1\nlisteners: [{name: inbound, address: '[::]:9900', transparent: true}]\n\
             upstreams: {app: {endpoints: ['http://127.0.0.1:9']}}\n\
             admin: {address: '127.0.0.1:9901'}\nmetrics: {address: '0.0.0.0:9902'}\nruntime: {lanes: 1}\n",
        );
        let mut proxy = net.command("b", AS_WEIR[0]);
        proxy.args(&AS_WEIR[1..]);
        proxy.args([WEIR, "proxy", "-c"]).arg(config.path());
        net.keep(proxy, "listening");
        Pod(net)
    }

    #[track_caller]
    fn redirect(&self, arguments: &[&str]) {
        let mut command = self.0.command("b", AS_INIT_STEP[0]);
        command.args(&AS_INIT_STEP[1..]).args([WEIR, "redirect"]);
        let output = command.args(arguments).output();
        assert!(output.as_ref().unwrap().status.success(), "{output:?}");
        assert_eq!(said(output), "");
    }

    fn rules(&self) -> String {
        said(
            self.0
                .command("b", "nft")
                .args(["list", "ruleset"])
                .output(),
        )
    }

    /// The client that weir names to who answers; nothing where that was not asked by weir.
    fn asked_by(&self, side: &str, url: &str) -> String {
        client(&self.0.curl(side, &[url]))
    }

    /// Likewise, asked by weir's own user.
    fn asked_by_weir(&self, url: &str) -> String {
        let mut command = self.0.command("b", AS_WEIR[0]);
        command
            .args(&AS_WEIR[1..])
            .args(["curl", "-sS", "-m", "10"]);
        client(&said(command.arg(url).output()))
    }

    /// What weir has been asked.
    fn requests(&self) -> f64 {
        let metrics = self.0.curl("b", &["http://127.0.0.1:9901/metrics"]);
        harness::metrics::sum(&metrics, "weir_requests_total")
    }
}

#[track_caller]
fn client(body: &str) -> String {
    let body: serde_json::Value =
        serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {body}"));
    let named = body["headers"]["x-forwarded-for"].as_str();
    named.unwrap_or_default().to_owned()
}

#[test]
fn what_comes_in_goes_through_weir_and_nothing_else_does() {
    let pod = Pod::new("in");
    assert_eq!(pod.asked_by("a", "http://10.77.0.2/"), "");

    pod.redirect(&injected());
    let before = pod.requests();
    // From another pod, to both families, whatever the port.
    assert_eq!(pod.asked_by("a", "http://10.77.0.2/"), "10.77.0.1");
    assert_eq!(pod.asked_by("a", "http://[fd77::2]/"), "fd77::1");
    assert_eq!(pod.asked_by("a", "http://10.77.0.2:9005/"), "10.77.0.1");
    // From the app to the pod's own addresses.
    assert_eq!(pod.asked_by("b", "http://10.77.0.2/"), "10.77.0.2");
    assert_eq!(pod.asked_by("b", "http://[fd77::2]:9005/"), "fd77::2");
    assert_eq!(pod.asked_by("b", "http://10.88.0.1/"), "10.88.0.1");
    // Each of these once: what weir sends to the app does not come back to it.
    assert_eq!(pod.requests() - before, 6.0);

    // From weir's user to the same, from the app to itself, and to elsewhere.
    for url in [
        "http://10.77.0.2/",
        "http://[fd77::2]/",
        "http://127.0.0.1/",
    ] {
        assert_eq!(pod.asked_by_weir(url), "", "{url}");
    }
    for url in [
        "http://127.0.0.1/",
        "http://127.1.2.3/",
        "http://[::1]:9005/",
        "http://10.77.0.1/",
        "http://[fd77::1]/",
    ] {
        assert_eq!(pod.asked_by("b", url), "", "{url}");
    }
    // weir's metrics, which the injector has skipped, are asked as they were.
    for side in ["a", "b"] {
        let metrics = pod.0.curl(side, &["http://10.77.0.2:9902/metrics"]);
        assert!(metrics.contains("weir_requests_total"), "{metrics}");
        // And weir's own port is not redirected to itself.
        let direct = pod.0.curl(side, &["-i", "http://10.77.0.2:9900/"]);
        assert!(direct.contains("not_redirected"), "{direct}");
    }
    assert_eq!(pod.requests() - before, 8.0);

    pod.redirect(&["--remove"]);
    assert_eq!(pod.asked_by("a", "http://10.77.0.2/"), "");
    assert_eq!(pod.asked_by("b", "http://[fd77::2]/"), "");
}

#[test]
fn rules_are_replaced_whole_and_taken_out_whole() {
    let pod = Pod::new("twice");
    let none = pod.rules();
    pod.redirect(&["--remove"]);
    assert_eq!(pod.rules(), none);

    // Others' rules are left alone.
    let others = "table ip others { chain refuses { type filter hook input priority 0; tcp dport 81 reject; }; }";
    pod.0.shell(&format!("ip netns exec $N-b nft '{others}'"));
    let none = pod.rules();
    pod.redirect(&injected());
    let once = pod.rules();
    pod.redirect(&injected());
    assert_eq!(pod.rules(), once);

    let ranges = [
        "--apply",
        "--to",
        "9900",
        "--uid",
        "65532",
        "--skip-inbound-ports",
        "9000-9010,9902,9004",
    ];
    pod.redirect(&ranges);
    assert_eq!(pod.asked_by("a", "http://10.77.0.2:9005/"), "");
    assert_eq!(pod.asked_by("b", "http://[fd77::2]:9005/"), "");
    assert_eq!(pod.asked_by("a", "http://10.77.0.2/"), "10.77.0.1");
    // They are in the kernel as they are printed, whatever nft calls a priority.
    let listed = pod.rules();
    let printed = redirect(&[&["--print"], &ranges[1..]].concat()).1;
    let (_, table) = printed.split_once("delete table inet weir\n").unwrap();
    for line in table.lines().filter(|line| !line.contains("priority")) {
        assert!(
            listed.lines().any(|other| other == line),
            "{line}: {listed}"
        );
    }

    pod.redirect(&["--remove"]);
    pod.redirect(&["--remove"]);
    assert_eq!(pod.rules(), none);
}

#[test]
fn what_is_missing_is_named_with_its_mend() {
    let (code, told) = redirect(&injected());
    assert_eq!(code, Some(1));
    assert!(
        told.contains("no nft on the PATH") && told.contains("package nftables"),
        "{told}"
    );

    let net = Net::new("rights");
    let mut command = net.command("b", AS_WEIR[0]);
    command.args(&AS_WEIR[1..]).args([WEIR, "redirect"]);
    let output = command.args(injected()).output();
    assert_eq!(output.as_ref().unwrap().status.code(), Some(1));
    let told = said(output);
    assert!(
        told.contains("Operation not permitted") && told.contains("capability NET_ADMIN"),
        "{told}"
    );
}

#[test]
fn arguments_that_make_no_rules_are_told_with_the_mend() {
    let check = |arguments: &str, mend: &str| {
        let arguments: Vec<_> = arguments.split(' ').collect();
        let (code, told) = redirect(&arguments);
        assert_eq!(code, Some(2), "{arguments:?}: {told}");
        assert!(told.contains(mend), "{arguments:?}: {told}");
    };
    check("--to 9900 --uid 1", "<--print|--apply|--remove>");
    check("--print --apply --to 9900 --uid 1", "cannot be used with");
    check("--apply --uid 1", "--to <PORT>");
    check("--apply --to 9900", "--uid <UID>");
    check("--remove --to 9900", "cannot be used with");
    check("--apply --to 0 --uid 1", "give a number from 1 to 65535");
    check(
        "--apply --to 65536 --uid 1",
        "give a number from 1 to 65535",
    );
    check("--apply --to http --uid 1", "give a number from 1 to 65535");
    check("--apply --to 9900 --uid weir", "as `id -u` prints");
    check("--apply --to 9900 --uid 4294967295", "runAsUser");
    check(
        "--print --to 1 --uid 1 --skip-inbound-ports 80,x",
        "or a range as in 9000-9010",
    );
    check(
        "--print --to 1 --uid 1 --skip-inbound-ports 90-80",
        "write 80-90",
    );
}

#[test]
fn the_page_shows_what_is_printed() {
    let command =
        "weir redirect --print --to 9900 --uid 65532 --skip-inbound-ports 9902,9000-9010,25";
    let arguments: Vec<_> = command.split(' ').skip(2).collect();
    let (code, printed) = redirect(&arguments);
    assert_eq!(code, Some(0));
    assert!(PAGE.contains(command));
    assert!(
        PAGE.contains(&format!("```text\n{printed}```")),
        "{printed}"
    );
}
