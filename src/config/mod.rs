//! The configuration file: from YAML to checked values.

pub mod file;
pub mod yaml;
