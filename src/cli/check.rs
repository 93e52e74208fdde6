//! `weir check`: whether a file is right, and what it means with every default.

use std::io::Write as _;
use std::path::Path;

use anyhow::Context;

use super::load;
use crate::config::show;

/// An error tells every mistake in the file; with `print`, a right file is printed in its long form.
pub fn run(file: &Path, print: bool) -> anyhow::Result<()> {
    let config = load(file)?;
    if print {
        write!(std::io::stdout(), "{}", show::yaml(&config))
            .context("cannot write the configuration")?;
    }
    Ok(())
}
