//! Ten known losses per stage: the whole training path, replayed.

mod common;

use common::{model, recipe, windows};
use still_model::Student;
use still_train::{FinetuneStage, Position, TransferStage};

/// Recorded from this test on x86-64 with AVX-512, f32.
const TRANSFER: [f64; 10] = [
    0.019939118530601263,
    0.01779888430610299,
    0.018848570063710213,
    0.01652696542441845,
    0.021606065798550844,
    0.01699400064535439,
    0.017052647657692432,
    0.01899461029097438,
    0.018097770167514682,
    0.014783638529479504,
];
const FINETUNE: [f64; 10] = [
    0.17211743973802723,
    0.21709752020713796,
    0.12996386855483402,
    0.15417495028638467,
    0.17634550810131108,
    0.11223541065601239,
    0.19431581340480383,
    0.1358784347347258,
    0.13523286200355264,
    0.19138447621071464,
];

#[test]
fn ten_steps_of_each_stage() {
    let (model, recipe, windows) = (model(), recipe(&[]), windows());
    let still = recipe.attention.resolve(model.config()).unwrap();
    let student = Student::init(still, model.config(), recipe.attention.init, recipe.seed).unwrap();
    let mut position = Position::default();

    let mut transfer = TransferStage::new(&model, &student, &recipe.transfer).unwrap();
    let got: Vec<f64> = (0..10)
        .map(|_| transfer.step(&windows.next(&mut position, 2)).unwrap().report.loss)
        .collect();
    assert_curve("transfer", &got, &TRANSFER);

    let student = transfer.student().unwrap();
    let mut finetune = FinetuneStage::new(&model, &student, &recipe.finetune, recipe.seed).unwrap();
    let got: Vec<f64> = (0..10)
        .map(|_| finetune.step(&windows.next(&mut position, 2), None).unwrap().loss)
        .collect();
    assert_curve("finetune", &got, &FINETUNE);
}

fn assert_curve(stage: &str, got: &[f64], expected: &[f64]) {
    for (step, (x, expected)) in got.iter().zip(expected).enumerate() {
        let error = (x / expected - 1.0).abs();
        assert!(error <= 1e-4, "{stage} step {step}: {x:e}, expected {expected:e}; all: {got:?}");
    }
}

#[test]
fn recomputing_layers_changes_nothing() {
    let (model, windows) = (model(), windows());
    let run = |recompute: &str| {
        let recipe = recipe(&[recompute]);
        let still = recipe.attention.resolve(model.config()).unwrap();
        let student = Student::init(still, model.config(), recipe.attention.init, 3).unwrap();
        let mut stage = FinetuneStage::new(&model, &student, &recipe.finetune, 3).unwrap();
        let mut position = Position::default();
        (0..3)
            .map(|_| stage.step(&windows.next(&mut position, 2), None).unwrap())
            .collect::<Vec<_>>()
    };
    assert_eq!(run("finetune.recompute=true"), run("finetune.recompute=false"));
}

#[test]
fn the_teachers_hidden_states_can_be_handed_on() {
    let (model, recipe, windows) = (model(), recipe(&[]), windows());
    let still = recipe.attention.resolve(model.config()).unwrap();
    let student = Student::init(still, model.config(), recipe.attention.init, 3).unwrap();
    let batch = windows.next(&mut Position::default(), 2);
    let mut transfer = TransferStage::new(&model, &student, &recipe.transfer).unwrap();
    let hidden = transfer.step(&batch).unwrap().teacher_hidden;
    let loss = |hidden: Option<&[candle_core::Tensor]>| {
        let mut stage = FinetuneStage::new(&model, &student, &recipe.finetune, 3).unwrap();
        stage.step(&batch, hidden).unwrap().loss
    };
    let (given, computed) = (loss(Some(&hidden)), loss(None));
    assert!((given / computed - 1.0).abs() < 1e-6, "{given} vs {computed}");
}
