//! `weir migrate`: the schema of Postgres brought up to date, or found to be.

use std::path::Path;

use anyhow::{Context, bail};

use super::{control, load, print, with_mend};
use crate::store::postgres::Postgres;
use crate::store::postgres::migrate::migrate;

/// Says what it has done. An error where the schema is newer than this weir, or Postgres does not answer.
pub fn run(file: &Path) -> anyhow::Result<()> {
    let config = load(file)?;
    let Some(settings) = &config.postgres else {
        bail!(
            "{} has no \"postgres\": there is no schema to bring up to date",
            file.display()
        );
    };
    let migrated = control::run(async {
        let postgres = Postgres::new(settings)?;
        let connection = postgres.write().await?;
        anyhow::Ok(migrate(connection).await?)
    });
    let migrated = migrated.map_err(with_mend);
    let migrated = migrated.context("the schema was not brought up to date")?;
    let said = match migrated.from == migrated.to {
        true => format!("the schema is at version {} already\n", migrated.to),
        false => format!(
            "the schema was at version {} and is at {} now\n",
            migrated.from, migrated.to
        ),
    };
    print(&said)
}
