//! What texts of files come to, for tests.

use super::super::{Checked, checked};
use crate::config::Config;
use crate::config::yaml::Mistake;

/// The configuration, or its mistakes as they are told.
pub(in crate::config::check) fn read(text: &str) -> Result<Config, Vec<String>> {
    let told = checked(text, &|_| None).map_err(|mistakes| said(&mistakes));
    told.map(|Checked { config, .. }| config)
}

/// The warnings of a file without mistakes.
pub(in crate::config::check) fn warned(text: &str) -> Vec<String> {
    match checked(text, &|_| None) {
        Ok(checked) => said(&checked.warnings),
        Err(mistakes) => panic!("{mistakes:#?}\n{text}"),
    }
}

fn said(mistakes: &[Mistake]) -> Vec<String> {
    mistakes.iter().map(Mistake::to_string).collect()
}
