//! One thing that is looked at for `/health`, and what was found. Owns how bad things are told; must not know what is looked at.

use std::fmt;
use std::sync::Arc;

use futures_util::future::BoxFuture;
use serde_json::{Map, Value, json};

/// How a thing is, from good to bad.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Status {
    Ok,
    /// Something is worse than it should be, and the process does its work.
    Degraded,
    /// The process is of no use until this is mended.
    Critical,
}

/// What a look has found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    pub status: Status,
    /// What was measured, by name.
    pub details: Map<String, Value>,
}

/// Something to look at. A look may give several findings, in the order of `names`.
pub struct Check {
    pub names: Vec<String>,
    /// What it is without an answer in time.
    pub unanswered: Status,
    /// Whether the process is ready only while this is not critical.
    pub gates: bool,
    pub(super) look: Arc<dyn Fn() -> BoxFuture<'static, Vec<Finding>> + Send + Sync>,
}

impl Status {
    /// As answers have it.
    pub fn as_str(self) -> &'static str {
        match self {
            Status::Ok => "ok",
            Status::Degraded => "degraded",
            Status::Critical => "critical",
        }
    }

    /// `self` if that holds, else all is well.
    pub fn when(self, holds: bool) -> Status {
        match holds {
            true => self,
            false => Status::Ok,
        }
    }
}

impl Finding {
    /// `details` is to be a JSON object.
    pub fn new(status: Status, details: Value) -> Finding {
        let details = match details {
            Value::Object(details) => details,
            other => Map::from_iter([("details".to_owned(), other)]),
        };
        Finding { status, details }
    }

    /// Without details but the error.
    pub fn error(status: Status, error: impl fmt::Display) -> Finding {
        Finding::new(status, json!({ "error": error.to_string() }))
    }
}

impl Check {
    /// A check with one finding; `look` is called for each look.
    pub fn new<F>(
        name: &str,
        unanswered: Status,
        look: impl Fn() -> F + Send + Sync + 'static,
    ) -> Check
    where
        F: Future<Output = Finding> + Send + 'static,
    {
        Check::several(vec![name.to_owned()], unanswered, move || {
            let found = look();
            async move { vec![found.await] }
        })
    }

    /// A check with a finding for each name, in their order.
    pub fn several<F>(
        names: Vec<String>,
        unanswered: Status,
        look: impl Fn() -> F + Send + Sync + 'static,
    ) -> Check
    where
        F: Future<Output = Vec<Finding>> + Send + 'static,
    {
        Check {
            names,
            unanswered,
            gates: false,
            look: Arc::new(move || Box::pin(look())),
        }
    }

    /// The same, and the process is ready only while it is not critical.
    pub fn gating(self) -> Check {
        Check {
            gates: true,
            ..self
        }
    }
}

impl fmt::Debug for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Check({:?})", self.names)
    }
}
