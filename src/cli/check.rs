//! `weir check`: whether a file is right, and what it means with every default.

use std::path::Path;

use crate::config::show;

/// An error tells every mistake in the file. What is warned of goes to standard error; with `print`, a right file is printed in its long
/// form.
pub fn run(file: &Path, print: bool) -> anyhow::Result<()> {
    let checked = super::read(file)?;
    for warning in &checked.warnings {
        eprintln!("warning: {warning}");
    }
    if print {
        super::print(&show::yaml(&checked.config))?;
    }
    Ok(())
}
