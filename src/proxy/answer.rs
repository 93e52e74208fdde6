//! What a route answers by itself: a redirect or a fixed reply, once every policy lets the request pass. Refuses nothing and does no I/O.

use super::headers::put;
use super::quota::Quota;
use super::reply::{Asker, Date, put_head_end, put_length, put_status};
use crate::config::Route;
use crate::config::rewrite::{Redirect, Reply};

/// An answer, with what the client is told of its quotas.
pub(super) struct Answer<'p> {
    pub status: u16,
    pub body: &'p str,
    content_type: &'p str,
    location: Option<String>,
    headers: &'p [(String, String)],
    route: &'p Route,
    /// Its concurrency slots are held until the answer is out.
    quota: Quota<'p>,
}

impl<'p> Answer<'p> {
    pub(super) fn redirect(
        route: &'p Route,
        redirect: &'p Redirect,
        location: String,
        quota: Quota<'p>,
    ) -> Answer<'p> {
        Answer {
            status: redirect.status,
            body: "",
            content_type: "",
            location: Some(location),
            headers: &[],
            route,
            quota,
        }
    }

    pub(super) fn reply(route: &'p Route, reply: &'p Reply, quota: Quota<'p>) -> Answer<'p> {
        Answer {
            status: reply.status,
            body: &reply.body,
            content_type: &reply.content_type,
            location: None,
            headers: &reply.headers,
            route,
            quota,
        }
    }

    /// Of weir itself, to an OPTIONS that may go no further (RFC 9110 section 7.6.2).
    pub(super) fn options(route: &'p Route, quota: Quota<'p>) -> Answer<'p> {
        Answer {
            status: 204,
            body: "",
            content_type: "",
            location: None,
            headers: &[],
            route,
            quota,
        }
    }

    /// Appends the whole answer to `out`.
    pub(super) fn put(&self, out: &mut Vec<u8>, to: Asker, date: &Date) {
        put_status(out, self.status);
        put_length(out, self.status, self.body.len());
        out.extend_from_slice(&date.field());
        let changes = &self.route.response_headers;
        let content_type = (!self.body.is_empty()).then_some(("Content-Type", self.content_type));
        let location = self.location.as_deref().map(|value| ("Location", value));
        let headers = self.headers.iter().map(|(name, value)| (&**name, &**value));
        for (name, value) in content_type.into_iter().chain(location).chain(headers) {
            if !changes.drops(name.as_bytes()) {
                put(out, name.as_bytes(), value.as_bytes());
            }
        }
        for (name, value) in changes.put_in() {
            put(out, name.as_bytes(), value.as_bytes());
        }
        self.quota.tell(out);
        put_head_end(out, to);
        if !to.without_body {
            out.extend_from_slice(self.body.as_bytes());
        }
    }
}
