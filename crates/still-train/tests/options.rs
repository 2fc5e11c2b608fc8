//! Every objective and option of both stages: a few known losses each, and what each is for.

mod common;

use common::{model, recipe, windows};
use still_model::Student;
use still_train::{FinetuneStage, Position, TransferStage};

/// Losses of the first steps of stage 1.
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
    assert_curve(&losses(&["transfer.loss=output_mse"]), [1.0; 4]);
}

#[test]
fn normalised_by_the_targets_variance() {
    assert_curve(&losses(&["transfer.normalise=true"]), [1.0; 4]);
}

#[test]
fn a_loss_on_the_linear_branch_alone() {
    let reports = transfer(&["transfer.linear_branch_weight=0.5"]);
    assert_curve(&reports.iter().map(|report| report.loss).collect::<Vec<_>>(), [1.0; 4]);
    // What is minimised is both; the branch's own loss is told, and falls.
    let plain = transfer(&[]);
    for (layer, linear) in reports[0].linear_losses.iter().enumerate() {
        let sum = plain[0].layer_losses[layer] + 0.5 * linear;
        assert!((reports[0].layer_losses[layer] - sum).abs() < 1e-9);
    }
    assert!(plain[0].linear_losses.is_empty());
}

#[test]
fn cross_entropy() {
    assert_curve(&finetune(&["finetune.objective=cross_entropy"]), [1.0; 4]);
}

#[test]
fn both_objectives_mixed() {
    let half = finetune(&["finetune.objective={ mixed = { kl = 0.5 } }"]);
    assert_curve(&half, [1.0; 4]);
    // Before the first step all students are one.
    let (kl, nll) = (finetune(&[])[0], finetune(&["finetune.objective=cross_entropy"])[0]);
    assert!((half[0] - 0.5 * (kl + nll)).abs() < 1e-6);
}

#[test]
fn dropout_is_the_same_every_time_and_recomputed_with_its_layer() {
    let dropped = finetune(&["finetune.dropout=0.3"]);
    assert_curve(&dropped, [1.0; 4]);
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
