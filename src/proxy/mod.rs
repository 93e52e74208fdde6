//! The data plane: a request is served start to finish on one lane's thread. In the order of the calls: `lane` accepts, `greet` reads what comes before
//! HTTP, `http1` or `http2` has the connection, `admit` asks the policies, `outgoing` makes the request that goes out, `http1_to_http1` or
//! `any_version` exchanges it with the upstream, and `record` tells of it. ARCHITECTURE.md has the whole way.

mod admit;
mod answer;
mod any_version;
mod audit;
mod draft;
mod exchange;
mod facts;
mod following;
mod framing;
mod gate;
mod greet;
mod headers;
mod http1;
mod http1_to_http1;
mod http2;
mod idle_closing;
mod interim;
pub mod lane;
mod outbox;
mod outcome;
mod outgoing;
mod progress;
mod quota;
mod record;
mod reply;
mod retries;
mod sessions;
mod shared_limits;
mod shed;
mod trace;
mod upgrade;
mod verdicts;
mod wire;
