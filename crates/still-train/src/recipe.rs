//! Recipes: everything that decides a run, in one TOML file.

use serde::{Deserialize, Serialize};
use still_attention::{
    Branches, FeatureMap, HeadGeometry, LinearNorm, Router, SelectionHead, StillConfig,
};
use still_model::{FeatureInit, LoraConfig, LoraTarget, ModelConfig};
use toml::{Table, Value};

use crate::error::{Result, TrainError};
use crate::optimizer::AdamWConfig;

/// A complete recipe; every key has a default.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Recipe {
    /// Seed of initialisation and of the data's order.
    pub seed: u64,
    /// The hybrid attention.
    pub attention: AttentionRecipe,
    /// How text becomes windows.
    pub data: DataRecipe,
    /// Stage 1: attention transfer.
    pub transfer: TransferRecipe,
    /// Stage 2: low-rank finetuning.
    pub finetune: FinetuneRecipe,
    /// What is kept on disk.
    pub checkpoint: CheckpointRecipe,
}

/// The hybrid attention of every layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AttentionRecipe {
    /// Tokens of a chunk.
    pub chunk: usize,
    /// Salient tokens of each chunk, the same everywhere.
    pub budget: usize,
    /// `[layer][selection head]`; takes the place of `budget`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub budgets: Option<Vec<Vec<usize>>>,
    /// Most salient tokens per selection head.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cap: Option<usize>,
    /// `"self_saliency"`, `"none"` or `{ random = { seed = 0 } }`.
    pub router: Router,
    /// `"kv_head"` or `"query_head"`.
    pub selection_head: SelectionHead,
    /// `"softmax"` or `{ np_map = { householder = false } }`.
    pub feature_map: FeatureMap,
    /// Columns of a feature map's matrix; the head dimension if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub feature_dim: Option<usize>,
    /// `"identity"` or `"normal"`.
    pub init: FeatureInit,
    /// `"mean"` or `"sum"`.
    pub linear_norm: LinearNorm,
    /// Output gate on the linear branch.
    pub gate: bool,
    /// Branch switches.
    pub branches: Branches,
}

impl Default for AttentionRecipe {
    fn default() -> Self {
        Self {
            chunk: 64,
            budget: 4,
            budgets: None,
            cap: None,
            router: Router::default(),
            selection_head: SelectionHead::default(),
            feature_map: FeatureMap::default(),
            feature_dim: None,
            init: FeatureInit::default(),
            linear_norm: LinearNorm::default(),
            gate: false,
            branches: Branches::default(),
        }
    }
}

impl AttentionRecipe {
    /// The student's configuration for a model.
    ///
    /// # Errors
    /// Budgets that do not fit the model.
    pub fn resolve(&self, model: &ModelConfig) -> Result<StillConfig> {
        let geometry: HeadGeometry = model.geometry();
        let heads = geometry.selection_heads(self.selection_head);
        let uniform = || vec![vec![self.budget; heads]; model.num_hidden_layers];
        let config = StillConfig {
            chunk: self.chunk,
            router: self.router,
            selection_head: self.selection_head,
            budgets: self.budgets.clone().unwrap_or_else(uniform),
            cap: self.cap,
            feature_map: self.feature_map,
            feature_dim: self.feature_dim.unwrap_or(model.head_dim),
            linear_norm: self.linear_norm,
            gate: self.gate,
            branches: self.branches,
        };
        config.validate(model.num_hidden_layers, geometry)?;
        Ok(config)
    }
}

/// How text becomes windows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataRecipe {
    /// Tokens of a window.
    pub length: usize,
    /// Documents and their ends shorter than this are left out.
    pub min_length: usize,
}

impl Default for DataRecipe {
    fn default() -> Self {
        Self { length: 1024, min_length: 64 }
    }
}

/// Stage 1.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TransferRecipe {
    /// Optimizer steps.
    pub steps: usize,
    /// Windows of a step.
    pub batch: usize,
    /// The optimizer.
    pub optimizer: AdamWConfig,
}

impl Default for TransferRecipe {
    fn default() -> Self {
        Self { steps: 24, batch: 1, optimizer: AdamWConfig { lr: 3e-2, ..AdamWConfig::default() } }
    }
}

/// What stage 2 minimises.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Objective {
    /// KL divergence of the student's next-token distribution from the teacher's.
    #[default]
    LogitKl,
    /// Cross-entropy of the next token (the paper).
    CrossEntropy,
}

/// Stage 2.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FinetuneRecipe {
    /// Optimizer steps.
    pub steps: usize,
    /// Windows of a step.
    pub batch: usize,
    /// `"logit_kl"` or `"cross_entropy"`.
    pub objective: Objective,
    /// Also train feature maps, `ℓ` and gate.
    pub train_attention: bool,
    /// Compute each layer again in the backward pass: memory then does not grow with depth × length.
    pub recompute: bool,
    /// The low-rank updates.
    pub lora: LoraConfig,
    /// The optimizer.
    pub optimizer: AdamWConfig,
}

impl Default for FinetuneRecipe {
    fn default() -> Self {
        Self {
            steps: 12,
            batch: 1,
            objective: Objective::default(),
            train_attention: true,
            recompute: true,
            lora: LoraConfig { rank: 8, alpha: 16.0, targets: LoraTarget::ALL.to_vec() },
            optimizer: AdamWConfig { lr: 3e-3, ..AdamWConfig::default() },
        }
    }
}

/// What is kept on disk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CheckpointRecipe {
    /// Steps between checkpoints.
    pub every: usize,
    /// Checkpoints kept.
    pub keep: usize,
}

impl Default for CheckpointRecipe {
    fn default() -> Self {
        Self { every: 50, keep: 2 }
    }
}

/// Keys that the default recipe leaves out.
const OPTIONAL: [&str; 3] = ["attention.budgets", "attention.cap", "attention.feature_dim"];

impl Recipe {
    /// Parses TOML and then applies overrides of the form `section.key=value`.
    ///
    /// # Errors
    /// Where it does not parse; an unknown key, with the nearest valid one; a value that makes no sense.
    pub fn parse(text: &str, overrides: &[String]) -> Result<Self> {
        let mut table: Table =
            text.parse().map_err(|error: toml::de::Error| TrainError::Recipe {
                what: error.to_string().trim_end().to_owned(),
                hint: "recipes are TOML; see recipes/ for complete ones".into(),
            })?;
        for item in overrides {
            apply_override(&mut table, item)?;
        }
        check_keys(&table)?;
        let recipe: Self = Value::Table(table).try_into().map_err(|error: toml::de::Error| {
            TrainError::Recipe {
                what: error.message().to_owned(),
                hint: "see recipes/ for complete recipes with every key".into(),
            }
        })?;
        recipe.validate()?;
        Ok(recipe)
    }

    fn validate(&self) -> Result<()> {
        let positive = [
            ("data.min_length", self.data.min_length),
            ("transfer.batch", self.transfer.batch),
            ("finetune.batch", self.finetune.batch),
            ("finetune.lora.rank", self.finetune.lora.rank),
            ("checkpoint.every", self.checkpoint.every),
            ("checkpoint.keep", self.checkpoint.keep),
        ];
        if let Some((key, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(invalid(format!("{key} is 0"), "use 1 or more"));
        }
        if self.data.min_length < 2 || self.data.length < self.data.min_length {
            return Err(invalid(
                format!(
                    "data.length {} and data.min_length {} do not fit",
                    self.data.length, self.data.min_length
                ),
                "2 <= min_length <= length",
            ));
        }
        self.transfer.optimizer.validate("transfer.optimizer")?;
        self.finetune.optimizer.validate("finetune.optimizer")
    }
}

fn invalid(what: String, hint: &str) -> TrainError {
    TrainError::Recipe { what, hint: hint.into() }
}

/// Sets `a.b.c=value`; a value that is not TOML is taken as a string.
fn apply_override(table: &mut Table, item: &str) -> Result<()> {
    let malformed =
        || invalid(format!("cannot read the override \"{item}\""), "use section.key=value");
    let (path, value) = item.split_once('=').ok_or_else(malformed)?;
    let value = format!("value = {value}")
        .parse::<Table>()
        .ok()
        .and_then(|mut table| table.remove("value"))
        .unwrap_or_else(|| Value::String(value.trim().to_owned()));
    let keys: Vec<&str> = path.trim().split('.').collect();
    let (last, parents) = keys.split_last().ok_or_else(malformed)?;
    let mut at = table;
    for key in parents {
        let entry = at.entry((*key).to_owned()).or_insert_with(|| Value::Table(Table::new()));
        at = entry.as_table_mut().ok_or_else(malformed)?;
    }
    at.insert((*last).to_owned(), value);
    Ok(())
}

/// An error for a key that no recipe has, with the nearest one that it could mean.
fn check_keys(table: &Table) -> Result<()> {
    let complete = Table::try_from(Recipe::default())
        .map_err(|error| invalid(error.to_string(), "this is a defect of still"))?;
    let mut valid: Vec<String> = OPTIONAL.map(str::to_owned).into();
    collect_keys("", &complete, &mut valid);
    let mut given = Vec::new();
    collect_keys("", table, &mut given);
    let is_valid = |key: &String| {
        // Inside a value such as feature_map = { np_map = … } the value's own type decides.
        let known =
            |v: &String| v == key || key.starts_with(&format!("{v}.")) && !is_section(v, &complete);
        valid.iter().any(known)
            || valid.iter().any(|v| v.starts_with(&format!("{key}.")))
            || key.starts_with("attention.feature_map.")
            || key.starts_with("attention.router.")
    };
    let Some(unknown) = given.iter().find(|key| !is_valid(key)) else { return Ok(()) };
    let nearest = valid
        .iter()
        .max_by(|a, b| {
            let near = |v: &str| strsim::jaro_winkler(v, unknown);
            near(a).total_cmp(&near(b))
        })
        .cloned()
        .unwrap_or_default();
    Err(TrainError::Recipe {
        what: format!("unknown key \"{unknown}\""),
        hint: format!("did you mean \"{nearest}\"?"),
    })
}

fn is_section(path: &str, complete: &Table) -> bool {
    let mut at = complete;
    for key in path.split('.') {
        match at.get(key) {
            Some(Value::Table(table)) => at = table,
            _ => return false,
        }
    }
    true
}

/// Dotted paths of every leaf and section.
fn collect_keys(prefix: &str, table: &Table, to: &mut Vec<String>) {
    for (key, value) in table {
        let path = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
        if let Value::Table(table) = value {
            collect_keys(&path, table, to);
        }
        to.push(path);
    }
}
