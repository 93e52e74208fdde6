//! The configuration file: from YAML to checked values, with every mistake told at once.

pub mod file;
pub mod units;
pub mod yaml;
