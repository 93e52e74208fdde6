//! Walks over all keys, a step at a time: node by node in the order of their addresses.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::node::Node;
use super::topology::Address;
use super::{CallError, Connections};

/// Where a walk goes on. Written `HOST:PORT~CURSOR`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScanCursor {
    node: Address,
    /// SCAN's, on this node.
    cursor: u64,
}

impl Connections {
    /// One step of a walk over the keys of all nodes: those among some `count` that match the pattern, and where to go on;
    /// `None`: that was all. Keys that are there from the first step to the last are met at least once, unless slots
    /// change their nodes meanwhile.
    pub async fn scan(
        &self,
        from: Option<&ScanCursor>,
        pattern: &str,
        count: usize,
        within: Duration,
    ) -> Result<(Vec<String>, Option<ScanCursor>), CallError> {
        let node = self.node_from(from.map(|from| &from.node));
        let Some(node) = node else {
            // A walk that had begun meets no node behind the last; one that begins should.
            return from.map_or(Err(CallError::Down), |_| Ok((Vec::new(), None)));
        };
        let same = from.filter(|from| from.node == node.address);
        let mut command = redis::cmd("SCAN");
        command.arg(same.map_or(0, |from| from.cursor));
        command.arg("MATCH").arg(pattern).arg("COUNT").arg(count);
        let answer = node.send(&command, false, Instant::now() + within).await?;
        let answer = answer.map_err(|error| CallError::Refused(error.to_string()))?;
        let (cursor, keys): (u64, Vec<String>) =
            redis::from_redis_value(answer).map_err(|_| CallError::Nonsense)?;
        let next = match cursor {
            0 => self.node_behind(&node.address).map(ScanCursor::first_of),
            cursor => Some(ScanCursor {
                node: node.address.clone(),
                cursor,
            }),
        };
        Ok((keys, next))
    }

    /// Where a walk goes on that leaves out the rest of a node, which does not answer.
    pub fn scan_past(&self, from: Option<&ScanCursor>) -> Option<ScanCursor> {
        let node = self.node_from(from.map(|from| &from.node))?;
        self.node_behind(&node.address).map(ScanCursor::first_of)
    }

    /// The node of this address, or the next one where it has gone.
    fn node_from(&self, address: Option<&Address>) -> Option<Arc<Node>> {
        let routing = self.routing.lock();
        let mut owners = routing.topology.nodes().collect::<Vec<_>>();
        owners.sort_unstable();
        let first = owners.into_iter().find(|owner| Some(*owner) >= address)?;
        routing.nodes.get(first).cloned()
    }

    fn node_behind(&self, address: &Address) -> Option<Arc<Node>> {
        let routing = self.routing.lock();
        let owners = routing.topology.nodes();
        let next = owners.filter(|owner| *owner > address).min()?;
        routing.nodes.get(next).cloned()
    }
}

impl ScanCursor {
    fn first_of(node: Arc<Node>) -> ScanCursor {
        ScanCursor {
            node: node.address.clone(),
            cursor: 0,
        }
    }
}

impl fmt::Display for ScanCursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}~{}", self.node, self.cursor)
    }
}

impl FromStr for ScanCursor {
    type Err = ();

    fn from_str(text: &str) -> Result<ScanCursor, ()> {
        let (node, cursor) = text.rsplit_once('~').ok_or(())?;
        let mut node = Address::parse(node, "").ok_or(())?;
        // As a URL has an IPv6 address.
        node.host = node.host.trim_matches(['[', ']']).to_owned();
        Ok(ScanCursor {
            node,
            cursor: cursor.parse().map_err(|_| ())?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_read_as_it_is_written() {
        for text in ["10.0.0.1:6379~12", "[::1]:1~0"] {
            assert_eq!(text.parse::<ScanCursor>().unwrap().to_string(), text);
        }
        for bad in ["", "a:1", "a~1", "a:1~x", "a:99999~1"] {
            assert_eq!(bad.parse::<ScanCursor>(), Err(()), "{bad}");
        }
    }
}
