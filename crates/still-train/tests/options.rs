//! Every objective and option of both stages: a few known losses each, and what each is for.

mod common;

use common::{model, recipe, windows};
use still_model::Student;
use still_train::{FinetuneStage, Position, Stage, TransferStage};

/// Known losses were recorded from these tests on x86-64 with AVX-512, f32.
///
/// Reports of the first steps of stage 1.
fn transfer(overrides: &[&str]) -> Vec<still_train::StepReport> {
    let (model, recipe, windows) = (model(), recipe(overrides), windows());
    let still = recipe.attention.resolve(model.config()).unwrap();
    let student = Student::init(still, model.config(), recipe.attention.init, recipe.seed).unwrap();
    let mut stage = TransferStage::new(&model, &student, &recipe.transfer).unwrap();
    let mut position = Position::default();
    (0..4).map(|_| stage.step(&windows.next(&mut position, 2)).unwrap().report).collect()
}

/// Losses of the first steps of stage 2.
fn finetune(overrides: &[&str]) -> Vec<f64> {
    let (model, recipe, windows) = (model(), recipe(overrides), windows());
    let still = recipe.attention.resolve(model.config()).unwrap();
    let student = Student::init(still, model.config(), recipe.attention.init, recipe.seed).unwrap();
    let mut stage = FinetuneStage::new(&model, &student, &recipe.finetune, recipe.seed).unwrap();
    let mut position = Position::default();
    (0..4).map(|_| stage.step(&windows.next(&mut position, 2), None).unwrap().loss).collect()
}

#[track_caller]
fn assert_curve(got: &[f64], expected: [f64; 4]) {
    for (x, expected) in got.iter().zip(expected) {
        assert!((x / expected - 1.0).abs() <= 1e-4, "{got:?}, expected {expected:?}");
    }
}

fn losses(overrides: &[&str]) -> Vec<f64> {
    transfer(overrides).into_iter().map(|report| report.loss).collect()
}

#[test]
fn after_the_output_projection() {
    let expected =
        [0.018763650829593338, 0.015330325501660505, 0.017383303493261337, 0.01495380699634552];
    assert_curve(&losses(&["transfer.loss=output_mse"]), expected);
}

#[test]
fn normalised_by_the_targets_variance() {
    let expected =
        [0.09763628697616589, 0.06393727254164487, 0.09540446302186939, 0.06988096667531488];
    assert_curve(&losses(&["transfer.normalise=true"]), expected);
}

/// 1000 over the number of layers: another gradient of the same losses.
#[test]
fn a_scaled_loss_reduced_by_its_mean() {
    let set = ["transfer.optimizer.clip=0", "transfer.optimizer.eps=1e-16"];
    let plain = transfer(&set);
    let scaled =
        transfer(&[&set[..], &["transfer.reduction=mean", "transfer.loss_scale=1000"]].concat());
    for (plain, scaled) in plain.iter().zip(&scaled) {
        // AdamW without eps divides the factor out again.
        assert!(
            (scaled.loss / plain.loss - 1.0).abs() < 1e-3,
            "{} and {}",
            scaled.loss,
            plain.loss
        );
    }
    let ratio = scaled[0].grad_norm / plain[0].grad_norm;
    assert!((ratio / 500.0 - 1.0).abs() < 1e-5, "{ratio}");
}

#[test]
fn a_loss_on_the_linear_branch_alone() {
    let reports = transfer(&["transfer.linear_branch_weight=0.5"]);
    let losses: Vec<f64> = reports.iter().map(|report| report.loss).collect();
    let expected =
        [0.21757189091295004, 0.20546839106827977, 0.20196488002936044, 0.20658597443252802];
    assert_curve(&losses, expected);
    // What is minimized is both; the branch's own loss is told.
    let plain = transfer(&[]);
    for (layer, linear) in reports[0].linear_losses.iter().enumerate() {
        let sum = plain[0].layer_losses[layer] + 0.5 * linear;
        assert!((reports[0].layer_losses[layer] - sum).abs() < 1e-9);
    }
    assert!(plain[0].linear_losses.is_empty());
}

#[test]
fn cross_entropy() {
    let expected = [5.965617887517239, 6.233306656492518, 6.087097105827738, 6.131318386564864];
    assert_curve(&finetune(&["finetune.objective=cross_entropy"]), expected);
}

#[test]
fn both_objectives_mixed() {
    let half = finetune(&["finetune.objective={ mixed = { kl = 0.5 } }"]);
    let expected = [3.076715582303872, 3.1709616232964315, 3.14638530909188, 3.144424326965991];
    assert_curve(&half, expected);
    // Before the first step all students are one.
    let (kl, nll) = (finetune(&[])[0], finetune(&["finetune.objective=cross_entropy"])[0]);
    assert!((half[0] - 0.5 * (kl + nll)).abs() < 1e-6);
}

#[test]
fn dropout_is_the_same_every_time_and_recomputed_with_its_layer() {
    let dropped = finetune(&["finetune.dropout=0.3"]);
    let expected =
        [0.18781327851622062, 0.10905104760876805, 0.20508377661674887, 0.15130785547172074];
    assert_curve(&dropped, expected);
    assert_eq!(dropped, finetune(&["finetune.dropout=0.3", "finetune.recompute=false"]));
    assert_ne!(dropped, finetune(&[]));
    assert_ne!(dropped, finetune(&["finetune.dropout=0.3", "seed=4"]));
}

#[test]
fn schedules_share_their_warmup_and_then_part() {
    let rates = |schedule: &str| -> Vec<f64> {
        let set = format!("transfer.optimizer.schedule={schedule}");
        transfer(&[&set, "transfer.steps=4"]).into_iter().map(|report| report.lr).collect()
    };
    let near = |got: Vec<f64>, expected: [f64; 4]| {
        assert!(got.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-12), "{got:?}");
    };
    near(rates("constant"), [5e-3, 1e-2, 1e-2, 1e-2]);
    near(rates("linear"), [5e-3, 1e-2, 1e-2, 1e-3]);
    near(rates("cosine"), [5e-3, 1e-2, 1e-2, 1e-3]);
}

#[test]
fn stages_are_found_by_their_names() {
    for stage in Stage::ALL {
        assert_eq!(stage.to_string().parse::<Stage>().unwrap(), stage);
    }
    let error = "pretrain".parse::<Stage>().unwrap_err();
    assert!(error.to_string().contains("\"pretrain\""), "{error}");
    assert_eq!(error.hint().as_deref(), Some("use transfer or finetune"));
}
