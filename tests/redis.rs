//! The client of Redis on real servers, and what becomes of calls while these are killed, paused, moved and full.

#![expect(
    clippy::unwrap_used,
    reason = "a broken step of a test is a failed test"
)]

mod harness;

use harness::redis::{Certificates, Cluster, Sentinels};
use weir::keys;

#[test]
fn harness_moves_slots_and_fails_over() {
    let cluster = Cluster::start();
    let slot = keys::slot(b"moved");
    let from = cluster.master_of(slot);
    let to = cluster.master_of(keys::slot(b"{foo}"));
    assert_ne!(from, to);
    cluster.cli(from, &["SET", "moved", "1"]);
    cluster.migrate(slot, to);
    assert_eq!(cluster.master_of(slot), to);
    assert_eq!(cluster.cli(to, &["GET", "moved"]).text(), "1");
    cluster.wait_until_whole();
    cluster.kill(to);
    cluster.wait_until_whole();
    let heir = cluster.master_of(slot);
    assert_eq!(heir, cluster.replica_of(to));
    assert_eq!(cluster.cli(heir, &["GET", "moved"]).text(), "1");
    cluster.restart(to);
    cluster.wait_until_whole();
}

#[test]
fn harness_starts_sentinels_and_tls() {
    let sentinels = Sentinels::start();
    let ask = ["SENTINEL", "GET-MASTER-ADDR-BY-NAME", "mymaster"];
    let master = sentinels.sentinels[2].cli(&ask);
    assert_eq!(
        master.list()[1].text(),
        sentinels.servers[0].port.to_string()
    );
    assert!(Certificates::make().server().runs());
}
