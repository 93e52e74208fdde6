//! What the process does for itself, as the file spells it.

use serde::Serialize;

use crate::config::Config;
use crate::config::runtime::MemoryBound;
use crate::config::units::{ByteSize, Percent, Span};

#[derive(Serialize)]
pub(super) struct Runtime {
    lanes: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    shed: Option<Shed>,
}

#[derive(Serialize)]
struct Shed {
    #[serde(skip_serializing_if = "Option::is_none")]
    loop_delay: Option<Span>,
    #[serde(skip_serializing_if = "Option::is_none")]
    memory: Option<String>,
}

impl Runtime {
    pub(super) fn new(config: &Config) -> Runtime {
        let shed = Shed {
            loop_delay: config.shed.loop_delay.map(Span),
            memory: config.shed.memory.map(|bound| match bound {
                MemoryBound::Share(share) => Percent(share).to_string(),
                MemoryBound::Bytes(bytes) => ByteSize(bytes).to_string(),
            }),
        };
        Runtime {
            lanes: config
                .lanes
                .map_or("auto".to_owned(), |lanes| lanes.to_string()),
            shed: (shed.loop_delay.is_some() || shed.memory.is_some()).then_some(shed),
        }
    }
}
