//! `weir check`: whether a file is right, and what it means with every default.

use std::path::Path;

use crate::config::show;

/// An error tells every mistake in the file; with `print`, a right file is printed in its long form.
pub fn run(file: &Path, print: bool) -> anyhow::Result<()> {
    let config = super::load(file)?;
    if print {
        super::print(&show::yaml(&config))?;
    }
    Ok(())
}
