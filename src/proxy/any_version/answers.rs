//! Where an upstream's responses come from, by either version; and what is known of a request that came to none.

use std::cell::Cell;
use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Poll, ready};

use h2::client::ResponseFuture;
use h2::{Reason, RecvStream};

use crate::http1::response::{BadResponse, ResponseHead};
use crate::http2::head::{Answering, downgrade_response};
use crate::net::stream::Reading;
use crate::net::window::Window;
use crate::proxy::framing::read_head;
use crate::proxy::outgoing::Request;
use crate::proxy::reply::Rejection;

/// Where responses come from.
pub(super) enum Answers<'a> {
    Http1(Reading<'a, 'a>),
    Http2 {
        response: ResponseFuture,
        fate: &'a Cell<Fate>,
        /// Of its connection.
        window: &'a Window,
    },
}

/// What is known of a request that was sent by HTTP/2 and came to no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// It was looked at, or may have been.
    Seen,
    /// It was not looked at (RFC 9113 section 8.7).
    Unseen,
    /// What came for an answer is none.
    Answered,
    /// Its connection ended, be it closed or full of nonsense, perhaps for another's part.
    Lost,
}

impl Fate {
    pub(super) fn of(error: &h2::Error) -> Fate {
        let refused = error.is_reset() && error.reason() == Some(Reason::REFUSED_STREAM);
        // A farewell is the error of those streams alone that it leaves out (section 6.8).
        if error.is_remote() && (refused || error.is_go_away()) {
            Fate::Unseen
        } else if error.is_library() && error.is_go_away() {
            // weir has ended the connection, perhaps for what this request is answered by: so would the next one end.
            Fate::Seen
        } else if error.is_io() || error.is_go_away() {
            Fate::Lost
        } else if error.is_library() {
            // A stream that is reset for what the other side sent.
            Fate::Answered
        } else {
            Fate::Seen
        }
    }
}

impl Answers<'_> {
    /// The next head, interim or final, at the front of `answer`; where it came by HTTP/2, a final one's body too. A call that is
    /// dropped has lost nothing.
    pub(super) async fn head(
        &mut self,
        request: &Request,
        to_http1: bool,
        answer: &mut Vec<u8>,
    ) -> Result<(ResponseHead, Option<RecvStream>), Rejection> {
        match self {
            Answers::Http1(stream) => Ok((read_head(request, stream, answer).await?, None)),
            Answers::Http2 { response, fate, .. } => {
                let mut how = Answering {
                    to_head: request.is_head,
                    ended: false,
                    to_http1,
                };
                let (parts, body) = poll_fn(|cx| {
                    if let Poll::Ready(Some(interim)) = response.poll_informational(cx) {
                        return Poll::Ready(interim.map(|interim| (interim.into_parts().0, None)));
                    }
                    let response = ready!(Pin::new(&mut *response).poll(cx));
                    Poll::Ready(response.map(|response| {
                        let (parts, body) = response.into_parts();
                        (parts, Some(body))
                    }))
                })
                .await
                .map_err(|error| {
                    fate.set(Fate::of(&error));
                    match fate.get() {
                        Fate::Answered => Rejection::BadResponse(BadResponse::Http2),
                        Fate::Seen | Fate::Unseen | Fate::Lost => Rejection::UpstreamBroken,
                    }
                })?;
                how.ended = body.as_ref().is_some_and(RecvStream::is_end_stream);
                let head = downgrade_response(answer, &parts, how);
                let head = head.map_err(|why| {
                    fate.set(Fate::Answered);
                    Rejection::BadResponse(why)
                })?;
                Ok((head, body))
            }
        }
    }
}
