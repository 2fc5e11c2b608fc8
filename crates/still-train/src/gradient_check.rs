//! Gradients of every trained tensor of both stages, against differences of the loss itself.

use still_compute::Gradients;
use still_model::random::{random_model, tiny_config, tiny_sliding_config};
use still_model::{Model, ModelConfig, Student};

use crate::data::Window;
use crate::finetune::FinetuneStage;
use crate::optimizer::Parameters;
use crate::recipe::Recipe;
use crate::transfer::TransferStage;

/// Everything that can be learned is there. Routing goes by position, or a small step would change it.
const BASE: [&str; 10] = [
    "attention.chunk=8",
    "attention.budget=2",
    "attention.router={ random = { seed = 1 } }",
    "attention.feature_map={ np_map = { householder = true } }",
    "attention.init=normal",
    "attention.gate=true",
    "finetune.lora.rank=2",
    "finetune.lora.alpha=2",
    "finetune.lora.targets=[\"q\", \"k\", \"v\", \"o\", \"g\"]",
    "finetune.recompute=false",
];

fn windows() -> [Window; 2] {
    let ids = |n: u32| (0..40).map(|t| (t * t + 7 * (t % 11) + 31 * n) % 256).collect::<Vec<_>>();
    [1, 2].map(|n| ids(n).into())
}

fn start(overrides: &[&str]) -> (Model, Recipe, Student) {
    let config = ModelConfig {
        attention_bias: true,
        attention_output_bias: true,
        mlp_bias: true,
        ..tiny_config()
    };
    start_with(config, overrides)
}

fn start_with(config: ModelConfig, overrides: &[&str]) -> (Model, Recipe, Student) {
    let model = random_model(config, 5).unwrap();
    let set: Vec<String> = BASE.iter().chain(overrides).map(|&item| item.to_owned()).collect();
    let recipe = Recipe::parse("", &set).unwrap();
    let still = recipe.attention.resolve(model.config()).unwrap();
    let mut student = Student::init(still, model.config(), recipe.attention.init, 3).unwrap();
    // Updates that are not zero: at B = 0 the gradient of A is.
    student.add_lora(model.config(), recipe.finetune.lora.clone(), 4).unwrap();
    let mut n = 0.0;
    let student = student.map_tensors(|name, tensor| {
        n += 1.0;
        let moved = tensor.affine(1.0, 0.01 * n)?;
        Ok(if name.contains("lora_B") { (moved * 0.3)? } else { tensor.clone() })
    });
    (model, recipe, student.unwrap())
}

/// Along its own gradient, every tensor must change the loss by the gradient's square.
fn check(parameters: &Parameters, gradients: &Gradients, loss: impl Fn() -> f64, what: &str) {
    assert!(parameters.len() >= 12, "{what}: {} tensors", parameters.len());
    let updates = parameters.iter().filter(|(name, _)| name.contains("g_proj.lora_")).count();
    assert!(updates == 0 || updates == 4, "{what}: {updates} matrices of the gate's updates");
    for (name, var) in parameters {
        let gradient = gradients.get(var).unwrap();
        let gradient = gradient.unwrap_or_else(|| panic!("{what}: {name} has none"));
        let squares =
            f64::from(gradient.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap());
        assert!(squares > 0.0, "{what}: {name} has a gradient of zero");
        let before = var.as_tensor().copy().unwrap();
        let norm = before.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
        // A hundredth of the tensor's size.
        let step = 1e-2 * f64::from(norm.max(1.0)) / squares.sqrt();
        let at = |step: f64| {
            var.set(&(&before + (&gradient * step).unwrap()).unwrap()).unwrap();
            loss()
        };
        let numeric = (at(step) - at(-step)) / (2.0 * step);
        var.set(&before).unwrap();
        let error = (numeric / squares - 1.0).abs();
        assert!(error < 2e-2, "{what}: {name}: {numeric:e}, expected {squares:e}");
    }
}

#[test]
fn attention_transfer() {
    for overrides in [
        &["transfer.loss=head_mse"][..],
        &["transfer.loss=output_mse", "transfer.normalise=true"],
        &["transfer.linear_branch_weight=0.5", "transfer.normalise=true"],
        &["transfer.reduction=mean", "transfer.loss_scale=1000"],
    ] {
        let (model, recipe, student) = start(overrides);
        let mut stage = TransferStage::new(&model, &student, &recipe.transfer).unwrap();
        let windows = windows();
        let gradients = stage.gradients(&windows).unwrap().into_gradients();
        let parameters = stage.updates().optimizer.parameters().clone();
        // The loss that is told is the mean over the layers, unscaled.
        let layers = model.config().num_hidden_layers;
        let scale = layers as f64 * recipe.transfer.gradient_scale(layers);
        let loss = || scale * stage.gradients(&windows).unwrap().loss();
        check(&parameters, &gradients, loss, &overrides.join(" "));
    }
}

/// Gemma 3: two of five layers learn, through those with a window, four norms a layer and another activation.
#[test]
fn both_stages_among_sliding_windows() {
    check_sliding(&tiny_sliding_config());
}

/// The same with queries scaled as the largest Gemma 3 scales them: not by its heads' channels.
#[test]
fn both_stages_of_scaled_queries() {
    check_sliding(&ModelConfig { query_pre_attn_scalar: Some(20.0), ..tiny_sliding_config() });
}

fn check_sliding(config: &ModelConfig) {
    let windows = windows();
    let (model, recipe, student) = start_with(config.clone(), &[]);
    let mut stage = TransferStage::new(&model, &student, &recipe.transfer).unwrap();
    let gradients = stage.gradients(&windows).unwrap().into_gradients();
    let parameters = stage.updates().optimizer.parameters().clone();
    let scale = 2.0 * recipe.transfer.gradient_scale(2);
    let loss = || scale * stage.gradients(&windows).unwrap().loss();
    check(&parameters, &gradients, loss, "transfer");
    for overrides in [
        &["finetune.recompute=false"][..],
        &["finetune.recompute=true"],
        &["finetune.recompute=mlp"],
        &["finetune.objective={ mixed = { kl = 0.5 } }", "finetune.dropout=0.3"],
    ] {
        let (model, recipe, student) = start_with(config.clone(), overrides);
        let mut stage = FinetuneStage::new(&model, &student, &recipe.finetune, 9).unwrap();
        let gradients = stage.gradients(&windows, None).unwrap().1;
        let parameters = stage.updates().optimizer.parameters().clone();
        let loss = || stage.gradients(&windows, None).unwrap().0;
        check(&parameters, &gradients, loss, &overrides.join(" "));
    }
}

#[test]
fn low_rank_finetuning() {
    for overrides in [
        &["finetune.objective=logit_kl"][..],
        &["finetune.objective=cross_entropy", "finetune.recompute=true"],
        &["finetune.objective={ mixed = { kl = 0.5 } }", "finetune.dropout=0.3"],
        &["finetune.objective=logit_kl", "finetune.recompute=mlp"],
        // The gate's matrix is frozen, its update learns.
        &["finetune.objective=cross_entropy", "finetune.train_attention=false"],
    ] {
        let (model, recipe, student) = start(overrides);
        let mut stage = FinetuneStage::new(&model, &student, &recipe.finetune, 9).unwrap();
        let windows = windows();
        let gradients = stage.gradients(&windows, None).unwrap().1;
        let parameters = stage.updates().optimizer.parameters().clone();
        let loss = || stage.gradients(&windows, None).unwrap().0;
        check(&parameters, &gradients, loss, &overrides.join(" "));
    }
}
