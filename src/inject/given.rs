//! A configuration that a pod brings in its annotation: whether it is right, and of one mind with the pod.

use super::annotations::CONFIG_INLINE;
use super::{Mode, Settings, Unfit};
use crate::config::listeners::Address;
use crate::config::{Config, check, yaml};

/// Kubernetes takes 256 KiB of annotations; what is made of a text while it is looked at is many times as large.
const MAX_TEXT: usize = 64 << 10;
/// Of a file's mistakes, how many are told at a time.
const MAX_TOLD: usize = 20;

/// `env` is weir's environment in the pod. A text that names files is not looked at: what is in them is the pod's, and not to be read here.
pub(super) fn refuse_wrong(
    text: &str,
    env: &dyn Fn(&str) -> Option<String>,
    (mode, settings): (Mode, &Settings),
) -> Result<(), Unfit> {
    let unfit =
        |problem: String| Unfit::new(format!("metadata.annotations[{CONFIG_INLINE:?}]"), problem);
    if text.len() > MAX_TEXT {
        let problem = format!(
            "longer than {MAX_TEXT} bytes: put it into a ConfigMap, and name that by weir.dev/config"
        );
        return Err(unfit(problem));
    }
    if !yaml::named_files(text).is_empty() {
        return Ok(());
    }
    let config = check::parse(text, env).map_err(|mistakes| {
        let told = mistakes.iter().take(MAX_TOLD).map(ToString::to_string);
        unfit(told.collect::<Vec<_>>().join("; "))
    })?;
    disagreement(&config, mode, settings).map_or(Ok(()), |problem| Err(unfit(problem)))
}

fn disagreement(config: &Config, mode: Mode, settings: &Settings) -> Option<String> {
    let listener = config
        .listeners
        .iter()
        .find(|listener| match &listener.address {
            Address::Tcp(address) => address.port() == settings.port && !address.ip().is_loopback(),
            Address::Unix(_) => false,
        });
    let Some(listener) = listener else {
        return Some(format!(
            "no listener takes requests on port {}, where they are sent: give one the address \"[::]:${{WEIR_PORT}}\"",
            settings.port
        ));
    };
    if listener.transparent != (mode == Mode::Redirect) {
        return Some(format!(
            "in this mode the listener on port {} must have transparent: {}",
            settings.port, !listener.transparent
        ));
    }
    if config.admin.address.port() != settings.admin_port {
        return Some(format!(
            "the admin port is not {}, where the kubelet's probes ask: write admin: {{address: \"127.0.0.1:${{WEIR_ADMIN_PORT}}\"}}",
            settings.admin_port
        ));
    }
    let metrics = config.metrics_address.map(|address| address.port());
    (metrics != Some(settings.metrics_port)).then(|| {
        format!(
            "/metrics is not on port {}, where it is asked for: write metrics: {{address: \"[::]:${{WEIR_METRICS_PORT}}\"}}",
            settings.metrics_port
        )
    })
}
