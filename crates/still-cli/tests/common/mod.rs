//! The binary under test and small random models to feed it.

#![allow(dead_code, reason = "each test binary uses a part")]

#[cfg(unix)]
pub mod terminal;

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use assert_cmd::Command;
use candle_core::DType;
use still_attention::StillConfig;
use still_model::random::{random_model, save_base, tiny_config, tiny_sliding_config};
use still_model::{ExportKind, FeatureInit, Model, ModelConfig, Student, save_student};
use tempfile::TempDir;

/// Path of the built command.
pub const BINARY: &str = env!("CARGO_BIN_EXE_still");

/// `still`, with no settings of the person who runs the tests.
pub fn still() -> Command {
    let mut command = Command::new(BINARY);
    command.env_remove("NO_COLOR").env_remove("STILL_CACHE").env("HF_HUB_OFFLINE", "1");
    command
}

/// `linearize --model … --data … --out …` by the recipe that calibrates nothing, without the minute that a verdict may take.
pub fn linearize_args(model: &Path, data: &Path, out: &Path) -> Vec<OsString> {
    linearize_by("uniform".as_ref(), model, data, out)
}

/// The same by another recipe.
pub fn linearize_by(recipe: &Path, model: &Path, data: &Path, out: &Path) -> Vec<OsString> {
    let mut args = vec![OsString::from("linearize"), "--no-verdict".into()];
    for (option, path) in
        [("--recipe", recipe), ("--model", model), ("--data", data), ("--out", out)]
    {
        args.extend([option.into(), path.into()]);
    }
    args
}

/// What a run said.
#[derive(Debug)]
pub struct Outcome {
    /// Exit code; −1 for a signal.
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Outcome {
    /// Runs the command to its end.
    pub fn of(command: &mut Command) -> Self {
        let output = command.output().unwrap();
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    #[track_caller]
    pub fn succeeded(&self) {
        assert_eq!(self.code, 0, "stderr: {}", self.stderr);
    }

    /// Exit code 1, one `error:` line that contains `words`, one `hint:` line, nothing on stdout, no panic.
    #[track_caller]
    pub fn failed_with(&self, words: &str) {
        assert_eq!(self.code, 1, "stderr: {}", self.stderr);
        assert!(self.stdout.is_empty(), "stdout: {}", self.stdout);
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
        let errors: Vec<&str> =
            self.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
        assert_eq!(errors.len(), 1, "{}", self.stderr);
        assert!(errors[0].contains(words), "no {words:?} in: {}", self.stderr);
        let last = self.stderr.lines().last().unwrap_or_default();
        assert!(last.starts_with("hint: ") && last.len() > 6, "{}", self.stderr);
        assert!(!last.contains("this is a bug"), "{}", self.stderr);
    }

    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {}", self.stdout))
    }
}

/// A random student of two layers that never ends by itself.
fn tiny_student() -> Model {
    student_of(tiny_config())
}

/// The same of a Gemma 3 whose layers 1 and 4 are hybrid; three keep their attention to a window of 12 tokens. Queries are scaled
/// by another number than the heads' channels.
pub fn sliding_student() -> Model {
    student_of(ModelConfig { query_pre_attn_scalar: Some(20.0), ..tiny_sliding_config() })
}

fn student_of(config: ModelConfig) -> Model {
    let config = ModelConfig { eos_token_ids: vec![], ..config };
    let model = random_model(config.clone(), 7).unwrap();
    let still = StillConfig::uniform(config.num_hidden_layers, config.geometry(), 64, 4);
    let still = config.fit_still(still);
    let student = Student::init(still, &config, FeatureInit::Identity, 7).unwrap();
    model.with_student(student)
}

/// A fresh directory of this test binary under the build's own temporary directory.
fn scratch(name: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(env!("CARGO_CRATE_NAME")).join(name);
    if dir.exists() {
        fs::remove_dir_all(&dir).unwrap();
    }
    fs::create_dir_all(dir.parent().unwrap()).unwrap();
    dir
}

/// A fresh directory whose content outlives the test, to be looked at.
pub fn kept_dir(name: &str) -> PathBuf {
    let dir = scratch(&format!("kept/{name}"));
    fs::create_dir_all(&dir).unwrap();
    dir
}

/// A saved student.
pub fn student_dir() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        let dir = scratch("student");
        save_student(&dir, &tiny_student(), ExportKind::Full(DType::F32)).unwrap();
        dir
    })
}

/// The same model as a plain base model.
pub fn teacher_dir() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        let dir = scratch("teacher");
        save_base(&dir, &tiny_student(), DType::F32).unwrap();
        dir
    })
}

/// [`sliding_student`], saved.
pub fn sliding_student_dir() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        let dir = scratch("sliding-student");
        save_student(&dir, &sliding_student(), ExportKind::Full(DType::F32)).unwrap();
        dir
    })
}

/// The same model as a plain base model.
pub fn sliding_teacher_dir() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        let dir = scratch("sliding-teacher");
        save_base(&dir, &sliding_student(), DType::F32).unwrap();
        dir
    })
}

/// Saves a student of the base in a directory as a delta.
pub fn save_delta(base: &Path, delta: &Path) {
    let model = Model::load(base.to_str().unwrap()).unwrap();
    let student = tiny_student().student.unwrap();
    save_student(delta, &model.with_student(student), ExportKind::Delta).unwrap();
}

/// A student with this chat template that answers everything with exclamation marks: its head is zero, and of equal
/// logits the lowest id wins. So its answers are text, whatever the weights.
pub fn chat_dir(template: &str) -> TempDir {
    chat_dir_of(tiny_student(), template)
}

/// The same of another student.
pub fn chat_dir_of(mut model: Model, template: &str) -> TempDir {
    let mut decoder = model.decoder.as_ref().clone();
    decoder.config.tie_word_embeddings = false;
    decoder.lm_head = decoder.lm_head.to_tensor().unwrap().zeros_like().unwrap().into();
    model.decoder = Arc::new(decoder);
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("student");
    save_student(&dir, &model, ExportKind::Full(DType::F32)).unwrap();
    let config = serde_json::json!({ "chat_template": template });
    fs::write(dir.join("tokenizer_config.json"), config.to_string()).unwrap();
    parent
}

/// Copies the files of a directory.
pub fn copy_dir(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// Varied words, deterministic.
pub fn words(count: usize) -> String {
    const WORDS: [&str; 8] = ["sea", "ship", "wind", "harbour", "sail", "storm", "rope", "gull"];
    (0..count).map(|i| WORDS[(i * i + i / 3) % WORDS.len()]).collect::<Vec<_>>().join(" ")
}

/// Elements that must be closed in their order; an attribute's text may hold no bare `<` (checked by this too).
#[track_caller]
pub fn assert_balanced(page: &str) {
    const VOID: [&str; 3] = ["meta", "!doctype", "br"];
    // Style and script are not markup.
    let mut rest = page.to_owned();
    for element in ["style", "script"] {
        let (open, close) = (format!("<{element}>"), format!("</{element}>"));
        let (from, to) = (rest.find(&open).unwrap(), rest.find(&close).unwrap());
        rest.replace_range(from..to + close.len(), "");
    }
    let mut open: Vec<String> = Vec::new();
    for tag in rest.split('<').skip(1) {
        let (tag, _) = tag.split_once('>').expect("a tag that is not closed");
        let name = tag.trim_start_matches('/').split([' ', '/', '\n']).next().unwrap().to_owned();
        if let Some(closed) = tag.strip_prefix('/') {
            assert_eq!(open.pop().as_deref(), Some(closed), "in <{tag}>");
        } else if !tag.ends_with('/') && !VOID.contains(&name.as_str()) {
            open.push(name);
        }
    }
    assert!(open.is_empty(), "left open: {open:?}");
}
