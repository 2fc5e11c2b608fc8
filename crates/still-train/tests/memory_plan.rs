//! The memory that a plan foretells is about the memory that a run takes.

#![cfg(target_os = "linux")]

#[path = "common/memory.rs"]
mod memory;

use memory::resident_bytes;
use still_model::random::{random_model, tiny_config};
use still_model::{ModelConfig, Student};
use still_train::{FinetuneStage, Plan, Recipe, Stage, TransferStage, Windows, plan};

/// Estimate and reality differ by less than this factor.
const FACTOR: f64 = 1.4;
const TOKENS: usize = 1024;

fn recipe(overrides: &[&str]) -> Recipe {
    let steps = ["transfer.steps=1", "finetune.steps=1", "data.length=1024"];
    let all: Vec<String> = steps.iter().chain(overrides).map(|&item| item.to_owned()).collect();
    Recipe::parse("", &all).unwrap()
}

fn peak(plan: &Plan, stage: Stage) -> usize {
    plan.stages.iter().find(|planned| planned.stage == stage).unwrap().peak_bytes
}

#[test]
fn peaks_are_foretold() {
    let config = ModelConfig {
        hidden_size: 256,
        intermediate_size: 512,
        num_hidden_layers: 4,
        num_attention_heads: 8,
        num_key_value_heads: 4,
        head_dim: 32,
        vocab_size: 2048,
        max_position_embeddings: 4096,
        ..tiny_config()
    };
    let model = random_model(config, 1).unwrap();
    let window: Vec<u32> = (0..TOKENS as u32).map(|t| t * t % 2048).collect();
    let windows = Windows::from_windows(vec![window.clone()], 0);
    let (recomputing, keeping) = (recipe(&[]), recipe(&["finetune.recompute=false"]));
    let still = recomputing.attention.resolve(model.config()).unwrap();
    let student = Student::init(still, model.config(), recomputing.attention.init, 0).unwrap();

    // A short step first: threads and their buffers are the process's, not the plan's; the weights are there already.
    let mut short = TransferStage::new(&model, &student, &recomputing.transfer).unwrap();
    short.step(&[window[..64].to_vec().into()]).unwrap();
    drop(short);
    // From the least to the most, as the system tells only the most so far.
    let before = resident_bytes("VmRSS");
    let grown = || resident_bytes("VmHWM").saturating_sub(before);
    let mut stage = TransferStage::new(&model, &student, &recomputing.transfer).unwrap();
    stage.step(&[window.clone().into()]).unwrap();
    drop(stage);
    let transfer = grown();
    let finetune = |recipe: &Recipe| {
        let mut stage = FinetuneStage::new(&model, &student, &recipe.finetune, 0).unwrap();
        stage.step(&[window.clone().into()], None).unwrap();
        grown()
    };
    let (with_recompute, without) = (finetune(&recomputing), finetune(&keeping));

    let (plan_recomputing, plan_keeping) =
        (plan(&model, &recomputing, &windows).unwrap(), plan(&model, &keeping, &windows).unwrap());
    let mut wrong = Vec::new();
    for (what, foretold, measured) in [
        ("transfer", peak(&plan_recomputing, Stage::Transfer), transfer),
        ("finetune", peak(&plan_recomputing, Stage::Finetune), with_recompute),
        ("finetune without recompute", peak(&plan_keeping, Stage::Finetune), without),
    ] {
        let foretold = foretold - plan_recomputing.weights_bytes;
        let ratio = foretold as f64 / measured as f64;
        let line = format!("{what}: {foretold} foretold, {measured} measured, ratio {ratio:.2}");
        println!("{line}");
        if !(1.0 / FACTOR..FACTOR).contains(&ratio) {
            wrong.push(line);
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    let stage = &plan_recomputing.stages[1];
    assert_eq!((stage.tokens, stage.longest_window), (TOKENS, TOKENS));
    assert!(stage.seconds > 0.0 && stage.parameters > plan_recomputing.stages[0].parameters);
}
