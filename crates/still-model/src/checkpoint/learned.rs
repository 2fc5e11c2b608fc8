//! What a student has learned, as checkpoints have it.

use candle_core::{DType, Device, Tensor};
use still_attention::StillConfig;

use super::{Weights, learned_names};
use crate::config::ModelConfig;
use crate::error::Result;
use crate::student::{FeatureInit, LoraConfig, Student};

impl Student {
    /// Every learned tensor by the name it has in a checkpoint: feature maps split by head and transposed,
    /// as official STILL checkpoints have them.
    ///
    /// # Errors
    /// An error of the tensor library.
    pub fn checkpoint_tensors(&self) -> Result<Vec<(String, Tensor)>> {
        let mut all = Vec::new();
        self.map_tensors(|name, tensor| {
            if learned_names::is_by_head(name) {
                for head in 0..tensor.dim(0)? {
                    let weight = tensor.get(head)?.t()?.contiguous()?;
                    all.push((learned_names::to_checkpoint(name, head), weight));
                }
            } else {
                all.push((learned_names::to_checkpoint(name, 0), tensor.clone()));
            }
            Ok(tensor.clone())
        })?;
        Ok(all)
    }

    /// Reads what [`Student::checkpoint_tensors`] names.
    ///
    /// # Errors
    /// A missing tensor or one of another shape.
    pub fn from_weights(
        config: StillConfig,
        lora: Option<LoraConfig>,
        model: &ModelConfig,
        weights: &Weights,
    ) -> Result<Self> {
        check_shapes(&config, lora.as_ref(), model, weights)?;
        let init = if config.feature_dim == model.head_dim {
            FeatureInit::Identity
        } else {
            FeatureInit::Normal
        };
        let mut student = Self::init(config, model, init, 0)?;
        if let Some(lora) = lora {
            student.add_lora(model, lora, 0)?;
        }
        let device = Device::Cpu;
        let get = |name: &str, shape: &[usize]| weights.get(name, shape, DType::F32, &device);
        student.map_tensors(|name, tensor| {
            let stored = |head| learned_names::to_checkpoint(name, head);
            if !learned_names::is_by_head(name) {
                return get(&stored(0), tensor.dims());
            }
            let (heads, d, f) = tensor.dims3()?;
            let map = |head| Ok(get(&stored(head), &[f, d])?.t()?.contiguous()?);
            Ok(Tensor::stack(&(0..heads).map(map).collect::<Result<Vec<_>>>()?, 0)?)
        })
    }
}

/// An error if the first hybrid layer's tensors are not of the sizes that the configuration says: before anything of those sizes is
/// made.
fn check_shapes(
    config: &StillConfig,
    lora: Option<&LoraConfig>,
    model: &ModelConfig,
    weights: &Weights,
) -> Result<()> {
    model.check_still(config)?;
    let first = model.full_layers().next().unwrap_or_default();
    let layer = format!("model.layers.{first}.self_attn");
    let shape = [config.feature_dim, model.head_dim];
    for map in ["feature_map_q", "feature_map_k"] {
        weights.check_shape(&format!("{layer}.{map}.mlp.linears.0.weight"), &shape)?;
    }
    let Some(lora) = lora else { return Ok(()) };
    lora.validate()?;
    for &target in &lora.targets {
        let ((out, inner), name) = (target.shape(model), target.name());
        weights.check_shape(&format!("{layer}.{name}.lora_A.weight"), &[lora.rank, inner])?;
        weights.check_shape(&format!("{layer}.{name}.lora_B.weight"), &[out, lora.rank])?;
    }
    Ok(())
}
