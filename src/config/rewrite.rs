//! What a route changes on the way, and what it answers by itself.

pub use super::raw::Scheme;
use crate::http1::hygiene::{folded, is_folded};

/// Who answers the requests of a route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum To {
    /// An index into [`super::Config::upstreams`].
    Upstream(usize),
    Redirect(Redirect),
    Reply(Reply),
}

/// What of a request goes to the upstream in another form.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Rewrite {
    /// In place of what the route's path pattern names; a path in normal form.
    pub path_prefix: Option<String>,
    /// In place of Host; a name or address, with or without a port.
    pub host: Option<String>,
}

/// Fields of a message that change on the way; none is of framing or weir's to say.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HeaderChanges {
    set: Vec<(String, String)>,
    add: Vec<(String, String)>,
    remove: Vec<String>,
    /// What is set or removed, as [`folded`].
    dropped: Vec<Vec<u8>>,
}

impl HeaderChanges {
    /// Names and values that may go on the wire.
    pub fn new(
        set: Vec<(String, String)>,
        add: Vec<(String, String)>,
        remove: Vec<String>,
    ) -> HeaderChanges {
        let replaced = set.iter().map(|(name, _)| name);
        let dropped = replaced.chain(&remove).map(|name| folded(name.as_bytes()));
        HeaderChanges {
            dropped: dropped.collect(),
            set,
            add,
            remove,
        }
    }

    /// Whether a field of this name does not go on, in whatever way it is spelt: what is set must not be forged by a name
    /// that an application takes for it.
    pub fn drops(&self, name: &[u8]) -> bool {
        self.dropped.iter().any(|other| is_folded(name, other))
    }

    /// The fields that are put in.
    pub fn put_in(&self) -> impl Iterator<Item = &(String, String)> {
        self.set.iter().chain(&self.add)
    }

    /// Put in place of any of the same name.
    pub fn set(&self) -> &[(String, String)] {
        &self.set
    }

    /// Put in beside any that are there.
    pub fn added(&self) -> &[(String, String)] {
        &self.add
    }

    /// The names of fields that do not go on, as the file has them.
    pub fn removed(&self) -> &[String] {
        &self.remove
    }
}

/// Where clients are sent; what is `None` is as in the request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Redirect {
    /// 301, 302, 303, 307 or 308.
    pub status: u16,
    pub scheme: Option<Scheme>,
    /// Without a port.
    pub host: Option<String>,
    pub port: Option<u16>,
    pub path: Option<NewPath>,
    pub strip_query: bool,
}

/// A path in normal form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NewPath {
    Whole(String),
    /// In place of what the route's path pattern names.
    Prefix(String),
}

/// What clients get.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    pub status: u16,
    pub body: String,
    /// Of the body, where there is one.
    pub content_type: String,
    pub headers: Vec<(String, String)>,
}
