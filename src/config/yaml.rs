//! YAML tree.
