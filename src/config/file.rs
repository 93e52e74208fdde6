//! The configuration file in its short form: YAML to checked values. Owns the keys and what is right for them.

use std::net::SocketAddr;

use serde::Deserialize;
use thiserror::Error;

/// A checked configuration; past here nothing is checked again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Where clients connect.
    pub listen: SocketAddr,
    /// Where requests go.
    pub upstream: SocketAddr,
}

/// Why a file is refused, with line and column where there are any.
#[derive(Debug, Error)]
pub enum ConfigError {
    #[error("{0}")]
    Yaml(String),
    #[error("listen: {0:?} is not an address: use IP:PORT, for example 0.0.0.0:8080")]
    Listen(String),
    #[error(
        "upstream: {0:?} is not supported: use http://IP:PORT, for example http://127.0.0.1:3000"
    )]
    Upstream(String),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    listen: String,
    upstream: String,
}

/// Reads the text of a file.
pub fn parse(text: &str) -> Result<Config, ConfigError> {
    let raw: Raw =
        serde_saphyr::from_str(text).map_err(|error| ConfigError::Yaml(error.to_string()))?;
    let listen = raw
        .listen
        .parse()
        .map_err(|_| ConfigError::Listen(raw.listen.clone()))?;
    let upstream = raw
        .upstream
        .strip_prefix("http://")
        .and_then(|rest| rest.trim_end_matches('/').parse().ok())
        .ok_or_else(|| ConfigError::Upstream(raw.upstream.clone()))?;
    Ok(Config { listen, upstream })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_short_form_is_read() {
        let config = parse(include_str!("../../config/weir.yaml")).unwrap();
        assert_eq!(config.listen, "127.0.0.1:8080".parse().unwrap());
        assert_eq!(config.upstream, "127.0.0.1:3000".parse().unwrap());
    }

    #[test]
    fn a_mistake_is_told_with_its_place_or_its_mend() {
        let says = |text: &str, part: &str| {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        };
        says("listen: 127.0.0.1:1\nupstrem: x\n", "upstrem");
        says("listen: 127.0.0.1:1\nupstrem: x\n", "line 2");
        says("listen: 127.0.0.1:1\n", "upstream");
        says(
            "listen: nowhere\nupstream: http://127.0.0.1:1\n",
            "use IP:PORT",
        );
        says(
            "listen: 127.0.0.1:1\nupstream: https://127.0.0.1:1\n",
            "use http://IP:PORT",
        );
        says("listen: [\n", "line");
    }
}
