//! Students of other kinds go through both stages.

mod common;

use candle_core::Tensor;
use common::{model, recipe, windows};
use still_model::Student;
use still_train::{FinetuneStage, Position, Recipe, TransferStage};

/// Three steps of each stage; the student after each. Without a linear branch stage 1 is left out.
fn train(recipe: &Recipe) -> [Student; 3] {
    let (model, windows) = (model(), windows());
    let still = recipe.attention.resolve(model.config()).unwrap();
    let fresh = Student::init(still, model.config(), recipe.attention.init, recipe.seed).unwrap();
    let mut position = Position::default();
    let mut transferred = fresh.clone();
    if fresh.config.branches.linear {
        let mut stage = TransferStage::new(&model, &fresh, &recipe.transfer).unwrap();
        for _ in 0..3 {
            stage.step(&windows.next(&mut position, 2)).unwrap();
        }
        transferred = stage.student().unwrap();
    }
    let mut stage =
        FinetuneStage::new(&model, &transferred, &recipe.finetune, recipe.seed).unwrap();
    let losses: Vec<f64> =
        (0..3).map(|_| stage.step(&windows.next(&mut position, 2), None).unwrap().loss).collect();
    assert!(losses.iter().all(|loss| loss.is_finite()), "{losses:?}");
    [fresh, transferred, stage.student().unwrap()]
}

fn moved(a: &Tensor, b: &Tensor) -> bool {
    let values = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    values(a).iter().zip(values(b)).all(|(a, b)| *a != b)
}

#[test]
fn the_window_factor_learns_in_both_stages() {
    let stages = train(&recipe(&[
        "attention.budget=0",
        "attention.router=none",
        "attention.feature_map=softmax",
        "attention.linear_norm=sum",
        "attention.window_factor=true",
    ]));
    let factor = |student: &Student| student.layers[1].attention.window_factor.clone().unwrap();
    let [fresh, transferred, tuned] = stages.each_ref().map(factor);
    assert!(fresh.to_vec1::<f32>().unwrap().iter().all(|&w| w == -2.197));
    assert!(moved(&fresh, &transferred));
    assert!(moved(&transferred, &tuned));
}

#[test]
fn a_window_alone_is_only_finetuned() {
    train(&recipe(&[
        "attention.budget=0",
        "attention.branches={ window = true, salient = true, linear = false }",
    ]));
}

#[test]
fn a_window_and_the_first_tokens_are_only_finetuned() {
    train(&recipe(&[
        "attention.router=first_tokens",
        "attention.budget=4",
        "attention.cap=4",
        "attention.branches={ window = true, salient = true, linear = false }",
    ]));
}

#[test]
fn self_recall_ranks_in_both_stages() {
    let [fresh, transferred, _] =
        train(&recipe(&["attention.router=self_recall", "attention.cap=6"]));
    let map = |student: &Student| student.layers[1].attention.feature_map_k.clone();
    assert!(moved(&map(&fresh), &map(&transferred)));
}

#[test]
fn linear_attention_alone_learns_its_maps_in_both_stages() {
    let stages = train(&recipe(&[
        "attention.mode=linear_only",
        "attention.budget=0",
        "attention.router=none",
        "attention.feature_map=softmax",
        "attention.linear_norm=sum",
    ]));
    let map = |student: &Student| student.layers[0].attention.feature_map_k.clone();
    let [fresh, transferred, tuned] = stages.each_ref().map(map);
    assert!(moved(&fresh, &transferred));
    assert!(moved(&transferred, &tuned));
}

#[test]
fn attention_received_ranks_in_both_stages() {
    let [fresh, transferred, _] = train(&recipe(&["attention.router=received_attention"]));
    let map = |student: &Student| student.layers[1].attention.feature_map_q.clone();
    assert!(moved(&map(&fresh), &map(&transferred)));
}
