//! `weir check`: whether a file is right, and what it means with every default.

use std::path::Path;

use anyhow::Error;

use crate::clock;
use crate::config::yaml::Mistake;
use crate::config::{self, show};
use crate::net::tls::{self, Secured};

/// An error tells every mistake in the file, and in those of TLS that it names. What is warned of goes to standard error; of a right file
/// standard output says so, or has its long form with `print`.
pub fn run(file: &Path, print: bool) -> anyhow::Result<()> {
    let lookup = |name: &str| std::env::var(name).ok();
    let (read, pem_files) = config::check::with_pem_files(&super::text(file)?, &lookup);
    let unusable = pem_files.iter().filter_map(|pem| {
        let error = tls::look(pem).err()?;
        Some(Mistake {
            place: pem.place.clone(),
            message: error.to_string(),
        })
    });
    let mut mistakes: Vec<_> = unusable.collect();
    let checked = match read {
        Ok(checked) if mistakes.is_empty() => checked,
        read => {
            mistakes.extend(read.err().unwrap_or_default());
            Mistake::sort(&mut mistakes);
            return Err(super::told(file, &mistakes));
        }
    };
    // As `weir run` does, for what only shows once all is put together.
    Secured::read(&checked.config, &Secured::default()).map_err(Error::msg)?;
    let now = clock::wall();
    let out_of_date = pem_files.iter().filter_map(|pem| {
        let message = tls::out_of_date(pem, now)?;
        let place = pem.place.clone();
        Some(Mistake { place, message })
    });
    let mut warnings = checked.warnings;
    warnings.extend(out_of_date);
    Mistake::sort(&mut warnings);
    for warning in &warnings {
        super::tell(&format!("warning: {warning}"));
    }
    match print {
        true => super::print(&show::yaml(&checked.config)),
        false => super::print(&format!("{}: no mistakes\n", file.display())),
    }
}
