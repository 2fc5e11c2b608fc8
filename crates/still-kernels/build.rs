//! Compiles `src/cuda/*.cu` into one static library, if the feature `cuda` asks for it.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    if let Err(error) = cuda::build() {
        eprintln!("error: the CUDA kernels could not be compiled: {error}");
        eprintln!("hint: {}", cuda::hint());
        std::process::exit(1);
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    use std::error::Error;
    use std::path::PathBuf;

    use cudaforge::{CudaToolkit, KernelBuilder};

    const SOURCES: &str = "src/cuda";

    /// Machine code for Hopper, whose warpgroup products exist under this name alone.
    const HOPPER: &str = "90a";

    /// Machine code for Ampere, and PTX that the driver translates for whatever is newer than either.
    const OTHERS: &str = "-gencode=arch=compute_80,code=[sm_80,compute_80]";

    pub fn build() -> Result<(), Box<dyn Error>> {
        let toolkit = CudaToolkit::detect()?;
        let library = PathBuf::from(std::env::var("OUT_DIR")?);
        let archive = library.join("libstill_cuda.a");
        // The archiver would add to it, and keep what a removed source has left there.
        if archive.exists() {
            std::fs::remove_file(&archive)?;
        }
        // A folder that is watched is hashed for its headers: a source is compiled again if it or any of them has changed.
        KernelBuilder::new()
            .source_dir(SOURCES)
            .watch([SOURCES])
            .compute_cap_arch(HOPPER)
            .args(["-O3", "-std=c++17", "--expt-relaxed-constexpr", "--extended-lambda", OTHERS])
            .build_lib(&archive)?;
        println!("cargo:rustc-link-search=native={}", library.display());
        println!("cargo:rustc-link-lib=static=still_cuda");
        println!("cargo:rustc-link-search=native={}", toolkit.lib_dir.display());
        println!("cargo:rustc-link-lib=dylib=cudart");
        println!("cargo:rustc-link-lib=dylib=stdc++");
        Ok(())
    }

    pub fn hint() -> &'static str {
        "nvcc is looked for in $NVCC, $PATH, $CUDA_HOME/bin and /usr/local/cuda/bin. Without a CUDA toolkit, \
         `eval \"$(scripts/cuda-env.sh)\"` makes one from wheels; without a GPU to build for, leave out the feature `cuda`"
    }
}
