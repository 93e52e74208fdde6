//! Figures of docs/ are those of the pages in benches/, rounded as the reader sees them.

const AUDIT: &str = include_str!("../../benches/AUDIT.md");
const LANE: &str = include_str!("../../benches/LANE.md");
const RESULTS: &str = include_str!("../../benches/RESULTS.md");
const SCALE: &str = include_str!("../../benches/SCALE.md");
const SHARED: &str = include_str!("../../benches/SHARED.md");

const KUBERNETES: &str = include_str!("../../docs/kubernetes.md");
const OVERLOAD: &str = include_str!("../../docs/overload.md");
const VALUES: &str = include_str!("../../charts/weir/values-production.yaml");

/// The figure in the first row of this name, of the first table of the `page` that has this column.
fn figure(page: &str, row: &str, column: &str) -> f64 {
    let cells = |line: &str| -> Vec<String> {
        let cells = line.trim_matches('|').split('|');
        cells.map(|cell| cell.trim().to_owned()).collect()
    };
    let mut at = None;
    for line in page.lines() {
        let cells = cells(line);
        if let Some(found) = cells.iter().position(|cell| cell == column) {
            at = Some(found);
        } else if let Some(at) = at.filter(|_| cells[0] == row) {
            let figure = cells[at].split(' ').next().unwrap().replace(',', "");
            return figure.parse().unwrap();
        }
    }
    panic!("{row}, {column}");
}

#[test]
fn figures_of_the_docs_are_those_that_were_measured() {
    let says = |doc: &str, text: String| assert!(doc.contains(&text), "{text}");
    let (at_once, paced) = LANE.split_once("## At a pace").unwrap();
    let cpu = |page, row| figure(page, row, "weir proxy, CPU µs a request");
    let [plain, best, safe] =
        ["not audited", "best effort", "guaranteed"].map(|it| cpu(at_once, it));
    says(
        KUBERNETES,
        format!("| a request, not audited | {plain:.1} µs"),
    );
    says(KUBERNETES, format!("`best_effort` | {best:.1} µs"));
    says(
        KUBERNETES,
        format!(
            "`guaranteed` | {safe:.1} µs flat out, {:.0} at 12,000 a second",
            cpu(paced, "guaranteed")
        ),
    );
    says(
        VALUES,
        format!(
            "some {:.0} µs audited under best effort",
            cpu(paced, "best effort")
        ),
    );
    says(
        VALUES,
        format!(
            "guaranteed {:.0} where 12,000 a second",
            cpu(paced, "guaranteed")
        ),
    );

    let calls = figure(SHARED, "weir", "Redis calls per 100");
    says(
        KUBERNETES,
        format!("| {calls:.3} calls of Redis in 100 requests"),
    );
    let idle = figure(RESULTS, "weir", "KiB a connection");
    let at_rest = figure(RESULTS, "weir", "RSS before any load, MiB");
    says(
        KUBERNETES,
        format!("a connection that is kept, idle | {idle:.2} KiB"),
    );
    says(
        VALUES,
        format!("{at_rest:.0} MiB, {idle:.2} KiB for each connection"),
    );
    let request = |section: &str| {
        let (_, behind) = RESULTS.split_once(section).unwrap();
        figure(behind, "weir", "CPU µs a request")
    };
    let (refused, served) = (request("\n## refusal\n"), request("\n## plain\n"));
    says(
        OVERLOAD,
        format!("({refused:.1} µs and {served:.1} in benches/RESULTS.md)"),
    );

    let kept =
        |row| ["bytes each of those", "bytes each in Redis"].map(|it| figure(SCALE, row, it));
    let [key, key_in_redis] = kept("keys of a token bucket");
    let [session, session_in_redis] = kept("sessions");
    let session = session / 1024.0;
    says(
        KUBERNETES,
        format!("| {key} bytes in the process, {key_in_redis} in Redis"),
    );
    says(
        KUBERNETES,
        format!(
            "| {session:.1} KiB in each process that remembers it, {session_in_redis} bytes in Redis"
        ),
    );
    says(VALUES, format!("{key} bytes for each key of a limit"));
    says(VALUES, format!("{session:.1} KiB for each session"));
    says(
        VALUES,
        format!("{session_in_redis} bytes a session and {key_in_redis} a counter"),
    );

    let rows = [
        "best effort, flat out",
        "guaranteed, 12,000/s",
        "guaranteed, 1,000/s",
    ];
    let [full, some, alone] = rows.map(|row| figure(AUDIT, row, "B in Postgres"));
    says(
        KUBERNETES,
        format!("| {full} bytes in batches of 186, {some} in batches of 13, {alone} where each"),
    );
    let [full, some, alone] = rows.map(|row| figure(AUDIT, row, "Postgres"));
    says(
        KUBERNETES,
        format!("{full:.1} to {some:.1} µs of CPU, {alone:.0} where 1,000 a second come"),
    );
    let ingested = (figure(AUDIT, "best effort, 150,000/s", "events/s") / 1_000.0).round();
    says(
        KUBERNETES,
        format!("| {ingested},000 events a second without falling behind"),
    );
    says(
        VALUES,
        format!("{ingested},000 events a second from one worker"),
    );
}
