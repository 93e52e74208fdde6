//! What Redis pushes: messages of channels, heard on a connection of their own. A cluster's nodes pass messages on to each
//! other, so one connection hears all.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use redis::RedisError;
use redis::aio::{PubSubSink, PubSubStream};
use tokio::time::{sleep, timeout};

use super::{Address, Redis};

/// Between pings, so that a node that hangs is left for another.
const PING_EVERY: Duration = Duration::from_millis(500);
/// Before another node is tried.
const PAUSE: Duration = Duration::from_millis(50);

/// What a listener is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Heard {
    /// It listens from now on; whatever was said before is lost, so what it knows must be asked anew.
    Listening,
    Message {
        channel: String,
        payload: Vec<u8>,
    },
}

impl Redis {
    /// Listens to these channels for ever and tells `heard`. Whatever the nodes do, `beat` is called again within
    /// `connect_timeout` and a second.
    pub async fn listen(
        self: Arc<Self>,
        channels: Vec<String>,
        mut heard: impl FnMut(Heard),
        beat: impl Fn(),
    ) -> Infallible {
        let mut left = None;
        loop {
            beat();
            let mut nodes: Vec<_> = self.topology.borrow().nodes().cloned().collect();
            // The one that was just tried in vain or lost is tried again once there was another.
            if nodes.len() > 1 {
                nodes.retain(|node| Some(node) != left.as_ref());
            }
            left = fastrand::choice(nodes);
            if let Some(node) = &left
                && let Ok(Ok((sink, stream))) =
                    timeout(self.connect_timeout, self.subscribe(node, &channels)).await
            {
                heard(Heard::Listening);
                self.hear(node, sink, stream, &mut heard, &beat).await;
            }
            sleep(PAUSE.mul_f64(1.0 + fastrand::f64())).await;
        }
    }

    async fn subscribe(
        &self,
        node: &Address,
        channels: &[String],
    ) -> Result<(PubSubSink, PubSubStream), RedisError> {
        let (mut sink, stream) = self.connect_to_hear(node).await?.split();
        sink.subscribe(channels).await?;
        Ok((sink, stream))
    }

    /// Until the node is gone, hangs, or has no slots any more: one that left the cluster hears nothing of it.
    async fn hear(
        &self,
        node: &Address,
        mut sink: PubSubSink,
        mut stream: PubSubStream,
        heard: &mut impl FnMut(Heard),
        beat: &impl Fn(),
    ) {
        loop {
            beat();
            tokio::select! {
                message = stream.next() => match message {
                    Some(message) => heard(Heard::Message {
                        channel: message.get_channel_name().to_owned(),
                        payload: message.get_payload_bytes().to_vec(),
                    }),
                    None => return,
                },
                () = sleep(PING_EVERY) => {
                    if !self.topology.borrow().nodes().any(|known| known == node) {
                        return;
                    }
                    let answered = timeout(self.connect_timeout, sink.ping::<redis::Value>()).await;
                    if !matches!(answered, Ok(Ok(_))) {
                        return;
                    }
                }
            }
        }
    }
}
