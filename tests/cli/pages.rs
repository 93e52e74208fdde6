//! Every page that users read: its files are accepted, its commands are commands, and its links lead to what is there.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::harness::Upstream;
use super::harness::process::{Echo, Running, file};
use super::readme::{blocks, check};

/// The pages that users read, each with its text.
fn pages() -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let docs = fs::read_dir(root.join("docs")).unwrap();
    let docs = docs.map(|entry| entry.unwrap().path());
    let others = [
        "README.md",
        "ARCHITECTURE.md",
        "SECURITY.md",
        "charts/weir/README.md",
    ];
    let mut pages: Vec<_> = docs
        .chain(others.map(|name| root.join(name)))
        .map(|path| {
            let text = fs::read_to_string(&path).unwrap();
            (path, text)
        })
        .collect();
    pages.sort();
    assert!(pages.len() > 20);
    pages
}

/// What is a whole file stands there as one, to be copied. Those that are parts have tests of their own, as have those with variables.
#[test]
fn every_file_on_every_page_is_accepted() {
    let mut accepted = 0;
    for (path, text) in pages() {
        if ["configuration.md", "rollout.md", "inject.md"]
            .iter()
            .any(|parts| path.ends_with(parts))
        {
            continue;
        }
        let of_weir = |yaml: &&str| !yaml.starts_with("services:") && !yaml.starts_with("scrape_");
        let files = blocks(&text, "yaml");
        for yaml in files.iter().map(|(yaml, _)| *yaml).filter(of_weir) {
            check(yaml);
            accepted += 1;
        }
    }
    assert!(accepted >= 13, "{accepted}");
}

/// The commands of weir in a page: of lines that are typed, and of what stands between backticks.
fn commands(text: &str) -> BTreeSet<String> {
    let typed = ["sh", "console"].map(|language| blocks(text, language));
    let typed = typed.iter().flatten().flat_map(|(lines, _)| lines.lines());
    let spans = text.split('`').skip(1).step_by(2);
    let spans = spans.filter(|text| text.starts_with("weir "));
    // One may go on in the next line.
    let spans = spans.map(|text| text.replace('\n', " "));
    let mut found = BTreeSet::new();
    for line in typed.map(str::to_owned).chain(spans) {
        let line = line.split(" #").next().unwrap_or_default();
        for part in line.split(['|', '>', '&']) {
            // Alone, behind a prompt or a folder, or behind what runs it in a container.
            let Some(at) = part.rfind("weir ") else {
                continue;
            };
            let (before, command) = part.split_at(at);
            let runs = ["$ ", "/", "-- ", "exec worker-1 "];
            let is_run = before.trim().is_empty() || runs.iter().any(|it| before.ends_with(it));
            let word = command[5..].split(' ').next().unwrap_or_default();
            let is_letter = |c: char| c.is_ascii_lowercase() || c == '-';
            let is_named =
                !word.starts_with('-') && !word.is_empty() && word.chars().all(is_letter);
            if is_run && is_named {
                found.insert(command.trim().to_owned());
            }
        }
    }
    found
}

#[test]
fn every_command_on_every_page_is_one() {
    let folder = Path::new(env!("CARGO_BIN_EXE_weir")).parent().unwrap();
    let mut typed = 0;
    for (path, text) in pages() {
        for command in commands(&text) {
            // Parsed up to there, and not done.
            let mut shell = Command::new("/bin/sh");
            let output = shell
                .args(["-fc", &format!("{command} --help")])
                .env("PATH", folder)
                .output();
            let output = output.unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(
                output.status.success(),
                "{}: {command}: {said}",
                path.display()
            );
            typed += 1;
        }
    }
    assert!(typed > 60, "{typed}");
}

/// The first block of the page's section, on a port of its own and with this app.
fn shown(page: &str, heading: &str, app: &str) -> String {
    let (_, section) = page.split_once(&format!("\n## {heading}\n")).unwrap();
    let yaml = blocks(section, "yaml")[0].0;
    let yaml = yaml.replace("127.0.0.1:8080", "127.0.0.1:0");
    let yaml = yaml.replace("127.0.0.1:3000", app);
    format!("{yaml}admin: {{address: 127.0.0.1:0}}\n")
}

#[test]
fn log_ins_are_limited_as_the_page_shows() {
    let echo = Echo::start();
    let yaml = shown(
        include_str!("../../docs/limits.md"),
        "Log-ins",
        &echo.address,
    );
    let weir = Running::start(file(&yaml).path());
    let mut client = weir.client();
    let mut tries = |path: &str| client.send("POST", path, &[], "name=ann").status;
    let of_each = ["/login?user=ann", "/login/", "/LOGIN", "/login/x", "/Login"];
    assert_eq!(of_each.map(&mut tries), [200; 5]);
    assert_eq!(tries("/login"), 429);
    assert_eq!([tries("/"), client.get("/login?user=ann").status], [200; 2]);
}

#[test]
fn a_refusal_is_told_apart_from_the_app_s_own_answer_as_the_page_says() {
    let app = Upstream::replying(|_| {
        "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n".to_owned()
    });
    let weir = Running::start(
        file(&format!(
            "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\ncircuit_breakers: {{one: {{consecutive_failures: 1, fallback: {{body: x}}}}}}\n\
             upstreams: {{app: {{endpoints: '{}', circuit_breaker: one}}}}\n",
            app.url()
        ))
        .path(),
    );
    let mut client = weir.client();
    let replies = [client.get("/"), client.get("/")];
    let whose = replies.map(|reply| (reply.status, reply.field("proxy-status").map(str::to_owned)));
    let ours = "weir; error=destination_unavailable; details=\"circuit_open\"";
    assert_eq!(whose, [(503, None), (503, Some(ours.to_owned()))]);
}

/// A heading as links name it.
fn anchor(heading: &str) -> String {
    let kept = heading.trim().to_lowercase();
    let kept = kept
        .chars()
        .filter(|c| c.is_alphanumeric() || [' ', '-', '_'].contains(c));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

#[test]
fn every_link_leads_to_what_is_there() {
    let (mut followed, mut broken) = (0, Vec::new());
    for (path, text) in pages() {
        for link in text.split("](").skip(1) {
            let link = link.split(')').next().unwrap();
            if link.starts_with("http") || link.contains([' ', '`']) {
                continue;
            }
            let (file, part) = link.split_once('#').unwrap_or((link, ""));
            let target = match file {
                "" => path.clone(),
                file => path.with_file_name(file),
            };
            let read = fs::read_to_string(&target);
            let headings = read.iter().flat_map(|text| text.lines());
            let headings = headings.filter(|line| line.starts_with('#'));
            let mut anchors = headings.map(|line| anchor(line.trim_start_matches('#')));
            if !target.exists() || !(part.is_empty() || anchors.any(|anchor| anchor == part)) {
                broken.push(format!("{}: {link}", path.display()));
            }
            followed += 1;
        }
    }
    assert!(broken.is_empty(), "{broken:#?}");
    assert!(followed > 150, "{followed}");
}

/// Of each row of the page's table that says of fields that they are dropped: from others, and kept or dropped from trusted proxies.
#[test]
fn fields_by_which_clients_are_named_go_on_as_the_security_page_says() {
    let page = include_str!("../../docs/security.md");
    let (_, table) = page
        .split_once("\n| field | from others | from trusted proxies |\n")
        .unwrap();
    let (table, _) = table.split_once("\n\n").unwrap();
    let echo = Echo::start();
    let run = |trusted: &str| {
        Running::start(
            file(&format!(
                "listeners: [{{address: '127.0.0.1:0', client_ip: {{trusted_proxies: [{trusted}]}}}}]\n\
                 upstreams: {{app: {{endpoints: 'http://{}'}}}}\nsessions: {{web: {{}}}}\n\
                 admin: {{address: 127.0.0.1:0}}\nroutes: [{{upstream: app}}]\n",
                echo.address
            ))
            .path(),
        )
    };
    let (anyone, trusted) = (run(""), run("127.0.0.1"));
    let mut seen = 0;
    for row in table.lines() {
        let cells: Vec<_> = row.trim_matches('|').split('|').map(str::trim).collect();
        let &[fields, from_others, from_trusted] = &cells[..] else {
            continue;
        };
        let is_kept = from_trusted.starts_with("kept");
        if !from_others.starts_with("dropped") || !(is_kept || from_trusted.starts_with("dropped"))
        {
            continue;
        }
        let names = fields.split([',', ' ', '(', ')']);
        let names = names.filter(|name| {
            name.starts_with(|c: char| c.is_ascii_uppercase()) && !name.ends_with('*')
        });
        for name in names {
            let value = match name {
                "X-Forwarded-Proto" => "https",
                "Forwarded" => "for=6.6.6.6",
                _ => "6.6.6.6",
            };
            let is_told = |weir: &Running| {
                let reply = weir
                    .client()
                    .send("GET", "/", &[&format!("{name}: {value}")], "");
                assert_eq!(reply.status, 200, "{name}");
                let told: serde_json::Value = serde_json::from_str(&reply.body).unwrap();
                let told = &told["headers"][name.to_ascii_lowercase()];
                told.to_string().contains(value)
            };
            assert_eq!(
                (is_told(&anyone), is_told(&trusted)),
                (false, is_kept),
                "{name}"
            );
            seen += 1;
        }
    }
    assert!(seen > 22, "{seen}");
}
