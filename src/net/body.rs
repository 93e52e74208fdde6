//! Bodies of hyper, read whole: never more than a bound, whoever sends them. Must not know what is said.

use http_body_util::{BodyExt, Limited};
use hyper::body::{Body, Bytes};

/// `LengthLimitError` where it is longer than `most` bytes.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// All of a body of `most` bytes or fewer.
#[expect(clippy::disallowed_methods, reason = "this is the bound")]
pub async fn whole<B>(body: B, most: usize) -> Result<Bytes, Error>
where
    B: Body,
    B::Error: Into<Error>,
{
    let collected = Limited::new(body, most).collect().await?;
    Ok(collected.to_bytes())
}
