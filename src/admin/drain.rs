//! `/v1/drain`: has clients told to leave, while they are served on.

use hyper::Method;
use tokio::sync::watch;
use tracing::info;

use super::{Answer, Problem, Reply};
use crate::plan::Phase;

/// By what the rest of the process hears of it.
#[derive(Debug)]
pub struct Leave {
    /// True has `/ready` say so.
    pub unready: watch::Sender<bool>,
    /// What the lanes go by.
    pub phases: watch::Sender<Phase>,
}

/// `POST /v1/drain`. It changes nothing where it was asked for before, or where the process drains already.
pub(super) fn answer(leave: Option<&Leave>, method: &Method) -> Answer {
    let Some(leave) = leave else {
        return Err(Problem::not_found("a worker has no clients to tell"));
    };
    if method != Method::POST {
        return Err(Problem::method("POST"));
    }
    leave.unready.send_replace(true);
    let begun = leave.phases.send_if_modified(|phase| {
        let is_new = *phase == Phase::Serving;
        if is_new {
            *phase = Phase::Leaving;
        }
        is_new
    });
    if begun {
        info!("clients are told to leave, and served on");
    }
    Ok(Reply::Nothing)
}
