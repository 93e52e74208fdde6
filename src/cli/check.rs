//! `weir check`: whether a file is right, and what it means with every default.

use std::path::Path;

use anyhow::Error;

use crate::config::show;
use crate::config::tls::PemFile;
use crate::config::yaml::Mistake;
use crate::net::tls::{self, Secured};

/// An error tells every mistake in the file. What is warned of goes to standard error; of a right file standard output says so, or has its long
/// form with `print`.
pub fn run(file: &Path, print: bool) -> anyhow::Result<()> {
    let checked = super::read(file)?;
    look_at_pem_files(file, &checked.pem_files)?;
    // As `weir run` does, for what only shows once all is put together.
    Secured::read(&checked.config, &Secured::default()).map_err(Error::msg)?;
    for warning in &checked.warnings {
        eprintln!("warning: {warning}");
    }
    match print {
        true => super::print(&show::yaml(&checked.config)),
        false => super::print(&format!("{}: no mistakes\n", file.display())),
    }
}

fn look_at_pem_files(file: &Path, pem_files: &[PemFile]) -> anyhow::Result<()> {
    let mistakes = pem_files.iter().filter_map(|pem| {
        let error = tls::look(pem).err()?;
        Some(Mistake {
            place: pem.place.clone(),
            message: error.to_string(),
        })
    });
    let mut mistakes: Vec<_> = mistakes.collect();
    Mistake::sort(&mut mistakes);
    match mistakes.is_empty() {
        true => Ok(()),
        false => Err(super::told(file, &mistakes)),
    }
}
