//! Every phase that takes long, on a terminal: what it shows fits, and Ctrl-C is answered at once.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use candle_core::DType;
use still_attention::StillConfig;
use still_model::random::{random_model, save_base, tiny_config};
use still_model::{ExportKind, FeatureInit, ModelConfig, Student, save_student};

use crate::common::terminal::{CTRL_C, Terminal};
use crate::common::{
    BINARY, linearize_args, linearize_by, save_delta, student_dir, teacher_dir, words,
};

/// A second, and half of one for a machine that has other work.
const AT_ONCE: Duration = Duration::from_millis(1500);

/// A directory with texts, where a command is at home.
fn home() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("long.txt"), words(400_000)).unwrap();
    fs::write(dir.path().join("own.txt"), words(20_000)).unwrap();
    dir
}

fn on_terminal(dir: &Path, columns: u16, fill: impl FnOnce(&mut Command)) -> Terminal {
    let mut command = Command::new(BINARY);
    command.current_dir(dir).env("STILL_CACHE", dir.join("cache")).env("HF_HUB_OFFLINE", "1");
    fill(&mut command);
    Terminal::start(command, columns)
}

/// Waits for a phase, looks at it for a moment, and presses Ctrl-C; the answer is there at once.
#[track_caller]
fn interrupt(terminal: &mut Terminal, doing: &str, answer: &str) {
    terminal.until(doing);
    for _ in 0..30 {
        assert!(!terminal.wraps(), "{}", terminal.screen());
        std::thread::sleep(Duration::from_millis(10));
    }
    terminal.send(CTRL_C);
    let took = terminal.until(answer);
    assert!(took < AT_ONCE, "{doing}: {took:?}: {}", terminal.screen());
}

/// The command has ended: what is left says why, and what to do.
#[track_caller]
fn ended(terminal: &mut Terminal, doing: &str) {
    assert_eq!(terminal.code(), 130, "{}", terminal.screen());
    let screen = terminal.screen();
    assert!(!terminal.wraps() || screen.contains("hint: "), "{screen}");
    assert!(screen.contains("error: interrupted"), "{screen}");
    let last = screen.lines().rfind(|line| line.starts_with("hint: "));
    assert!(last.is_some() && !screen.contains('\u{1b}'), "{screen}");
    // The bar is wiped.
    assert!(!screen.contains(doing), "{screen}");
}

#[test]
fn ctrl_c_ends_what_saves_nothing_in_every_phase() {
    let (student, teacher) = (student_dir().to_str().unwrap(), teacher_dir().to_str().unwrap());
    let dir = home();
    save_delta(teacher_dir(), &dir.path().join("delta"));
    wide_student(&dir.path().join("wide"));
    for (line, doing) in [
        ("demo --model delta", "     Reading teacher"),
        ("demo --train --model TEACHER", " Calibrating losses"),
        ("export --gguf q4_k --out wide.gguf --model wide", "  Quantizing the weights"),
        (
            "linearize --dry-run --recipe uniform --data long.txt -o s -m TEACHER",
            "     Reading the data",
        ),
        (
            "linearize --dry-run --recipe uniform --set data.length=2048 --data own.txt -o s -m wide-base",
            "      Timing one step of each stage",
        ),
        ("generate -n 2 --prompt-file long.txt -m STUDENT", "     Reading the prompt"),
        ("ask --file long.txt Why? -m STUDENT", "     Reading long.txt"),
        ("inspect --text long.txt --max-tokens 300000 -m STUDENT", "     Routing layers"),
        (
            "eval --tasks perplexity --text long.txt --lengths 200000 -m STUDENT",
            "      Asking perp",
        ),
        ("bench model --contexts 300000 -m TEACHER", "      Timing prefill and decode"),
        ("bench train --contexts 60000 -m TEACHER", "      Timing training steps"),
        ("bench attention --contexts 65536", "      Timing the operator"),
        (
            "calibrate --data long.txt --window 40000 --tokens 400000 -m TEACHER",
            " Calibrating losses",
        ),
    ] {
        let words: Vec<&str> = line
            .split(' ')
            .map(|word| match word {
                "STUDENT" => student,
                "TEACHER" => teacher,
                word => word,
            })
            .collect();
        for columns in [80, 200] {
            let mut terminal = on_terminal(dir.path(), columns, |command| {
                command.args(&words);
            });
            interrupt(&mut terminal, doing, "error: interrupted");
            ended(&mut terminal, doing);
        }
    }
}

/// A student, and its base, whose matrices take a while.
fn wide_student(dir: &Path) {
    let config = ModelConfig { intermediate_size: 1 << 18, eos_token_ids: vec![], ..tiny_config() };
    let model = random_model(config.clone(), 7).unwrap();
    save_base(&dir.with_file_name("wide-base"), &model, DType::F32).unwrap();
    let still = StillConfig::uniform(config.num_hidden_layers, config.geometry(), 64, 4);
    let student = Student::init(still, &config, FeatureInit::Identity, 7).unwrap();
    save_student(dir, &model.with_student(student), ExportKind::Full(DType::F32)).unwrap();
}

/// Ctrl-C while the finished student is compared with its teacher: it is saved, and the hint says so.
#[test]
fn ctrl_c_ends_a_verdict_and_leaves_the_student() {
    let dir = home();
    wide_student(&dir.path().join("wide"));
    for columns in [80, 200] {
        let out = format!("mine-{columns}");
        let mut run = on_terminal(dir.path(), columns, |command| {
            command.args(["linearize", "-d", "own.txt", "--recipe", "uniform", "-o", &out, "-m"]);
            command.arg("wide-base");
            for set in ["data.length=128", "transfer.steps=1", "finetune.steps=0"] {
                command.args(["--set", set]);
            }
        });
        interrupt(&mut run, "  Evaluating teacher", "error: interrupted");
        ended(&mut run, "  Evaluating teacher");
        let screen = run.screen().split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(
            screen.contains("the student is saved, and only its verdict is missing"),
            "{screen}"
        );
        assert!(dir.path().join(&out).join("config.json").is_file());
    }
}

/// A run in each of its phases: what is done is saved, or there is nothing to save.
#[test]
fn ctrl_c_is_answered_in_every_phase_of_a_run() {
    let dir = home();
    let (data, long) = (dir.path().join("own.txt"), dir.path().join("long.txt"));
    for columns in [80, 200] {
        let out = dir.path().join(format!("student-{columns}"));
        let sets = |command: &mut Command, more: &[&str]| {
            let common = ["transfer.steps=100000", "finetune.steps=0", "checkpoint.every=50000"];
            for set in common.iter().chain(more) {
                command.args(["--set", set]);
            }
        };
        // Calibration: nothing is trained yet.
        let mut run = on_terminal(dir.path(), columns, |command| {
            command.args(linearize_by("quick".as_ref(), teacher_dir(), &long, &out));
            sets(command, &["calibration.window=40000", "calibration.tokens=400000"]);
        });
        interrupt(&mut run, " Calibrating losses", "error: interrupted");
        ended(&mut run, " Calibrating losses");

        // The teacher is measured first: nothing is trained yet.
        let by_uniform = |more: &[&str]| {
            on_terminal(dir.path(), columns, |command| {
                command.args(linearize_args(teacher_dir(), &data, &out)).args(more);
                sets(
                    command,
                    &["data.length=256", "evaluation.every=1000", "evaluation.windows=0"],
                );
                command.args(["--set", "evaluation.passkey_length=60000"]);
                command.args(["--set", "evaluation.passkey_keys=8"]);
            })
        };
        let mut run = by_uniform(&[]);
        interrupt(&mut run, "  Evaluating the teacher", "error: interrupted");
        ended(&mut run, "  Evaluating the teacher");

        // A step: it is done and saved.
        let training = |more: &[&str]| {
            on_terminal(dir.path(), columns, |command| {
                command.args(linearize_args(teacher_dir(), &data, &out)).args(more);
                sets(command, &["data.length=256", "evaluation.every=0"]);
            })
        };
        for more in [&[][..], &["--resume"]] {
            let mut run = training(more);
            run.until("    Training transfer [");
            interrupt(&mut run, " steps, ", "Stopping after this step, which is then saved");
            assert_eq!(run.code(), 1);
            let screen = run.screen();
            assert!(screen.contains("error: stopped at transfer step "), "{screen}");
            assert!(screen.contains("--resume"), "{screen}");
            assert!(!screen.contains("    Training transfer ["), "{screen}");
        }
        let mut other = on_terminal(dir.path(), columns, |command| {
            command.args(linearize_args(teacher_dir(), &data, &out)).arg("--resume");
            sets(command, &["data.length=128", "evaluation.every=0"]);
        });
        assert_eq!(other.code(), 1);
        let screen = other.screen().split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(screen.contains("another recipe: data.length is 256, now 128"), "{screen}");
    }
}
