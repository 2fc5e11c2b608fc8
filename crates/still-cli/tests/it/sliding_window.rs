//! Every command on a model some of whose layers keep their attention to a sliding window: Gemma 3 with five layers, of which the
//! second and the last are hybrid.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use serde_json::Value;

use crate::common::{
    Outcome, assert_balanced, chat_dir_of, kept_dir, linearize_args, sliding_student,
    sliding_student_dir, sliding_teacher_dir, still, words,
};

/// Layers with full attention.
const HYBRID: [usize; 2] = [1, 4];
const LAYERS: usize = 5;
/// Tokens of the others' window.
const WINDOW: u64 = 12;
/// Bytes of a token's row of keys and values in a layer: two heads of 8 channels, 16 bits each.
const ROW: u64 = 2 * 2 * 8 * 2;

fn numbers(layers: &Value) -> Vec<usize> {
    let number = |layer: &Value| layer["layer"].as_u64().unwrap() as usize;
    layers.as_array().unwrap().iter().map(number).collect()
}

/// Heads of each layer in a list of lists.
fn heads(layers: &Value) -> Vec<usize> {
    layers.as_array().unwrap().iter().map(|layer| layer.as_array().unwrap().len()).collect()
}

fn run(model: &Path, arguments: &[&str]) -> Outcome {
    Outcome::of(still().args(arguments).arg("--model").arg(model))
}

fn text(dir: &Path, count: usize) -> String {
    let path = dir.join("text.txt");
    fs::write(&path, words(count)).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn inspect_tells_layers_with_a_window_from_hybrid_ones() {
    let dir = tempfile::tempdir().unwrap();
    let text = text(dir.path(), 600);
    let inspect = ["inspect", "--max-tokens", "512", "--text", &text];
    for (model, hypothetical) in [(sliding_teacher_dir(), true), (sliding_student_dir(), false)] {
        let outcome = run(model, &[&inspect[..], &["--json"]].concat());
        outcome.succeeded();
        let report = outcome.json();
        assert_eq!(report["hypothetical"], hypothetical);
        assert_eq!(report["dense_bytes"], ROW * (2 * 512 + 3 * WINDOW));
        for (n, layer) in report["layers"].as_array().unwrap().iter().enumerate() {
            if HYBRID.contains(&n) {
                // 8 chunks of 64, the last two of them the window: 6 retired.
                assert_eq!(layer["salient"], serde_json::json!([6 * 4, 6 * 4]));
                assert_eq!(layer["dense_bytes"], ROW * 512);
                assert!(layer["cache_bytes"].as_u64() < layer["dense_bytes"].as_u64(), "{layer}");
            } else {
                assert_eq!(layer["budgets"], serde_json::json!([]));
                assert_eq!(layer["dense_bytes"], ROW * WINDOW);
                assert_eq!(layer["cache_bytes"], ROW * WINDOW);
            }
        }
    }
    let html = dir.path().join("page.html");
    let html_arg = html.to_str().unwrap();
    let outcome = run(sliding_student_dir(), &[&inspect[..], &["--html", html_arg]].concat());
    outcome.succeeded();
    let kept = outcome.stdout.lines().filter(|line| line.contains(" window ")).count();
    assert_eq!(kept, LAYERS - HYBRID.len(), "{}", outcome.stdout);
    let page = fs::read_to_string(&html).unwrap();
    let data = page.split("id=\"data\">").nth(1).unwrap().split("</script>").next().unwrap();
    let data: Value = serde_json::from_str(data).unwrap();
    let of_layers = data["layers"].as_array().unwrap().iter().map(|layer| layer["heads"].clone());
    assert_eq!(heads(&of_layers.collect()), [0, 2, 0, 0, 2]);
}

#[test]
fn calibrated_budgets_are_those_of_hybrid_layers() {
    let dir = tempfile::tempdir().unwrap();
    let text = text(dir.path(), 600);
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (out, html) = (path("budgets.json"), path("budgets.html"));
    let calibrate = ["calibrate", "--at-length", "4096", "--window", "512", "--data", &text];
    let files = ["--cache-fraction", "0.5", "--out", &out, "--html", &html];
    let shown = run(sliding_teacher_dir(), &[&calibrate[..], &files].concat());
    shown.succeeded();
    let rows: Vec<&str> = shown.stdout.lines().skip(2).take(2).collect();
    assert!(rows[0].starts_with("1 ") && rows[1].starts_with("4 "), "{}", shown.stdout);
    let file: Value = serde_json::from_str(&fs::read_to_string(&out).unwrap()).unwrap();
    assert_eq!(heads(&file["budgets"]), [0, 2, 0, 0, 2]);

    let page = fs::read_to_string(&html).unwrap();
    assert_balanced(&page);
    // Four maps of four heads, by the numbers of their layers.
    assert_eq!(page.matches("class=\"cell\"").count(), 4 * 4);
    for (cell, there) in [("layer 1, head 0", true), ("layer 4, head 1", true), ("layer 0", false)]
    {
        assert_eq!(page.contains(&format!("data-tip=\"{cell}")), there, "{cell}");
    }
    assert!(page.contains("layers without cells keep their attention to a window"));
}

const SETS: [&str; 6] = [
    "data.length=128",
    "transfer.steps=3",
    "finetune.steps=2",
    "finetune.dropout=0.2",
    "checkpoint.every=1",
    "checkpoint.keep=9",
];

fn linearize(dir: &Path, extra: &[&str]) -> Outcome {
    text(dir, 2000);
    let data = dir.join("text.txt");
    let mut command = still();
    command.args(linearize_args(sliding_teacher_dir(), &data, &dir.join("student")));
    command.args(SETS.iter().flat_map(|set| ["--set", set]));
    Outcome::of(command.env("STILL_CACHE", dir.join("cache")).args(extra))
}

/// A run of both stages, and what it printed.
fn trained() -> &'static (PathBuf, Value) {
    static RUN: OnceLock<(PathBuf, Value)> = OnceLock::new();
    RUN.get_or_init(|| {
        let dir = kept_dir("sliding-run");
        let outcome = linearize(&dir, &["--json"]);
        outcome.succeeded();
        (dir, outcome.json())
    })
}

fn weights(dir: &Path) -> Vec<u8> {
    fs::read(dir.join("student/model.safetensors")).unwrap()
}

#[test]
fn a_run_names_the_layers_that_it_trains() {
    let (dir, report) = trained();
    assert_eq!(numbers(&report["layers"]), HYBRID);
    assert_eq!(report["stages"][1]["steps"], 2);
    let run_dir = dir.join("student.run");
    let out = dir.join("report.html");
    let drawn =
        Outcome::of(still().args(["report", "run", "--json", "--out"]).arg(&out).arg(&run_dir));
    drawn.succeeded();
    assert_eq!(numbers(&drawn.json()["layers"]), HYBRID);
    let page = fs::read_to_string(&out).unwrap();
    assert_balanced(&page);
    assert!(page.contains("layer 4\nfirst step") && !page.contains("layer 0\nfirst step"));
    let events = run_dir.join("tensorboard/transfer").read_dir().unwrap();
    let events: Vec<u8> =
        events.flat_map(|entry| fs::read(entry.unwrap().path()).unwrap()).collect();
    for (tag, there) in [("layer_loss/01", true), ("layer_loss/04", true), ("layer_loss/00", false)]
    {
        let found = events.windows(tag.len()).any(|bytes| bytes == tag.as_bytes());
        assert_eq!(found, there, "{tag}");
    }
    let config = fs::read_to_string(dir.join("student/config.json")).unwrap();
    let config: Value = serde_json::from_str(&config).unwrap();
    assert_eq!(heads(&config["still"]["budgets"]), [0, 2, 0, 0, 2]);
    assert_eq!(config["base_config"]["query_pre_attn_scalar"], 20);
    let scale = config["still"]["logit_scale"].as_f64().unwrap();
    assert!((scale / 20_f64.powf(-0.5) - 1.0).abs() < 1e-12, "{scale}");
}

/// From within either stage, bit for bit.
#[test]
fn a_resumed_run_ends_as_an_uninterrupted_one() {
    let dir = tempfile::tempdir().unwrap();
    linearize(dir.path(), &[]).succeeded();
    let whole = weights(&trained().0);
    assert!(weights(dir.path()) == whole, "two runs of one recipe differ");
    for last in ["finetune-step-000001", "transfer-step-000002"] {
        let checkpoints = dir.path().join("student.run/checkpoints");
        let at = |name: &str| {
            name.rsplit_once("-step-").map(|(stage, step)| (stage == "finetune", step.to_owned()))
        };
        for entry in checkpoints.read_dir().unwrap().map(|entry| entry.unwrap()) {
            let name = entry.file_name().to_str().unwrap().to_owned();
            if at(&name) > at(last) {
                fs::remove_dir_all(entry.path()).unwrap();
            }
        }
        assert!(checkpoints.join(last).exists(), "{last}");
        fs::remove_dir_all(dir.path().join("student")).unwrap();
        let resumed = linearize(dir.path(), &["--resume"]);
        resumed.succeeded();
        assert!(weights(dir.path()) == whole, "resumed from {last}: another student");
    }
}

#[test]
fn a_student_is_one_model_whole_as_a_delta_and_quantized() {
    let greedy = |model: &Path| {
        let outcome = run(model, &["generate", "-n", "24", "--prompt", &words(60)]);
        outcome.succeeded();
        assert!(outcome.stderr.contains("STILL attention"), "{}", outcome.stderr);
        outcome.stdout
    };
    let whole = trained().0.join("student");
    let dir = tempfile::tempdir().unwrap();
    linearize(dir.path(), &["--delta"]).succeeded();
    let delta = dir.path().join("student");
    assert_eq!(greedy(&whole), greedy(&delta));
    // The formats differ in how they round weights.
    let exported = |model: &Path, format: &str| {
        let out = dir.path().join(format!("{format}.gguf"));
        let out_arg = out.to_str().unwrap();
        let export = ["export", "--gguf", format, "--overwrite", "--out", out_arg];
        run(model, &export).succeeded();
        greedy(&out)
    };
    for format in ["q8_0", "q4_1", "q4_k"] {
        assert_eq!(exported(&whole, format), exported(&delta, format), "{format}");
    }
}

/// Results of `still eval` on the student, compared with its teacher.
fn eval(dir: &Path, arguments: &[&str]) -> (Value, Value) {
    let results = dir.join("r.json");
    let teacher = sliding_teacher_dir().to_str().unwrap();
    let data = concat!(env!("CARGO_MANIFEST_DIR"), "/../still-eval/tests/data");
    let files = ["--data-dir", data, "--compare", teacher, "--out", results.to_str().unwrap()];
    run(sliding_student_dir(), &[&["eval"], arguments, &files].concat()).succeeded();
    let results: Value = serde_json::from_str(&fs::read_to_string(&results).unwrap()).unwrap();
    let others = results["compare"].as_array().unwrap();
    let to_teacher = others.iter().find(|other| other["model"] == teacher).unwrap().clone();
    (results, to_teacher)
}

#[test]
fn eval_asks_ablates_and_compares() {
    let dir = tempfile::tempdir().unwrap();
    let text = text(dir.path(), 400);
    let tasks = ["--tasks", "piqa,perplexity", "--lengths", "100,300", "--limit", "2"];
    let more = ["--text", &text, "--branches", "--ablate", "branches,router"];
    let (results, to_teacher) = eval(dir.path(), &[&tasks[..], &more].concat());
    assert_eq!(numbers(&results["branches"]), HYBRID);
    for layer in results["branches"].as_array().unwrap() {
        let mass: f64 = layer["mass"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).sum();
        assert!((mass - 1.0).abs() < 1e-6, "{layer}");
    }
    let others = results["compare"].as_array().unwrap();
    let ablated: Vec<&str> = others.iter().filter_map(|other| other["ablation"].as_str()).collect();
    assert!(ablated.len() >= 4, "{ablated:?}");
    // Up to two chunks a student is its teacher; beyond, an untrained one is not.
    let nll = |task: &str| to_teacher["difference"][task]["nll"]["mean"].as_f64().unwrap();
    assert!(nll("perplexity_100").abs() < 1e-4 && nll("perplexity_300").abs() > 1e-4);
}

#[test]
fn eval_reads_long_prompts_and_counts_what_grows() {
    let dir = tempfile::tempdir().unwrap();
    let tasks = ["--tasks", "passkey,repeated_text", "--lengths", "1600", "--limit", "1"];
    let efficiency = ["--efficiency", "64,200"];
    let (results, to_teacher) = eval(dir.path(), &[&tasks[..], &efficiency].concat());
    assert!(results["tasks"]["repeated_text_1600"]["perplexity"].as_f64().unwrap() > 1.0);
    assert!(results["tasks"]["passkey_1600"]["score"].is_number(), "{results}");
    // The teacher's cache grows in two layers of five, by rows in f32.
    let per_token = to_teacher["efficiency"]["bytes_per_token"].as_f64().unwrap();
    let expected = (HYBRID.len() as u64 * 2 * ROW) as f64;
    assert!((per_token / expected - 1.0).abs() < 0.1, "{per_token} bytes, expected {expected}");
}

#[test]
fn chat_and_ask_keep_what_they_have_read() {
    let template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}\
                    {% if add_generation_prompt %}<assistant>{% endif %}";
    let dir = chat_dir_of(sliding_student(), template);
    let model = dir.path().join("student");
    let talk = dir.path().join("talk.still");
    for message in ["Tell me about the sea and the ships that sail on it", "Why", "And then"] {
        let mut chat = still();
        chat.args(["chat", "-n", "5", "--temperature", "0", "--model"]).arg(&model);
        let chat = Outcome::of(chat.arg("--session").arg(&talk).write_stdin(message));
        chat.succeeded();
        assert_eq!(chat.stdout, "!!!!!\n");
        assert!(!chat.stderr.contains("read again"), "{}", chat.stderr);
    }

    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (file, session) = (path("a.txt"), path("a.still"));
    fs::write(&file, words(300)).unwrap();
    let ask = |extra: &[&str]| {
        let outcome = run(&model, &[&["ask", "-n", "5", "--json", "Who sails?"], extra].concat());
        outcome.succeeded();
        outcome.json()
    };
    let first = ask(&["--file", &file, "--session", &session]);
    let again = ask(&["--session", &session]);
    for key in ["text", "document_tokens", "question_tokens", "cache_bytes", "dense_cache_bytes"] {
        assert_eq!(first[key], again[key], "{key}");
    }
    let tokens = first["document_tokens"].as_u64().unwrap();
    assert_eq!(first["dense_cache_bytes"], ROW * (2 * tokens + 3 * WINDOW));
}

#[test]
fn bench_times_every_variant() {
    let model = ["bench", "model", "--json", "--contexts", "200", "--new-tokens", "2"];
    let variants = ["--variants", "dense,window,still,student"];
    let outcome = run(sliding_student_dir(), &[&model[..], &variants].concat());
    outcome.succeeded();
    assert_eq!(outcome.stdout.lines().count(), 4, "{}", outcome.stdout);
    let train = ["bench", "train", "--json", "--contexts", "130", "--steps", "1"];
    let outcome = run(sliding_teacher_dir(), &train);
    outcome.succeeded();
    assert!(outcome.stdout.lines().count() >= 2, "{}", outcome.stdout);
}

#[test]
fn the_demo_runs_on_it() {
    let counts = ["--transfer-steps", "1", "--finetune-steps", "1", "--windows", "1"];
    let few = ["--keys", "1", "--decode-steps", "2", "--json"];
    let outcome =
        run(sliding_teacher_dir(), &[&["demo", "--train", "--full"], &counts[..], &few].concat());
    outcome.succeeded();
    let rows = outcome.json()["rows"].clone();
    assert_eq!(rows.as_array().unwrap().len(), 5);
    let bytes = |row: usize| rows[row]["cache_bytes_4k"].as_u64().unwrap();
    assert!(bytes(4) < bytes(3) && bytes(3) < bytes(0), "{rows}");
}

#[test]
fn budgets_of_a_layer_with_a_window_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let everywhere = "attention.budgets=[[4, 4], [4, 4], [4, 4], [4, 4], [4, 4]]";
    linearize(dir.path(), &["--set", everywhere]).failed_with("layer 0 has budgets");
    let plan = linearize(dir.path(), &["--dry-run", "--json"]);
    plan.succeeded();
    // Feature maps of four query heads and two selection heads, 8 × 8 each, and four ℓ, in two layers.
    assert_eq!(plan.json()["stages"][0]["parameters"], 2 * (6 * 64 + 4));
}
