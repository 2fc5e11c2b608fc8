//! Both stages on a CUDA GPU against the CPU: losses, gradient norms, what is learned; a resumed run; evaluations.
//!
//! Needs a GPU, and fails without one: it is built only where the feature `cuda` asks for it. It runs on a machine without
//! Rust or the checkout.

mod common;

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use common::{StopAfter, parameters};
use still_attention::RowDtype;
use still_model::random::{random_model, save_base, tiny_config};
use still_model::{ExportKind, GgufFormat, Model, ModelConfig, Student, export_gguf, save_student};
use still_testing::relative_rms;
use still_train::{
    Evaluation, FinetuneStage, Observer, Recipe, Silent, StepReport, TrainError, TransferStage,
    Window, Windows, linearize_windows,
};

/// Steps of each stage.
const STEPS: usize = 3;

/// The GPU; a test that asks for one and finds none has failed.
fn gpu() -> Device {
    Device::new_cuda(0).unwrap_or_else(|error| panic!("these tests need a CUDA GPU: {error}"))
}

/// A model whose heads the kernels take, on the CPU.
fn model() -> Model {
    let config = ModelConfig {
        hidden_size: 192,
        intermediate_size: 320,
        num_hidden_layers: 3,
        num_attention_heads: 6,
        num_key_value_heads: 2,
        head_dim: 64,
        ..tiny_config()
    };
    random_model(config, 11).unwrap()
}

fn on_gpu(dtype: DType) -> Model {
    model().to_device(&gpu(), dtype).unwrap()
}

/// Routing by position, so that rounding cannot change it, and steps that follow the gradient's size, not its sign alone.
fn recipe(overrides: &[&str]) -> Recipe {
    let text = r#"
        seed = 3
        [attention]
        budget = 4
        router = { random = { seed = 1 } }
        [data]
        length = 300
        min_length = 8
        [transfer]
        steps = 3
        batch = 2
        optimizer = { lr = 1e-2, warmup = 0, eps = 1e-3, clip = 1e9 }
        [finetune]
        steps = 3
        batch = 2
        lora = { rank = 4, alpha = 8, targets = ["q", "k", "v", "o"] }
        optimizer = { lr = 3e-3, warmup = 0, eps = 1e-3, clip = 1e9 }
        [checkpoint]
        every = 1
        keep = 3
    "#;
    let overrides: Vec<String> = overrides.iter().map(|&item| item.to_owned()).collect();
    Recipe::parse(text, &overrides).unwrap()
}

fn ids(n: u32, tokens: u32) -> Vec<u32> {
    (0..tokens).map(|t| (t * t + 7 * (t % 11) + 31 * n) % 256).collect()
}

/// One long sequence; and two packed ones, of which the second counts in part.
fn windows() -> [Window; 2] {
    let mut packed = Window::default();
    packed.push(&ids(2, 200), None);
    let counted: Vec<bool> = (0..97).map(|t| t % 3 != 0).collect();
    packed.push(&ids(3, 97), Some(&counted));
    [ids(1, 300).into(), packed]
}

fn student(model: &Model, recipe: &Recipe) -> Student {
    let still = recipe.attention.resolve(model.config()).unwrap();
    Student::init(still, model.config(), recipe.attention.init, recipe.seed).unwrap()
}

/// Reports of both stages' steps, and every learned tensor on the CPU by its name.
type Trained = (Vec<StepReport>, Vec<(String, Tensor)>);

fn train(model: &Model, recipe: &Recipe) -> Trained {
    let mut reports = Vec::new();
    let mut transfer =
        TransferStage::new(model, &student(model, recipe), &recipe.transfer).unwrap();
    let mut hidden = Vec::new();
    for _ in 0..STEPS {
        let step = transfer.step(&windows()).unwrap();
        reports.push(step.report);
        hidden = step.teacher_hidden;
    }
    let student = transfer.student().unwrap();
    let mut finetune = FinetuneStage::new(model, &student, &recipe.finetune, recipe.seed).unwrap();
    // The teacher's states are the same from either stage.
    let own = finetune.teacher_hidden(&ids(1, 300)).unwrap();
    assert_eq!(values(&own), values(&hidden[0]));
    for _ in 0..STEPS {
        reports.push(finetune.step(&windows(), None).unwrap());
    }
    let mut learned = Vec::new();
    let student = finetune.student().unwrap();
    let read = student.map_tensors(|name, tensor| {
        assert!(tensor.device().same_device(model.decoder.device()), "{name}");
        assert_eq!(tensor.dtype(), DType::F32, "{name}");
        learned.push((name.to_owned(), tensor.to_device(&Device::Cpu)?));
        Ok(tensor.clone())
    });
    read.unwrap();
    (reports, learned)
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// ‖a − b‖ / ‖b − before‖: how far two trainings are apart, as a share of how far they went.
fn apart(a: &Tensor, b: &Tensor, before: &Tensor) -> f64 {
    let norm = |a: &Tensor, b: &Tensor| {
        let squares = values(a).into_iter().zip(values(b)).map(|(a, b)| f64::from(a - b).powi(2));
        let squares = squares.sum::<f64>();
        assert!(squares.is_finite());
        squares.sqrt()
    };
    norm(a, b) / norm(b, before).max(1e-12)
}

/// Trains on both and compares: losses and norms within `losses`, learned tensors within `learned` of their way.
fn check(overrides: &[&str], dtype: DType, losses: f64, learned: f64) {
    let recipe = recipe(overrides);
    let (cpu, gpu) = (train(&model(), &recipe), train(&on_gpu(dtype), &recipe));
    let most = std::cell::Cell::new(0.0_f64);
    for (got, expected) in gpu.0.iter().zip(&cpu.0) {
        let what = format!("{overrides:?} {dtype:?} {:?} step {}", got.stage, got.step);
        let near = |got: f64, expected: f64, what: &str| {
            let error = (got / expected - 1.0).abs();
            most.set(most.get().max(error));
            assert!(error <= losses, "{what}: {got:e}, on the CPU {expected:e}");
        };
        near(got.loss, expected.loss, &format!("{what}: loss"));
        near(got.grad_norm, expected.grad_norm, &format!("{what}: gradient norm"));
        assert_eq!(got.layer_losses.len(), expected.layer_losses.len(), "{what}");
        assert_eq!(got.linear_losses.len(), expected.linear_losses.len(), "{what}");
        let by_layer =
            |report: &StepReport| [&*report.layer_losses, &*report.linear_losses].concat();
        for (got, expected) in by_layer(got).into_iter().zip(by_layer(expected)) {
            near(got, expected, &format!("{what}: a layer's loss"));
        }
    }
    let model = model();
    let mut before = student(&model, &recipe);
    before.add_lora(model.config(), recipe.finetune.lora.clone(), recipe.seed).unwrap();
    let mut start = Vec::new();
    let read = before.map_tensors(|_, tensor| {
        start.push(tensor.clone());
        Ok(tensor.clone())
    });
    read.unwrap();
    println!("losses and norms {:.1e} {overrides:?} {dtype:?}", most.get());
    for (((name, got), (_, expected)), start) in gpu.1.iter().zip(&cpu.1).zip(&start) {
        let apart = apart(got, expected, start);
        println!("{apart:.1e} of its way {overrides:?} {dtype:?} {name}");
        assert!(apart <= learned, "{overrides:?} {dtype:?} {name}: {apart:e} of its way apart");
    }
}

#[test]
fn f32_learns_what_the_cpu_learns() {
    for overrides in [
        &["transfer.loss=head_mse", "finetune.objective=logit_kl"][..],
        &[
            "transfer.loss=output_mse",
            "transfer.normalise=true",
            "finetune.objective=cross_entropy",
            "finetune.recompute=mlp",
        ],
        &["finetune.objective={ mixed = { kl = 0.5 } }", "finetune.recompute=false"],
        &[
            "transfer.linear_branch_weight=0.5",
            "transfer.normalise=true",
            "finetune.dropout=0.2",
            "attention.linear_norm=sum",
        ],
        &["transfer.linear_branch_weight=0.5", "attention.selection_head=query_head"],
        &["transfer.linear_branch_weight=0.5", "attention.cap=7"],
        &["attention.gate=true", "finetune.lora.targets=[\"q\", \"v\", \"g\"]"],
    ] {
        check(overrides, DType::F32, 1e-4, 2e-3);
    }
}

/// Every shipped recipe.
const RECIPES: [(&str, &str); 17] = [
    ("linear-only", include_str!("../../../recipes/linear-only.toml")),
    ("lola", include_str!("../../../recipes/lola.toml")),
    ("lolcats", include_str!("../../../recipes/lolcats.toml")),
    ("paper", include_str!("../../../recipes/paper.toml")),
    ("quick", include_str!("../../../recipes/quick.toml")),
    ("random", include_str!("../../../recipes/random.toml")),
    ("still-10", include_str!("../../../recipes/still-10.toml")),
    ("still-7", include_str!("../../../recipes/still-7.toml")),
    ("still-long", include_str!("../../../recipes/still-long.toml")),
    ("still-released", include_str!("../../../recipes/still-released.toml")),
    ("streaming-llm", include_str!("../../../recipes/streaming-llm.toml")),
    ("uniform", include_str!("../../../recipes/uniform.toml")),
    ("window-only", include_str!("../../../recipes/window-only.toml")),
    ("comparison/lolcats", include_str!("../../../recipes/comparison/lolcats.toml")),
    ("comparison/paper", include_str!("../../../recipes/comparison/paper.toml")),
    ("comparison/ten-of-64", include_str!("../../../recipes/comparison/ten-of-64.toml")),
    ("comparison/window-only", include_str!("../../../recipes/comparison/window-only.toml")),
];

/// Losses of both stages of a recipe as it ships, but for the length of its run.
fn losses(model: &Model, recipe: &Recipe) -> Vec<(String, f64)> {
    let mut losses = Vec::new();
    let mut student = student(model, recipe).to_device(model.decoder.device()).unwrap();
    if recipe.transfer.steps > 0 {
        let mut stage = TransferStage::new(model, &student, &recipe.transfer).unwrap();
        for step in 0..recipe.transfer.steps {
            let loss = stage.step(&windows()).unwrap().report.loss;
            losses.push((format!("transfer step {step}"), loss));
        }
        student = stage.student().unwrap();
    }
    let mut stage = FinetuneStage::new(model, &student, &recipe.finetune, recipe.seed).unwrap();
    for step in 0..recipe.finetune.steps {
        let loss = stage.step(&windows(), None).unwrap().loss;
        losses.push((format!("finetune step {step}"), loss));
    }
    losses
}

#[test]
fn every_recipe_trains_as_on_the_cpu() {
    let mut wrong = Vec::new();
    for (name, text) in RECIPES {
        let shipped = Recipe::parse(text, &[]).unwrap();
        let mut overrides =
            vec!["transfer.optimizer.warmup=1".into(), "finetune.optimizer.warmup=1".into()];
        for (stage, steps) in
            [("transfer", shipped.transfer.steps), ("finetune", shipped.finetune.steps)]
        {
            overrides.push(format!("{stage}.steps={}", steps.min(20)));
            overrides.push(format!("{stage}.batch=2"));
        }
        // Windows are short: under this cap something is demoted.
        if shipped.attention.cap.is_some_and(|cap| cap > 70) {
            overrides.push("attention.cap=70".into());
        }
        if shipped.calibration.cache_fraction.is_some() {
            overrides.push("attention.budgets=[[64, 4], [0, 2], [3, 9]]".into());
        }
        let recipe = Recipe::parse(text, &overrides).unwrap();
        let expected = losses(&model(), &recipe);
        let got = losses(&on_gpu(DType::F32), &recipe);
        assert_eq!(got.len(), expected.len());
        let mut most = 0.0_f64;
        for ((step, got), (_, expected)) in got.iter().zip(&expected) {
            let error = (got / expected - 1.0).abs();
            most = most.max(error);
            if error.is_nan() || error > 3e-4 {
                wrong
                    .push(format!("{name}, {step}: {got:e}, on the CPU {expected:e}: {error:.1e}"));
            }
        }
        println!("{most:.1e} {name}");
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn bf16_learns_nearly_what_f32_learns() {
    check(&[], DType::BF16, 2e-2, 6e-2);
}

fn lines(dir: &Path, name: &str) -> Vec<String> {
    let text = std::fs::read_to_string(dir.join(name)).unwrap();
    text.lines().map(str::to_owned).collect()
}

#[test]
fn resumed_equals_uninterrupted_bit_for_bit() {
    let recipe = recipe(&["attention.router=self_saliency"]);
    let windows = Windows::from_windows((0..4).map(|n| ids(n, 260)).collect(), 5);
    for dtype in [DType::F32, DType::BF16] {
        let model = on_gpu(dtype);
        let run = |dir: &Path, resume: bool, observer: &mut dyn Observer| {
            linearize_windows(&model, &recipe, &windows, dir, resume, observer)
        };
        let whole_dir = tempfile::tempdir().unwrap();
        let whole = run(whole_dir.path(), false, &mut Silent).unwrap();
        let dir = tempfile::tempdir().unwrap();
        // In the first stage, and in the second.
        for (after, resume) in [(2, false), (2, true)] {
            let stopped = run(dir.path(), resume, &mut StopAfter(after));
            assert!(matches!(stopped, Err(TrainError::Interrupted { .. })), "{dtype:?}");
        }
        let resumed = run(dir.path(), true, &mut Silent).unwrap();
        assert_eq!(parameters(&resumed), parameters(&whole), "{dtype:?}");
        let metrics = |dir: &Path| lines(dir, "metrics.jsonl");
        assert_eq!(metrics(dir.path()), metrics(whole_dir.path()), "{dtype:?}");
    }
}

#[test]
fn a_run_on_a_device_does_not_go_on_elsewhere() {
    let recipe = recipe(&[]);
    let windows = Windows::from_windows((0..4).map(|n| ids(n, 260)).collect(), 5);
    let dir = tempfile::tempdir().unwrap();
    let run = |model: &Model, resume: bool| {
        linearize_windows(model, &recipe, &windows, dir.path(), resume, &mut StopAfter(1))
    };
    assert!(matches!(run(&on_gpu(DType::F32), false), Err(TrainError::Interrupted { .. })));
    for other in [model(), on_gpu(DType::BF16)] {
        assert!(matches!(run(&other, true), Err(TrainError::Run { .. })));
    }
}

#[test]
fn evaluations_measure_what_the_cpu_measures() {
    let recipe = recipe(&[
        "attention.router=self_saliency",
        "evaluation.every=3",
        "evaluation.windows=2",
        "evaluation.keep_best=true",
        "guard.max_heldout_growth=0",
    ]);
    let heldout: Vec<Window> = (7..9).map(|n| ids(n, 260).into()).collect();
    let windows =
        Windows::from_windows((0..4).map(|n| ids(n, 260)).collect(), 5).with_heldout(heldout);
    let evaluations = |model: &Model| -> Vec<f64> {
        let dir = tempfile::tempdir().unwrap();
        let trained =
            linearize_windows(model, &recipe, &windows, dir.path(), false, &mut Silent).unwrap();
        let read = trained.student.as_ref().unwrap().map_tensors(|name, tensor| {
            assert!(tensor.device().same_device(model.decoder.device()), "{name}");
            Ok(tensor.clone())
        });
        read.unwrap();
        let lines = lines(dir.path(), "evaluations.jsonl");
        let nll = |line: &String| serde_json::from_str::<Evaluation>(line).unwrap().heldout_nll;
        lines.iter().map(|line| nll(line).unwrap()).collect()
    };
    let (cpu, gpu) = (evaluations(&model()), evaluations(&on_gpu(DType::F32)));
    assert_eq!(gpu.len(), cpu.len());
    for (got, expected) in gpu.iter().zip(&cpu) {
        assert!((got / expected - 1.0).abs() < 1e-3, "{gpu:?}, on the CPU {cpu:?}");
    }
}

/// Logits of a model on its own device.
fn logits(model: &Model) -> Vec<f32> {
    let rows = if model.decoder.dtype() == DType::BF16 { RowDtype::Bf16 } else { RowDtype::F32 };
    let mut cache = model.new_cache(1, rows).unwrap();
    let ids = Tensor::from_vec(ids(5, 200), (1, 200), model.device()).unwrap();
    let hidden = model.forward(&ids, &mut cache, None).unwrap();
    values(&model.logits(&hidden).unwrap())
}

/// What a run ends with: a student that trained in bf16 on the device is saved whole, as a delta and quantized, and each loads on
/// the CPU and on the device.
///
/// Bounds, relative RMS of logits. Two f32 computations of the same weights: 1e-3. Weights or activations rounded to bf16, eight
/// bits of precision through three layers: 5e-2. Eight-bit blocks on top: 8e-2.
#[test]
fn a_student_trained_in_bf16_is_saved_and_loads_everywhere() {
    // A state on the device takes no router by position.
    let router = "attention.router=\"self_saliency\"";
    let recipe = recipe(&["transfer.steps=2", "finetune.steps=2", router]);
    let windows = Windows::from_windows((0..4).map(|n| ids(n, 260)).collect(), 5);
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    // A base in bf16: the same values on every device.
    save_base(&path("base"), &model(), DType::BF16).unwrap();
    let load = |path: &Path, device: &Device, dtype| {
        Model::load_on(path.to_str().unwrap(), device, dtype).unwrap()
    };
    let base = load(&path("base"), &gpu(), DType::BF16);
    let trained =
        linearize_windows(&base, &recipe, &windows, &path("run"), false, &mut Silent).unwrap();
    let own = logits(&trained);
    let near = |got: &[f32], expected: &[f32], bound: f64, case: &str| {
        let error = relative_rms(got, expected);
        assert!(error <= bound, "{case}: relative RMS {error:e}, at most {bound:e}");
    };
    // Training has moved it, or nothing would be compared.
    let untrained = base.with_student(student(&base, &recipe).to_device(base.device()).unwrap());
    assert!(relative_rms(&logits(&untrained), &own) > 1e-4, "two steps changed nothing");

    save_student(&path("delta"), &trained, ExportKind::Delta).unwrap();
    save_student(&path("full"), &trained, ExportKind::Full(DType::F32)).unwrap();
    save_student(&path("full16"), &trained, ExportKind::Full(DType::BF16)).unwrap();
    export_gguf(&path("student.gguf"), &trained, GgufFormat::Q8_0).unwrap();
    let on_cpu = |name: &str| logits(&load(&path(name), &Device::Cpu, DType::F32));
    let on_gpu = |name: &str, dtype| logits(&load(&path(name), &gpu(), dtype));

    let delta = on_cpu("delta");
    near(&delta, &own, 5e-2, "the delta on the CPU, the student in memory on the device");
    near(&on_cpu("full"), &delta, 1e-3, "full and delta on the CPU");
    near(&on_cpu("full16"), &delta, 5e-2, "full in bf16 and delta on the CPU");
    near(&on_cpu("student.gguf"), &delta, 8e-2, "quantized and delta on the CPU");
    for name in ["delta", "full"] {
        near(&on_gpu(name, DType::F32), &delta, 1e-3, &format!("{name} in f32 on the device"));
    }
    // The very student that was in memory: nothing was rounded.
    near(&on_gpu("delta", DType::BF16), &own, 1e-3, "the delta in bf16 on the device");
    near(&on_gpu("full", DType::BF16), &own, 5e-2, "full in bf16 on the device");
    near(&on_gpu("full16", DType::BF16), &own, 5e-2, "full16 in bf16 on the device");
    near(&on_gpu("student.gguf", DType::BF16), &own, 8e-2, "quantized in bf16 on the device");
}
