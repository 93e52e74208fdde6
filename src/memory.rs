//! What the process uses of memory, and what it may: as the kernel tells. Must not judge.

use std::fs;
use std::path::{Path, PathBuf};

/// Where control groups are mounted.
const CGROUPS: &str = "/sys/fs/cgroup";

/// What the process uses of memory; `None` where the kernel does not tell.
pub fn resident_bytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// The least that the control group of the process, or one around it, allows; `None` without a bound.
pub fn limit_bytes() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let of_file = |path: PathBuf| fs::read_to_string(path).ok();
    limit_of(&groups, of_file)
}

/// `groups` is as in /proc/self/cgroup: `0::PATH` of version 2, `N:…memory…:PATH` of version 1 (cgroups(7)).
fn limit_of(groups: &str, of_file: impl Fn(PathBuf) -> Option<String>) -> Option<u64> {
    let mut limits = Vec::new();
    for group in groups.lines() {
        let mut parts = group.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else {
            continue;
        };
        let (root, file) = match controllers {
            "" => (PathBuf::from(CGROUPS), "memory.max"),
            _ if controllers.split(',').any(|name| name == "memory") => {
                (Path::new(CGROUPS).join("memory"), "memory.limit_in_bytes")
            }
            _ => continue,
        };
        // Within a container the group may be mounted as the root, whatever its path is outside.
        for path in Path::new(path.trim_start_matches('/')).ancestors() {
            let text = of_file(root.join(path).join(file));
            limits.extend(text.and_then(|text| text.trim().parse::<u64>().ok()));
        }
    }
    // Version 1 says a number near 2^63 for none.
    limits.into_iter().filter(|limit| *limit < 1 << 60).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_process_uses_is_told() {
        assert!(resident_bytes().unwrap() > 1 << 20);
    }

    #[test]
    fn the_narrowest_control_group_counts() {
        let file = |path: PathBuf| {
            Some(match path.to_str().unwrap() {
                "/sys/fs/cgroup/a/b/memory.max" => "max\n".to_owned(),
                "/sys/fs/cgroup/a/memory.max" => "500\n".to_owned(),
                "/sys/fs/cgroup/memory/c/memory.limit_in_bytes" => "400\n".to_owned(),
                "/sys/fs/cgroup/memory/memory.limit_in_bytes" => i64::MAX.to_string(),
                _ => return None,
            })
        };
        assert_eq!(limit_of("0::/a/b\n", file), Some(500));
        assert_eq!(limit_of("5:memory:/c\n0::/a/b\n", file), Some(400));
        assert_eq!(limit_of("4:cpu,memory:/d\n1:name=systemd:/a", file), None);
        assert_eq!(limit_of("nonsense", file), None);
    }
}
