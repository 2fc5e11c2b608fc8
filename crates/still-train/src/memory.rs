//! Free memory, as far as the system reports it.

use std::fs;
use std::path::Path;

/// Bytes that this process can still allocate: the least of the system's free memory (swap included), the cgroup's limit and the
/// limit on address space. `None` where the system reports nothing.
pub fn free_bytes() -> Option<u64> {
    [system(), cgroup(Path::new("/sys/fs/cgroup")), address_space()].into_iter().flatten().min()
}

/// A line such as `MemAvailable:  123 kB` of a file of them.
fn kilobytes(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

fn system() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let swap = kilobytes(&text, "SwapFree").unwrap_or(0);
    Some(kilobytes(&text, "MemAvailable")? + swap)
}

/// The limit of a container's own cgroup, in version 2 or 1 of the interface.
fn cgroup(root: &Path) -> Option<u64> {
    let number = |path: &str| -> Option<u64> {
        fs::read_to_string(root.join(path)).ok()?.trim().parse().ok()
    };
    // What is only cached is given back when it is needed.
    let cached = |path: &str, key: &str| -> u64 {
        let text = fs::read_to_string(root.join(path)).unwrap_or_default();
        let value = text.lines().find_map(|line| line.strip_prefix(key)?.trim().parse().ok());
        value.unwrap_or(0)
    };
    let left = |limit: Option<u64>, used: Option<u64>, cached: u64| {
        Some(limit?.saturating_sub(used?.saturating_sub(cached)))
    };
    let second = left(
        number("memory.max"),
        number("memory.current"),
        cached("memory.stat", "inactive_file "),
    );
    second.or_else(|| {
        left(
            number("memory/memory.limit_in_bytes"),
            number("memory/memory.usage_in_bytes"),
            cached("memory/memory.stat", "total_inactive_file "),
        )
    })
}

/// `ulimit -v`.
fn address_space() -> Option<u64> {
    let limits = fs::read_to_string("/proc/self/limits").ok()?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max address space"))?;
    let soft: u64 = line.split_whitespace().next()?.parse().ok()?;
    let used = kilobytes(&fs::read_to_string("/proc/self/status").ok()?, "VmSize")?;
    Some(soft.saturating_sub(used))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_system_are_read() {
        let text = "MemTotal:       8123456 kB\nMemAvailable:    1024 kB\nSwapFree:  x kB\n";
        assert_eq!(kilobytes(text, "MemAvailable"), Some(1 << 20));
        assert_eq!(kilobytes(text, "MemFree"), None);
        assert_eq!(kilobytes(text, "SwapFree"), None);
    }

    #[test]
    fn a_group_leaves_its_limit_less_what_is_used_and_not_only_cached() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        write("memory.max", "max\n");
        write("memory.current", "300\n");
        assert_eq!(cgroup(dir.path()), None);
        write("memory.max", "1000\n");
        assert_eq!(cgroup(dir.path()), Some(700));
        write("memory.stat", "anon 200\ninactive_file 100\n");
        assert_eq!(cgroup(dir.path()), Some(800));
        write("memory.current", "5000\n");
        assert_eq!(cgroup(dir.path()), Some(0));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn something_is_free_here() {
        assert!(free_bytes().unwrap() > 1 << 20);
    }
}
