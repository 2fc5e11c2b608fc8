//! `still doctor`: versions, CPU features, devices and caches.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use clap::Args;
use serde::Serialize;
use still_model::{fetch, hub_cache_dir};
use still_train::free_memory_bytes;

use crate::disk::free_bytes;
use crate::outputs::existing_ancestor;
use crate::printer::Printer;
use crate::table;

const EXAMPLES: &str = "\
Examples:
  still doctor
  still doctor --json";

/// `still doctor`
#[derive(Clone, Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct DoctorArgs {
    /// Print one JSON object on stdout
    #[arg(long)]
    json: bool,
}

/// Everything that a report of a problem should contain.
#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    target: String,
    cpu: Cpu,
    /// That this process may take.
    free_memory_bytes: Option<u64>,
    /// On the disk of still's cache.
    free_disk_bytes: Option<u64>,
    devices: Vec<Device>,
    caches: Vec<CacheLocation>,
    tools: Vec<Tool>,
}

#[derive(Debug, Serialize)]
struct Cpu {
    cores: usize,
    threads_used: usize,
    features: Vec<&'static str>,
    /// The vector code that this CPU gets, chosen at run time.
    vector_code: &'static str,
}

#[derive(Debug, Serialize)]
struct Device {
    name: &'static str,
    available: bool,
    note: String,
}

#[derive(Debug, Serialize)]
struct CacheLocation {
    what: &'static str,
    path: Option<PathBuf>,
    present: bool,
    bytes: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Tool {
    name: &'static str,
    version: Option<String>,
    needed_for: &'static str,
}

/// Runs the command.
pub fn run(args: &DoctorArgs, printer: &Printer) -> anyhow::Result<()> {
    let report = gather();
    if args.json { printer.json(&report) } else { Ok(printer.result(render(&report))?) }
}

fn gather() -> Report {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    Report {
        version: env!("CARGO_PKG_VERSION"),
        target: format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS),
        cpu: Cpu {
            cores,
            threads_used: rayon::current_num_threads(),
            features: cpu_features(),
            vector_code: still_compute::vector::level(),
        },
        free_memory_bytes: free_memory_bytes(),
        free_disk_bytes: fetch::cache_dir()
            .ok()
            .and_then(|dir| free_bytes(&existing_ancestor(&dir))),
        devices: vec![Device { name: "cpu", available: true, note: "f32".into() }, cuda()],
        caches: caches(),
        tools: vec![
            tool("python3", &["--version"]),
            tool("python3 -m pip", &["-m", "pip", "--version"]),
        ],
    }
}

/// The first GPU, as a command that asks for it would find it.
fn cuda() -> Device {
    let found = still_model::device("cuda");
    let available = found.is_ok();
    let note = found.map_or_else(|error| error.to_string(), |_| "bf16, f32".into());
    Device { name: "cuda", available, note }
}

macro_rules! present {
    ($detect:ident: $($name:tt)*) => {
        [$(($name, std::arch::$detect!($name))),*]
            .into_iter()
            .filter_map(|(name, present)| present.then_some(name))
            .collect()
    };
}

fn cpu_features() -> Vec<&'static str> {
    #[cfg(target_arch = "x86_64")]
    return present!(is_x86_feature_detected: "sse4.2" "avx" "avx2" "fma" "f16c" "avx512f" "avx512bf16");
    #[cfg(target_arch = "aarch64")]
    return present!(is_aarch64_feature_detected: "neon" "fp16" "dotprod" "bf16" "sve");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    return Vec::new();
}

fn caches() -> Vec<CacheLocation> {
    let location = |what, path: Option<PathBuf>| {
        let metadata = path.as_ref().and_then(|path| std::fs::metadata(path).ok());
        let bytes = metadata.as_ref().filter(|m| m.is_file()).map(std::fs::Metadata::len);
        CacheLocation { what, path, present: metadata.is_some(), bytes }
    };
    let cache = fetch::cache_dir().ok();
    let mut caches = vec![
        location("still's cache", cache.clone()),
        location("hub cache", Some(hub_cache_dir())),
    ];
    let entries = cache.and_then(|dir| dir.read_dir().ok()).into_iter().flatten().flatten();
    let fetched = entries.map(|entry| entry.path());
    let models = fetched.filter(|path| path.extension().is_some_and(|end| end == "gguf"));
    caches.extend(models.map(|path| location("fetched model", Some(path))));
    caches
}

/// A tool that fetching the demo's model needs.
fn tool(name: &'static str, arguments: &[&str]) -> Tool {
    let output = Command::new("python3").args(arguments).stdin(Stdio::null()).output();
    let version = output.ok().filter(|output| output.status.success()).map(|output| {
        let text = String::from_utf8_lossy(&output.stdout);
        text.split_whitespace()
            .find(|word| word.starts_with(char::is_numeric))
            .unwrap_or("?")
            .into()
    });
    Tool { name, version, needed_for: "fetching the demo's model" }
}

fn render(report: &Report) -> String {
    let mut lines = vec![
        format!("still {} ({})", report.version, report.target),
        format!(
            "cpu: {} cores, {} threads used; {}",
            report.cpu.cores,
            report.cpu.threads_used,
            report.cpu.features.join(" ")
        ),
    ];
    lines.push(format!("  vector code: {}", report.cpu.vector_code));
    let size = |bytes: Option<u64>| {
        bytes.map_or("unknown".into(), |bytes| {
            table::bytes(usize::try_from(bytes).unwrap_or(usize::MAX))
        })
    };
    lines.push(format!("memory free: {}", size(report.free_memory_bytes)));
    lines.push(format!("disk free for still's cache: {}", size(report.free_disk_bytes)));
    for device in &report.devices {
        let state = if device.available { "available" } else { "not available" };
        lines.push(match device.available {
            true => format!("device {}: {state} ({})", device.name, device.note),
            false => format!("device {}: {state}\n  {}", device.name, device.note),
        });
    }
    for cache in &report.caches {
        let path = cache.path.as_ref().map_or("unknown".into(), |path| path.display().to_string());
        let state = match (cache.present, cache.bytes) {
            (true, Some(bytes)) => format!(" ({})", table::bytes(bytes as usize)),
            (true, None) => String::new(),
            (false, _) => " (not there yet)".into(),
        };
        lines.push(format!("{}: {path}{state}", cache.what));
    }
    for tool in &report.tools {
        let version = tool.version.as_deref().unwrap_or("not found");
        lines.push(format!("{}: {version} (for {})", tool.name, tool.needed_for));
    }
    lines.join("\n")
}
