//! What a text of metrics says.

/// The value of the series of this name with these labels, all of them; `None` where it is not told.
pub fn value(text: &str, series: &str) -> Option<f64> {
    let value = |line: &str| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok();
    text.lines().find_map(value)
}

/// What all series of this name come to.
pub fn sum(text: &str, name: &str) -> f64 {
    let value = |line: &str| {
        let labels = line.strip_prefix(name)?.strip_prefix('{')?;
        labels.rsplit(' ').next()?.parse::<f64>().ok()
    };
    text.lines().filter_map(value).sum()
}
