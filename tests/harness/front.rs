//! weir in front of an upstream, by a listener of the test's own.

use super::Upstream;
use super::process::{Running, file};

/// With these keys of its listener and of the file.
pub struct Weir {
    pub running: Running,
    pub upstream: Upstream,
    pub config: tempfile::NamedTempFile,
}

impl Weir {
    pub fn start(listener: &str, more: &str) -> Weir {
        let upstream = Upstream::answering("ok");
        let config = configuration(&upstream.url(), listener, more);
        Weir {
            running: Running::start_in(config.path(), &[("WEIR_LOG", "info,weir=debug")]),
            upstream,
            config,
        }
    }

    pub fn address(&self) -> &str {
        &self.running.address
    }
}

pub fn configuration(upstream: &str, listener: &str, more: &str) -> tempfile::NamedTempFile {
    let address = match listener.contains("address:") {
        true => "",
        false => "address: '127.0.0.1:0', ",
    };
    file(&format!(
        "listeners: [{{name: in, {address}{listener}}}]\nupstream: '{upstream}'\nadmin: {{address: '127.0.0.1:0'}}\n\
         runtime: {{lanes: 2}}\n{more}"
    ))
}
