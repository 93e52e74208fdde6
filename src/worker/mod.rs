//! What runs beside the lanes, on the control thread. Meets the proxy in the plan alone.

pub mod limits;
pub mod sessions;
