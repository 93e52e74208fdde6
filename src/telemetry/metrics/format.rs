//! Which text format metrics are sent in: OpenMetrics where it is asked for, as Prometheus does, else the one before it, version 0.0.4.

use http::HeaderMap;
use http::header::ACCEPT;

const OPENMETRICS: &str = "application/openmetrics-text";

/// The MIME type and the text for who sent these fields, of a text of OpenMetrics.
pub fn as_asked(fields: &HeaderMap, openmetrics: String) -> (&'static str, String) {
    let accepts = fields.get_all(ACCEPT).iter();
    let mut accepted = accepts.flat_map(|value| value.to_str().unwrap_or_default().split(','));
    match accepted.any(is_openmetrics) {
        true => (
            "application/openmetrics-text; version=1.0.0; charset=utf-8",
            openmetrics,
        ),
        false => (
            "text/plain; version=0.0.4; charset=utf-8",
            classic(&openmetrics),
        ),
    }
}

fn is_openmetrics(accepted: &str) -> bool {
    let mut parts = accepted.split(';').map(str::trim);
    let is_named = parts
        .next()
        .is_some_and(|kind| kind.eq_ignore_ascii_case(OPENMETRICS));
    let weight = parts.find_map(|part| part.strip_prefix("q=")?.parse::<f32>().ok());
    is_named && weight.is_none_or(|weight| weight > 0.0)
}

/// Samples are written alike in both.
fn classic(openmetrics: &str) -> String {
    let mut text = String::with_capacity(openmetrics.len());
    let mut help = None;
    for line in openmetrics.split_inclusive('\n') {
        if let Some(said) = line.strip_prefix("# HELP ") {
            help = said.split_once(' ');
        } else if let Some(said) = line.strip_prefix("# TYPE ") {
            let Some((name, kind)) = said.trim_end().split_once(' ') else {
                continue;
            };
            // There a family has the name of its samples.
            let (suffix, kind) = match kind {
                "counter" => ("_total", kind),
                "info" => ("_info", "gauge"),
                "unknown" => ("", "untyped"),
                _ => ("", kind),
            };
            if let Some((_, help)) = help.take() {
                text.extend(["# HELP ", name, suffix, " ", help]);
            }
            text.extend(["# TYPE ", name, suffix, " ", kind, "\n"]);
        } else if !line.starts_with('#') {
            text.push_str(line);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    #[test]
    fn families_have_the_names_of_their_samples() {
        let openmetrics = "# HELP a Requests of a\\nb.\n# TYPE a counter\na_total{b=\"# c\"} 1\n\
            # HELP weir_build What runs.\n# TYPE weir_build info\nweir_build_info{version=\"1\"} 1\n\
            # HELP t_seconds Times.\n# TYPE t_seconds histogram\n# UNIT t_seconds seconds\nt_seconds_sum 0.5\n\
            t_seconds_count 1\nt_seconds_bucket{le=\"1.0\"} 1\nt_seconds_bucket{le=\"+Inf\"} 1\n\
            # HELP g How much.\n# TYPE g gauge\ng -3\n# EOF\n";
        let classic = "# HELP a_total Requests of a\\nb.\n# TYPE a_total counter\na_total{b=\"# c\"} 1\n\
            # HELP weir_build_info What runs.\n# TYPE weir_build_info gauge\nweir_build_info{version=\"1\"} 1\n\
            # HELP t_seconds Times.\n# TYPE t_seconds histogram\nt_seconds_sum 0.5\n\
            t_seconds_count 1\nt_seconds_bucket{le=\"1.0\"} 1\nt_seconds_bucket{le=\"+Inf\"} 1\n\
            # HELP g How much.\n# TYPE g gauge\ng -3\n";
        assert_eq!(super::classic(openmetrics), classic);
    }
}
