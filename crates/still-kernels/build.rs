//! Compiles `src/cuda/*.cu` into a static library, with the feature `cuda`.
//!
//! Machine code for sm_80 and sm_90a, and PTX of compute_80 for GPUs to come (which run it without Hopper's own instructions).

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::{env, fs};

const TARGETS: [&str; 3] = [
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-gencode=arch=compute_80,code=compute_80",
];
const FLAGS: [&str; 6] =
    ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "--extended-lambda", "-Xcompiler", "-fPIC"];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=src/cuda");
    println!("cargo::rerun-if-env-changed=CUDA_HOME");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    let (nvcc, home) = find_nvcc();
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let mut sources: Vec<PathBuf> = fs::read_dir("src/cuda")
        .expect("src/cuda is part of the crate")
        .map(|entry| entry.expect("a readable directory").path())
        .filter(|path| path.extension().is_some_and(|e| e == "cu"))
        .collect();
    sources.sort();

    let jobs = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1).max(1);
    let mut objects = Vec::new();
    for batch in sources.chunks(jobs) {
        let running: Vec<(Child, &PathBuf)> = batch
            .iter()
            .map(|source| {
                let object = out.join(source.with_extension("o").file_name().expect("a file"));
                let mut command = Command::new(&nvcc);
                command.args(FLAGS).args(TARGETS).arg("-c").arg(source).arg("-o").arg(&object);
                objects.push(object);
                (command.spawn().unwrap_or_else(|e| panic!("{}: {e}", nvcc.display())), source)
            })
            .collect();
        for (mut child, source) in running {
            let status = child.wait().expect("nvcc was started");
            assert!(status.success(), "nvcc failed on {}", source.display());
        }
    }
    let library = out.join("libstill_kernels.a");
    let status = Command::new(&nvcc).arg("-lib").args(&objects).arg("-o").arg(&library).status();
    assert!(status.is_ok_and(|s| s.success()), "nvcc -lib failed");

    println!("cargo::rustc-link-search=native={}", out.display());
    for folder in ["lib64", "lib", "targets/x86_64-linux/lib"] {
        if home.join(folder).is_dir() {
            println!("cargo::rustc-link-search=native={}", home.join(folder).display());
        }
    }
    println!("cargo::rustc-link-lib=static=still_kernels");
    println!("cargo::rustc-link-lib=static=cudart_static");
    for library in ["stdc++", "dl", "rt", "pthread"] {
        println!("cargo::rustc-link-lib=dylib={library}");
    }
}

/// The compiler and its toolkit's folder.
fn find_nvcc() -> (PathBuf, PathBuf) {
    let homes = env::var_os("CUDA_HOME").map(PathBuf::from);
    let on_path = env::var_os("PATH").into_iter().flat_map(|path| {
        env::split_paths(&path)
            .filter_map(|bin| bin.parent().map(Path::to_path_buf))
            .collect::<Vec<_>>()
    });
    for home in homes.into_iter().chain(on_path).chain([PathBuf::from("/usr/local/cuda")]) {
        let nvcc = home.join("bin/nvcc");
        if nvcc.is_file() {
            return (nvcc, home);
        }
    }
    panic!(
        "feature `cuda`: no nvcc in CUDA_HOME/bin, on PATH or in /usr/local/cuda/bin; install a CUDA toolkit or leave the feature off"
    );
}
