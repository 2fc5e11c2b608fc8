//! A PEFT adapter: low-rank updates of the attention's projections.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use serde_json::Value;

use super::super::safetensors_dir::read_json;
use super::super::{Checkpoint, Weights, learned_names};
use crate::config::ModelConfig;
use crate::error::{ModelError, Result};
use crate::student::{LoraConfig, LoraTarget};

pub(in super::super) const ADAPTER_CONFIG: &str = "adapter_config.json";
pub(in super::super) const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";

/// What PEFT takes for rank and α where a configuration leaves them out.
const DEFAULT_RANK: u64 = 8;
const DEFAULT_ALPHA: f64 = 8.0;

/// Keys that decide nothing once the adapter is trained, or are read by name. Every other key must be empty.
const KNOWN: [&str; 22] = [
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ephemeral_gpu_offload",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
];
/// Ways to start an adapter that change nothing but the adapter.
const PLAIN_INITS: [&str; 3] = ["gaussian", "eva", "orthogonal"];

/// An adapter's configuration, checked.
pub(super) struct Adapter {
    dir: PathBuf,
    pub config_path: PathBuf,
    /// What it says it belongs to.
    pub base: Option<String>,
    rank: usize,
    /// By which our scale `α / r` is the adapter's.
    alpha: f64,
    target_modules: Vec<String>,
}

impl Adapter {
    /// Reads the configuration in `dir`.
    ///
    /// # Errors
    /// Whatever is not plain LoRA, by name.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(ADAPTER_CONFIG);
        let json = read_json(&path)?;
        let Some(keys) = json.as_object() else {
            return Err(ModelError::corrupt(&path, "not a JSON object"));
        };
        let unsupported = |key: &str, value: &Value, hint: &str| ModelError::Unsupported {
            what: format!("\"{key}\": {value} of a PEFT adapter"),
            found_in: Some(path.clone()),
            hint: hint.into(),
        };
        let merge = "merge the adapter into its base with PEFT's merge_and_unload and save that";
        for (key, value) in keys {
            if !KNOWN.contains(&key.as_str()) && !is_empty(value) {
                return Err(unsupported(key, value, merge));
            }
        }
        let one_of = |key: &str, fits: &dyn Fn(&Value) -> bool, hint: &str| match keys.get(key) {
            Some(value) if !value.is_null() && !fits(value) => Err(unsupported(key, value, hint)),
            _ => Ok(()),
        };
        one_of("peft_type", &|value| value == "LORA", "supported: \"LORA\"")?;
        one_of("bias", &|value| value == "none", "supported: \"none\"")?;
        one_of("revision", &|value| value == "main", "fetch that revision and name its directory")?;
        let plain = |value: &Value| {
            value.is_boolean() || value.as_str().is_some_and(|init| PLAIN_INITS.contains(&init))
        };
        one_of("init_lora_weights", &plain, merge)?;

        let wrong = |key: &str, value: &Value, expected: &str| {
            ModelError::corrupt(&path, format!("\"{key}\" is {value}, not {expected}"))
        };
        let given = |key: &str| keys.get(key).filter(|value| !value.is_null());
        let rank = match given("r") {
            None => DEFAULT_RANK,
            Some(value) => value
                .as_u64()
                .filter(|&rank| rank > 0)
                .ok_or_else(|| wrong("r", value, "a rank of 1 or more"))?,
        } as usize;
        let alpha = match given("lora_alpha") {
            None => DEFAULT_ALPHA,
            Some(value) => value
                .as_f64()
                .filter(|alpha| alpha.is_finite())
                .ok_or_else(|| wrong("lora_alpha", value, "a number"))?,
        };
        let rank_stabilised = match given("use_rslora") {
            None => false,
            Some(value) => {
                value.as_bool().ok_or_else(|| wrong("use_rslora", value, "true or false"))?
            }
        };
        // α/√r instead of α/r.
        let alpha = if rank_stabilised { alpha * (rank as f64).sqrt() } else { alpha };
        let base = match given("base_model_name_or_path") {
            None => None,
            Some(Value::String(base)) => Some(base.clone()).filter(|base| !base.is_empty()),
            Some(value) => return Err(wrong("base_model_name_or_path", value, "a path or hub id")),
        };
        // A string is a pattern: the tensors say what it met.
        let target_modules = match given("target_modules") {
            None | Some(Value::String(_)) => Vec::new(),
            Some(value) => serde_json::from_value(value.clone())
                .map_err(|_| wrong("target_modules", value, "a list of names"))?,
        };
        Ok(Self { dir: dir.to_path_buf(), config_path: path, base, rank, alpha, target_modules })
    }

    /// The base with this adapter's updates, unmerged.
    ///
    /// # Errors
    /// Tensors that are missing, of another shape, or no updates of the attention's projections.
    pub fn put_on(&self, base: Checkpoint) -> Result<Checkpoint> {
        let path = self.dir.join(ADAPTER_WEIGHTS);
        if !path.exists() {
            return Err(ModelError::NotFound {
                what: format!("{} has no {ADAPTER_WEIGHTS}", self.dir.display()),
                hint: "only safetensors adapters are read: save it again with PEFT's safe_serialization".into(),
            });
        }
        let stored = Weights::from_safetensors(std::slice::from_ref(&path))?;
        let gate = base.still.as_ref().is_some_and(|still| still.gate);
        let targets = self.targets(&path, &stored, &base.config, gate)?;
        let mut tensors = HashMap::new();
        for stored_name in stored.names() {
            let Some(name) = learned_names::from_peft(&stored_name) else { continue };
            let shape = stored.shape(&stored_name).unwrap_or_default();
            let tensor = stored.get(&stored_name, &shape, DType::F32, &Device::Cpu)?;
            tensors.insert(name, tensor);
        }
        let weights = base.weights.overlaid(Weights::from_tensors(tensors));
        let mut identity = base.base;
        identity.files.push(path);
        let lora = LoraConfig { rank: self.rank, alpha: self.alpha, targets };
        Ok(Checkpoint { weights, lora: Some(lora), base: identity, ..base })
    }

    /// The projections that have updates, all of them in every layer and of the right shapes.
    fn targets(
        &self,
        path: &Path,
        stored: &Weights,
        model: &ModelConfig,
        gate: bool,
    ) -> Result<Vec<LoraTarget>> {
        let broken = |reason: String| ModelError::Corrupt {
            path: path.to_path_buf(),
            reason,
            hint: "the adapter does not belong to its configuration or its base".into(),
        };
        let mut shapes = BTreeMap::new();
        for stored_name in stored.names() {
            let name = learned_names::from_peft(&stored_name);
            let Some(name) = name.filter(|name| parts(name).is_some()) else {
                return Err(ModelError::Unsupported {
                    what: format!("tensor {stored_name} of a PEFT adapter"),
                    found_in: Some(path.to_path_buf()),
                    hint: "supported: updates of self_attn's q_proj, k_proj, v_proj, o_proj and g_proj; merge another \
                           adapter into its base with PEFT's merge_and_unload"
                        .into(),
                });
            };
            let shape = stored.shape(&stored_name).unwrap_or_default();
            if shapes.insert(name, shape).is_some() {
                return Err(broken(format!("{stored_name} is there under two names")));
            }
        }
        let is_target = |target: &LoraTarget| {
            shapes.keys().any(|name| parts(name).is_some_and(|(_, found)| found == *target))
        };
        let targets: Vec<_> = LoraTarget::WITH_GATE.into_iter().filter(is_target).collect();
        if targets.is_empty() {
            return Err(broken("the adapter is empty".into()));
        }
        if targets.contains(&LoraTarget::G) && !gate {
            return Err(broken("updates of g_proj, but the base has no g_proj".into()));
        }
        for module in &self.target_modules {
            let means = |target: &LoraTarget| {
                let full_name = format!("model.layers.0.self_attn.{}", target.name());
                full_name == *module || full_name.ends_with(&format!(".{module}"))
            };
            if !targets.iter().any(means) {
                return Err(broken(format!("no update of {module}, which target_modules names")));
            }
        }
        for layer in 0..model.num_hidden_layers {
            for &target in &targets {
                let (out, inner) = target.shape(model);
                for (matrix, expected) in [("A", [self.rank, inner]), ("B", [out, self.rank])] {
                    let stem = format!("model.layers.{layer}.self_attn.{}", target.name());
                    let name = format!("{stem}.lora_{matrix}.weight");
                    let stored_name = learned_names::to_peft(&name);
                    match shapes.remove(&name) {
                        None => return Err(broken(format!("tensor {stored_name} is missing"))),
                        Some(shape) if shape != expected => {
                            return Err(broken(format!(
                                "tensor {stored_name} has shape {shape:?}, its rank and base need {expected:?}"
                            )));
                        }
                        Some(_) => {}
                    }
                }
            }
        }
        match shapes.keys().next() {
            None => Ok(targets),
            Some(name) => Err(broken(format!(
                "tensor {}, but the base has {} layers",
                learned_names::to_peft(name),
                model.num_hidden_layers
            ))),
        }
    }
}

/// Layer and projection of an update's matrix.
fn parts(name: &str) -> Option<(usize, LoraTarget)> {
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once(".self_attn.")?;
    let projection =
        rest.strip_suffix(".lora_A.weight").or_else(|| rest.strip_suffix(".lora_B.weight"))?;
    let target = LoraTarget::WITH_GATE.into_iter().find(|target| target.name() == projection)?;
    Some((layer.parse().ok()?, target))
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(values) => values.is_empty(),
        Value::Object(values) => values.is_empty(),
        _ => false,
    }
}
