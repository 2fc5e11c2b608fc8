//! Small valid files of every format, made by the command itself, and what reads them.

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::common::{Outcome, copy_dir, still, student_dir, teacher_dir, words};

/// Files, and a command that reads them.
pub struct Target {
    pub name: &'static str,
    /// The directory of the corpus that the command runs in a copy of.
    pub from: &'static str,
    /// Of which one is changed.
    pub files: Vec<String>,
    pub command: &'static [&'static str],
    pub stdin: &'static str,
}

/// Everything that cases begin with.
pub struct Corpus {
    dir: TempDir,
    pub targets: Vec<Target>,
}

const GENERATE: &[&str] = &["generate", "-q", "--model", "model", "-n", "1", "--prompt", "a sea"];
const STEPS: [&str; 8] = [
    "--set",
    "data.length=32",
    "--set",
    "data.min_length=8",
    "--set",
    "attention.chunk=8",
    "--set",
    "attention.budget=2",
];

impl Corpus {
    /// Makes all files.
    pub fn make() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        models(&at);
        data(&at);
        run(&at);
        results(&at);
        let targets = targets(dir.path());
        Self { dir, targets }
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }
}

/// `teacher/model`, `student/model`, `delta/model` beside its `base`, `gguf/model.gguf`.
fn models(at: &dyn Fn(&str) -> PathBuf) {
    for (name, from) in [("teacher", teacher_dir()), ("student", student_dir())] {
        fs::create_dir_all(at(name).join("model")).unwrap();
        copy_dir(from, &at(name).join("model"));
    }
    let template = r#"{"chat_template": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", "eos_token": "<|im_end|>"}"#;
    for name in ["teacher", "student"] {
        fs::write(at(name).join("model/tokenizer_config.json"), template).unwrap();
    }
    sharded(&at("teacher/model"), &at("sharded/model"));
    fs::create_dir(at("gguf")).unwrap();
    Outcome::of(
        still()
            .args(["export", "-q", "--gguf", "q8_0", "--model"])
            .arg(at("student").join("model"))
            .arg("--out")
            .arg(at("gguf").join("model.gguf")),
    )
    .succeeded();
}

/// The same model with an index that says where its tensors are.
fn sharded(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    copy_dir(from, to);
    let file = "model-00001-of-00001.safetensors";
    fs::rename(to.join("model.safetensors"), to.join(file)).unwrap();
    let bytes = fs::read(to.join(file)).unwrap();
    let end = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..end]).unwrap();
    let names = header.as_object().unwrap().keys().filter(|name| *name != "__metadata__");
    let map: serde_json::Map<_, _> = names.map(|name| (name.clone(), file.into())).collect();
    let index = serde_json::json!({ "metadata": { "total_size": 1 }, "weight_map": map });
    fs::write(to.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

/// `data` has a teacher, a recipe and one small file of each kind of data; `delta` a student that is one.
fn data(at: &dyn Fn(&str) -> PathBuf) {
    fs::create_dir_all(at("data/model")).unwrap();
    copy_dir(&at("teacher/model"), &at("data/model"));
    let text = words(120);
    let line = |n: usize| format!("{{\"id\": {n}, \"text\": \"{}\"}}\n", words(30 + n));
    let chat = "{\"messages\": [{\"role\": \"user\", \"content\": \"where is the ship\"}, \
                {\"role\": \"assistant\", \"content\": \"in the harbour, behind the storm\"}]}\n";
    fs::write(at("data/text.txt"), &text).unwrap();
    fs::write(at("data/lines.jsonl"), line(1) + &line(2) + chat).unwrap();
    for name in ["recipe.toml", "plan.toml"] {
        fs::write(at("data").join(name), RECIPE).unwrap();
    }
    zst(&at("data/lines.jsonl"), &at("data/lines.jsonl.zst"));

    // A cache of token ids is a file of token ids.
    fs::create_dir_all(at("delta/base")).unwrap();
    copy_dir(&at("teacher/model"), &at("delta/base"));
    Outcome::of(
        still()
            .current_dir(at("delta"))
            .env("STILL_CACHE", at("cache"))
            .args([
                "linearize",
                "--no-verdict",
                "-q",
                "--no-tensorboard",
                "--delta",
                "--recipe",
                "uniform",
                "--model",
                "base",
                "--out",
            ])
            .args(["model", "--set", "transfer.steps=1", "--set", "finetune.steps=1"])
            .args(STEPS)
            .arg("--data")
            .arg(at("data/text.txt")),
    )
    .succeeded();
    let _ = fs::remove_dir_all(at("delta/model.run"));
    let tokens = fs::read_dir(at("cache/tokens")).unwrap().map(|entry| entry.unwrap().path());
    let tokens: Vec<PathBuf> =
        tokens.filter(|path| path.extension().is_some_and(|end| end == "bin")).collect();
    fs::copy(&tokens[0], at("data/tokens.bin")).unwrap();
}

/// Compresses a file as one frame of raw blocks: no compressor is needed for that.
fn zst(from: &Path, to: &Path) {
    let bytes = fs::read(from).unwrap();
    // Magic; a single segment with its size in four bytes; one last raw block.
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0b1010_0000];
    frame.extend((bytes.len() as u32).to_le_bytes());
    frame.extend(&((bytes.len() as u32) << 3 | 1).to_le_bytes()[..3]);
    frame.extend(bytes);
    fs::write(to, frame).unwrap();
}

const RECIPE: &str = r#"seed = 1
[attention]
mode = "hybrid"
chunk = 8
budget = 2
cap = 9
router = { random = { seed = 3 } }
feature_map = { np_map = { householder = true } }
feature_dim = 8
[calibration]
at_length = 64
[data]
length = 32
lengths = [16, 32]
length_weights = [1.0, 2.0]
min_length = 8
pack = true
heldout = 0.0
[transfer]
steps = 1
batch = 2
linear_branch_weight = 0.5
[transfer.optimizer]
lr = 1e-2
warmup = 1
schedule = "linear"
[finetune]
steps = 1
objective = { mixed = { kl = 0.5 } }
dropout = 0.1
[finetune.lora]
rank = 2
alpha = 4.0
targets = ["q", "o"]
[evaluation]
every = 0
[guard]
spike_factor = 10.0
[checkpoint]
every = 1
keep = 1
"#;

/// `run`: a run that stopped in the middle, whose directory is to be gone on with.
fn run(at: &dyn Fn(&str) -> PathBuf) {
    fs::create_dir_all(at("run/model")).unwrap();
    copy_dir(&at("teacher/model"), &at("run/model"));
    fs::copy(at("data/text.txt"), at("run/text.txt")).unwrap();
    Outcome::of(
        still()
            .current_dir(at("run"))
            .env("STILL_CACHE", at("cache"))
            .args([
                "linearize",
                "--no-verdict",
                "-q",
                "--no-tensorboard",
                "--recipe",
                "uniform",
                "--model",
                "model",
                "--out",
                "out",
            ])
            .args(["--data", "text.txt", "--set", "transfer.steps=2", "--set", "finetune.steps=2"])
            .args(["--set", "checkpoint.every=1"])
            .args(STEPS),
    )
    .succeeded();
    fs::remove_dir_all(at("run/out")).unwrap();
}

/// `eval`: a task's file, results and samples.
fn results(at: &dyn Fn(&str) -> PathBuf) {
    fs::create_dir_all(at("eval/model")).unwrap();
    copy_dir(&at("teacher/model"), &at("eval/model"));
    let tasks = concat!(env!("CARGO_MANIFEST_DIR"), "/../still-eval/tests/data");
    fs::create_dir(at("eval/data")).unwrap();
    copy_dir(Path::new(tasks), &at("eval/data"));
    Outcome::of(
        still()
            .current_dir(at("eval"))
            .args(["eval", "-q", "--model", "model", "--tasks", "piqa", "--out", "results.json"])
            .args(["--samples", "samples.jsonl"]),
    )
    .succeeded();
}

/// All files below a directory whose names end so, as paths from it.
fn files(dir: &Path, endings: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    let mut below = vec![dir.to_path_buf()];
    while let Some(at) = below.pop() {
        for entry in fs::read_dir(at).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                below.push(path);
            } else if endings.iter().any(|end| path.to_string_lossy().ends_with(end)) {
                found.push(path.strip_prefix(dir).unwrap().to_str().unwrap().to_owned());
            }
        }
    }
    found.sort();
    assert!(!found.is_empty(), "nothing ends in {endings:?} in {}", dir.display());
    found
}

fn targets(dir: &Path) -> Vec<Target> {
    let generate =
        |name, from, files: Vec<String>| Target { name, from, files, command: GENERATE, stdin: "" };
    let one = |file: &str| vec![file.to_owned()];
    let in_run: Vec<String> =
        files(&dir.join("run"), &[".json", ".jsonl", ".toml", ".safetensors"])
            .into_iter()
            .filter(|file| file.starts_with("out.run"))
            .collect();
    vec![
        generate("config", "teacher", one("model/config.json")),
        generate("tokenizer", "teacher", one("model/tokenizer.json")),
        generate("safetensors", "teacher", files(&dir.join("teacher"), &[".safetensors"])),
        generate("index", "sharded", one("model/model.safetensors.index.json")),
        generate(
            "student",
            "student",
            files(&dir.join("student"), &["config.json", ".safetensors"]),
        ),
        Target {
            command: &["generate", "-q", "--model", "model", "-n", "1", "--prompt", "a"],
            ..generate("delta", "delta", {
                let mut all = files(&dir.join("delta"), &[".json", ".safetensors"]);
                all.retain(|file| file.starts_with("model/"));
                all
            })
        },
        Target {
            command: &["generate", "-q", "--model", "model.gguf", "-n", "1", "--prompt", "a sea"],
            ..generate("gguf", "gguf", one("model.gguf"))
        },
        Target {
            name: "template",
            from: "student",
            files: one("model/tokenizer_config.json"),
            command: &["chat", "-q", "--model", "model", "-n", "2", "--system", "be brief"],
            stdin: "where is the ship\n",
        },
        Target {
            name: "recipe",
            from: "data",
            files: one("recipe.toml"),
            command: &[
                "linearize",
                "--no-verdict",
                "-q",
                "--no-tensorboard",
                "--model",
                "model",
                "--out",
                "out",
                "--data",
                "text.txt",
                "--recipe",
                "recipe.toml",
            ],
            stdin: "",
        },
        Target {
            name: "plan",
            from: "data",
            files: one("plan.toml"),
            command: &[
                "linearize",
                "--no-verdict",
                "--dry-run",
                "-q",
                "--no-tensorboard",
                "--model",
                "model",
                "--out",
                "out",
                "--data",
                "text.txt",
                "--recipe",
                "plan.toml",
            ],
            stdin: "",
        },
        lines(
            "text",
            "text.txt",
            &[
                "linearize",
                "--no-verdict",
                "-q",
                "--no-tensorboard",
                "--recipe",
                "uniform",
                "--model",
                "model",
                "--out",
                "out",
                "--data",
                "text.txt",
                "--set",
                "data.length=32",
                "--set",
                "data.min_length=8",
                "--set",
                "transfer.steps=1",
                "--set",
                "finetune.steps=0",
            ],
        ),
        lines(
            "lines",
            "lines.jsonl",
            &[
                "linearize",
                "--no-verdict",
                "-q",
                "--no-tensorboard",
                "--recipe",
                "uniform",
                "--model",
                "model",
                "--out",
                "out",
                "--data",
                "lines.jsonl",
                "--set",
                "data.length=32",
                "--set",
                "data.min_length=8",
                "--set",
                "transfer.steps=1",
                "--set",
                "finetune.steps=0",
                "--set",
                "data.loss_on=answers",
            ],
        ),
        lines(
            "compressed",
            "lines.jsonl.zst",
            &[
                "linearize",
                "--no-verdict",
                "-q",
                "--no-tensorboard",
                "--recipe",
                "uniform",
                "--model",
                "model",
                "--out",
                "out",
                "--data",
                "lines.jsonl.zst",
                "--set",
                "data.length=32",
                "--set",
                "data.min_length=8",
                "--set",
                "transfer.steps=1",
                "--set",
                "finetune.steps=0",
            ],
        ),
        lines(
            "tokens",
            "tokens.bin",
            &[
                "linearize",
                "--no-verdict",
                "-q",
                "--no-tensorboard",
                "--recipe",
                "uniform",
                "--model",
                "model",
                "--out",
                "out",
                "--data",
                "tokens.bin",
                "--set",
                "data.length=32",
                "--set",
                "data.min_length=8",
                "--set",
                "transfer.steps=1",
                "--set",
                "finetune.steps=0",
            ],
        ),
        Target {
            name: "checkpoint",
            from: "run",
            files: in_run.clone(),
            command: &[
                "linearize",
                "--no-verdict",
                "-q",
                "--no-tensorboard",
                "--resume",
                "--recipe",
                "uniform",
                "--model",
                "model",
                "--out",
                "out",
                "--data",
                "text.txt",
                "--set",
                "transfer.steps=2",
                "--set",
                "finetune.steps=2",
                "--set",
                "checkpoint.every=1",
                "--set",
                "data.length=32",
                "--set",
                "data.min_length=8",
                "--set",
                "attention.chunk=8",
                "--set",
                "attention.budget=2",
            ],
            stdin: "",
        },
        Target {
            name: "run report",
            from: "run",
            files: in_run.into_iter().filter(|file| !file.ends_with(".safetensors")).collect(),
            command: &["report", "run", "-q", "out.run"],
            stdin: "",
        },
        Target {
            name: "task",
            from: "eval",
            files: one("data/piqa.jsonl"),
            command: &["eval", "-q", "--model", "model", "--tasks", "piqa"],
            stdin: "",
        },
        Target {
            name: "samples",
            from: "eval",
            files: one("samples.jsonl"),
            command: &[
                "eval",
                "-q",
                "--model",
                "model",
                "--tasks",
                "piqa",
                "--samples",
                "samples.jsonl",
                "--resume",
            ],
            stdin: "",
        },
        Target {
            name: "results",
            from: "eval",
            files: one("results.json"),
            command: &["report", "eval", "-q", "results.json"],
            stdin: "",
        },
    ]
}

fn lines(name: &'static str, file: &str, command: &'static [&'static str]) -> Target {
    Target { name, from: "data", files: vec![file.to_owned()], command, stdin: "" }
}
