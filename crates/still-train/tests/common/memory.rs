//! Resident memory of this process, where the system tells it by field (Linux).

/// `VmRSS` (now) or `VmHWM` (at most so far) of `/proc/self/status`, bytes.
pub fn resident_bytes(field: &str) -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap();
    let kilobytes = line.split_whitespace().nth(1).unwrap();
    kilobytes.parse::<usize>().unwrap() * 1024
}
