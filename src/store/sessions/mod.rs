//! The sessions of one entry of `sessions:`, as lanes, the worker and the admin port share them: in this process, or in Redis.

mod memory;

pub use memory::{CreateError, Created, LiveSessions, Page, Sessions, Token};
