//! What Redis pushes: messages of channels, heard on a connection of their own. A cluster's nodes pass messages on to each
//! other, so one connection hears all.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use redis::aio::{PubSubSink, PubSubStream};
use redis::{RedisConnectionInfo, RedisError};
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep, timeout};
use tracing::{info, warn};

use super::{Address, Redis};
use crate::policy::retry::{Pauses, equal_jitter};

/// Between pings, so that a node that hangs is left for another.
const PING_EVERY: Duration = Duration::from_millis(500);
/// Before another node is tried.
const PAUSES: Pauses = Pauses {
    first: Duration::from_millis(100),
    longest: Duration::from_secs(1),
};

/// What a listener is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Heard {
    /// It listens from now on; whatever was said before is lost, so what it knows must be asked anew.
    Listening,
    Message(Vec<u8>),
    /// It does not listen, until it is told that it does: nothing that is said meanwhile is heard.
    Lost,
}

/// Who is listened to.
#[derive(Debug, Clone)]
pub(super) enum Speakers {
    /// The nodes that have slots.
    Nodes,
    Sentinel(Address),
}

impl Redis {
    /// Listens to these channels for ever and tells `heard`. Whatever the nodes do, `beat` is called again within
    /// `connect_timeout` and a second.
    pub async fn listen(
        self: Arc<Self>,
        channels: Vec<String>,
        heard: impl FnMut(Heard),
        beat: impl Fn(),
    ) -> Infallible {
        self.listen_to(Speakers::Nodes, channels, heard, beat).await
    }

    /// As [`Redis::listen`], to any of these.
    pub(super) async fn listen_to(
        &self,
        speakers: Speakers,
        channels: Vec<String>,
        mut heard: impl FnMut(Heard),
        beat: impl Fn(),
    ) -> Infallible {
        let (mut left, mut pause, mut told) = (None, PAUSES.first, false);
        loop {
            beat();
            let mut nodes = self.who_speaks(&speakers);
            // The one that was just tried in vain or lost is tried again once there was another.
            if nodes.len() > 1 {
                nodes.retain(|node| Some(node) != left.as_ref());
            }
            left = fastrand::choice(nodes);
            if let Some(node) = &left {
                let mut answers = false;
                match self.subscribe(&speakers, node, &channels).await {
                    Ok((sink, stream)) => {
                        heard(Heard::Listening);
                        if std::mem::take(&mut told) {
                            info!(client = self.name, %node, ?channels, "messages of redis are heard again");
                        }
                        let stays = || self.who_speaks(&speakers).contains(node);
                        answers = self.hear(stays, sink, stream, &mut heard, &beat).await;
                        heard(Heard::Lost);
                    }
                    Err(error) => {
                        self.metrics.unheard.inc();
                        if !std::mem::replace(&mut told, true) {
                            warn!(client = self.name, %node, ?channels, error, "messages of redis are not heard; tried again");
                        }
                    }
                }
                pause = match answers {
                    true => PAUSES.first,
                    false => PAUSES.after(pause),
                };
            }
            sleep(equal_jitter(pause, fastrand::f64())).await;
        }
    }

    fn who_speaks(&self, speakers: &Speakers) -> Vec<Address> {
        match speakers {
            Speakers::Nodes => self.topology.borrow().nodes().cloned().collect(),
            Speakers::Sentinel(sentinel) => vec![sentinel.clone()],
        }
    }

    async fn subscribe(
        &self,
        speakers: &Speakers,
        node: &Address,
        channels: &[String],
    ) -> Result<(PubSubSink, PubSubStream), String> {
        let who = match speakers {
            Speakers::Nodes => self.who(),
            Speakers::Sentinel(_) => RedisConnectionInfo::default(),
        };
        let subscribe = async {
            let (mut sink, stream) = self.connect_to_hear(node, &who).await?.split();
            sink.subscribe(channels).await?;
            Ok((sink, stream))
        };
        match timeout(self.connect_timeout, subscribe).await {
            Ok(subscribed) => subscribed.map_err(|error: RedisError| error.to_string()),
            Err(_) => Err(format!("no answer within {:?}", self.connect_timeout)),
        }
    }

    /// Until the node is gone, hangs, or no longer `stays` one to listen to: one that left the cluster hears nothing of it. Whether it
    /// has answered a ping.
    async fn hear(
        &self,
        stays: impl Fn() -> bool,
        mut sink: PubSubSink,
        mut stream: PubSubStream,
        heard: &mut impl FnMut(Heard),
        beat: &impl Fn(),
    ) -> bool {
        let mut pings = interval_at(Instant::now() + PING_EVERY, PING_EVERY);
        pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut answers = false;
        loop {
            beat();
            tokio::select! {
                message = stream.next() => match message {
                    Some(message) => heard(Heard::Message(message.get_payload_bytes().to_vec())),
                    None => return answers,
                },
                _ = pings.tick() => {
                    if !stays() {
                        return answers;
                    }
                    let answered = timeout(self.connect_timeout, sink.ping::<redis::Value>()).await;
                    if !matches!(answered, Ok(Ok(_))) {
                        return answers;
                    }
                    answers = true;
                }
            }
        }
    }
}
