//! The endpoints of an upstream with what is known of each, and the snapshot that lanes read, which is made of them. Must not judge one,
//! nor say when the snapshot is made: `live` does.

use std::net::SocketAddr;
use std::sync::Arc;

use super::endpoint::Endpoint;
use crate::policy::balance::Ring;
use crate::policy::outlier::{Checks, Ejections};

/// The endpoints at a moment, as lanes see them.
#[derive(Debug)]
pub(super) struct Snapshot {
    pub endpoints: Vec<Arc<Endpoint>>,
    /// Indexes of those that requests may go to: those that are up, or all in a panic.
    pub usable: Vec<usize>,
    /// Where requests go by their key.
    pub ring: Arc<Ring>,
    pub counts: Counts,
}

/// How many endpoints there are, and how they are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    pub all: usize,
    pub up: usize,
    pub unhealthy: usize,
    pub ejected: usize,
    /// Whether so few are up that all are used.
    pub panic: bool,
}

/// What the snapshot is made of.
#[derive(Debug, Default)]
pub(super) struct Members {
    /// The addresses of each source that is a name.
    pub found: Vec<Vec<SocketAddr>>,
    pub list: Vec<Member>,
    pub ring: Arc<Ring>,
    /// Whether the list is that from before a reload, in place of names none of which was found yet.
    pub stand_in: bool,
}

#[derive(Debug, Clone)]
pub(super) struct Member {
    pub endpoint: Arc<Endpoint>,
    pub checks: Checks,
    pub ejections: Ejections,
    /// Why its last check that failed did, or what ejected it.
    pub last_fault: Option<String>,
}

impl Member {
    pub(super) fn is_up(&self) -> bool {
        self.checks.is_healthy() && !self.ejections.is_ejected()
    }
}

impl Snapshot {
    pub(super) fn empty() -> Snapshot {
        Snapshot {
            endpoints: Vec::new(),
            usable: Vec::new(),
            ring: Arc::default(),
            counts: Counts::default(),
        }
    }
}

pub(super) fn member<'m>(
    members: &'m mut Members,
    endpoint: &Arc<Endpoint>,
) -> Option<&'m mut Member> {
    let mut list = members.list.iter_mut();
    list.find(|member| Arc::ptr_eq(&member.endpoint, endpoint))
}

pub(super) fn count(members: &Members, is: impl Fn(&Member) -> bool) -> usize {
    members.list.iter().filter(|member| is(member)).count()
}
