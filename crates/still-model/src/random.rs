//! Small random models, for tests and examples.

use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use tokenizers::models::bpe::BPE;

use crate::base::BaseIdentity;
use crate::chat::ChatTemplate;
use crate::checkpoint::{WeightFormat, Weights, shapes};
use crate::config::{Architecture, ModelConfig, RopeScaling, SlidingAttention};
use crate::decoder::Decoder;
use crate::error::{ModelError, Result};
use crate::executor::check_dtype;
use crate::model::Model;
use crate::student::{FeatureInit, Student};
use crate::tensor_file::{Entry, write_tensors};
use crate::tokenizer::Tokenizer;
use still_attention::StillConfig;
use still_compute::random::normal;

/// A Llama configuration of two layers, 4 query heads and 2 KV heads, over the 256 bytes and two special tokens.
pub fn tiny_config() -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Llama,
        hidden_size: 32,
        intermediate_size: 48,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 8,
        vocab_size: 258,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_scaling: None,
        partial_rotary_factor: 1.0,
        query_pre_attn_scalar: None,
        sliding: None,
        max_position_embeddings: 512,
        tie_word_embeddings: true,
        attention_bias: false,
        attention_output_bias: false,
        mlp_bias: false,
        bos_token_id: None,
        eos_token_ids: vec![257],
    }
}

/// [`tiny_config`] with what the CUDA kernels take: heads of 64 channels, three query heads a KV head. No token ends a text.
pub fn tiny_kernel_config() -> ModelConfig {
    ModelConfig {
        hidden_size: 192,
        intermediate_size: 256,
        num_attention_heads: 6,
        num_key_value_heads: 2,
        head_dim: 64,
        max_position_embeddings: 16_384,
        eos_token_ids: Vec::new(),
        ..tiny_config()
    }
}

/// A student of a model of two layers with two KV heads, in chunks of 64, whose heads keep nothing, little and all; `change` comes
/// before it is made.
///
/// # Errors
/// A configuration that does not fit the model.
pub fn tiny_student(model: &ModelConfig, change: impl FnOnce(&mut StillConfig)) -> Result<Student> {
    let mut still = StillConfig::uniform(model.num_hidden_layers, model.geometry(), 64, 4);
    still.budgets = vec![vec![4, 0], vec![64, 7]];
    change(&mut still);
    Student::init(still, model, FeatureInit::Normal, 3)
}

/// A Gemma 3 configuration of five layers, two with full attention and three with a window of 12 tokens.
pub fn tiny_sliding_config() -> ModelConfig {
    let layers = vec![true, false, true, true, false];
    ModelConfig {
        architecture: Architecture::Gemma3,
        num_hidden_layers: layers.len(),
        rope_theta: 1e6,
        rope_scaling: Some(RopeScaling::Linear { factor: 4.0 }),
        sliding: Some(SlidingAttention { window: 12, layers, rope_theta: 10_000.0 }),
        ..tiny_config()
    }
}

/// A model with normal weights and a byte-level tokenizer (`<|im_start|>` and `<|im_end|>` added).
///
/// # Errors
/// A configuration that contradicts itself.
pub fn random_model(config: ModelConfig, seed: u64) -> Result<Model> {
    config.validate()?;
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let weights = random_weights(&config, &mut rng)?;
    let decoder = Decoder::load(&config, &weights, &Device::Cpu, DType::F32)?;
    Ok(Model {
        decoder: Arc::new(decoder),
        student: None,
        tokenizer: byte_tokenizer()?,
        base: BaseIdentity { source: format!("random model {seed}"), ..BaseIdentity::default() },
    })
}

/// A model of known sizes, for what depends on nothing else: SmolLM2-135M, Llama-3.2-1B or Llama-3.1-8B.
///
/// # Errors
/// Another name.
pub fn shape(name: &str) -> Result<ModelConfig> {
    let (e, i, layers, heads, kv_heads, d, vocab, theta, tied) = match name {
        "smollm2-135m" => (576, 1536, 30, 9, 3, 64, 49_152, 1e5, true),
        "llama-3.2-1b" => (2048, 8192, 16, 32, 8, 64, 128_256, 5e5, true),
        "llama-3.1-8b" => (4096, 14_336, 32, 32, 8, 128, 128_256, 5e5, false),
        _ => {
            return Err(ModelError::NotFound {
                what: format!("no shape is called {name:?}"),
                hint: "use smollm2-135m, llama-3.2-1b or llama-3.1-8b".into(),
            });
        }
    };
    Ok(ModelConfig {
        hidden_size: e,
        intermediate_size: i,
        num_hidden_layers: layers,
        num_attention_heads: heads,
        num_key_value_heads: kv_heads,
        head_dim: d,
        vocab_size: vocab,
        rope_theta: theta,
        max_position_embeddings: 131_072,
        tie_word_embeddings: tied,
        ..tiny_config()
    })
}

/// [`random_model`] made where it is to be: its weights are the device's own random numbers, other ones on other devices, of `dtype`
/// and then in the form that is asked for.
///
/// # Errors
/// A configuration that contradicts itself; a dtype or a form that the device has no kernels for; too little memory there.
pub fn random_model_on(
    config: ModelConfig,
    device: &Device,
    dtype: DType,
    format: WeightFormat,
) -> Result<Model> {
    config.validate()?;
    check_dtype(device, dtype)?;
    let tensors = shapes(&config).into_iter().map(|(name, shape)| {
        let deviation = match shape[..] {
            [_, inner] => (inner as f64).powf(-0.5),
            _ => 0.1,
        };
        let mean = if name.ends_with("norm.weight") { norm_mean(&config) } else { 0.0 };
        let tensor = Tensor::randn(mean as f32, deviation as f32, shape, device)?;
        Ok((name, tensor.to_dtype(dtype)?))
    });
    let weights = Weights::from_tensors(tensors.collect::<Result<_>>()?);
    Ok(Model {
        decoder: Arc::new(Decoder::load_in(&config, &weights, device, dtype, format)?),
        student: None,
        tokenizer: byte_tokenizer()?,
        base: BaseIdentity { source: "random model".into(), ..BaseIdentity::default() },
    })
}

/// Writes a base model, as a Hugging Face directory with weights of `dtype`: something to linearize.
///
/// # Errors
/// A directory that cannot be written.
pub fn save_base(dir: &Path, model: &Model, dtype: DType) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(ModelError::write(dir))?;
    let mut entries = Vec::new();
    model.decoder.visit_tensors(|name, tensor| {
        entries.push(Entry::of(name.to_owned(), tensor.to_dtype(dtype)?));
        Ok(())
    })?;
    write_tensors(&dir.join("model.safetensors"), entries)?;
    model.tokenizer.save(dir)?;
    let path = dir.join("config.json");
    let text = format!("{:#}\n", model.config().to_hf_json());
    std::fs::write(&path, text).map_err(ModelError::write(&path))
}

/// Norms multiply by about one.
fn norm_mean(config: &ModelConfig) -> f64 {
    1.0 - config.architecture.family().norm_offset
}

fn random_weights(config: &ModelConfig, rng: &mut ChaCha8Rng) -> Result<Weights> {
    let tensors = shapes(config)
        .into_iter()
        .map(|(name, shape)| {
            let tensor = match shape[..] {
                // Norm weights near one, matrices of unit gain.
                [size] if name.ends_with("norm.weight") => {
                    (normal(rng, &[size], 0.1)? + norm_mean(config))?
                }
                [size] => normal(rng, &[size], 0.1)?,
                _ => normal(rng, &shape, (shape[1] as f64).powf(-0.5))?,
            };
            Ok((name, tensor))
        })
        .collect::<Result<_>>()?;
    Ok(Weights::from_tensors(tensors))
}

/// One token a byte, and the two tokens of a chat.
fn byte_tokenizer() -> Result<Tokenizer> {
    let failed = |error: tokenizers::Error| ModelError::Tokenizer(error.to_string());
    let mut alphabet: Vec<char> =
        tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    let vocab: tokenizers::models::bpe::Vocab =
        alphabet.iter().enumerate().map(|(id, c)| (c.to_string(), id as u32)).collect();
    let bpe = BPE::builder().vocab_and_merges(vocab, Vec::new()).build().map_err(failed)?;
    let mut inner = tokenizers::Tokenizer::new(bpe);
    inner.with_pre_tokenizer(Some(tokenizers::pre_tokenizers::byte_level::ByteLevel::new(
        false, true, false,
    )));
    inner.with_decoder(Some(tokenizers::decoders::byte_level::ByteLevel::default()));
    let special = |text: &str| tokenizers::AddedToken::from(text, true).normalized(false);
    inner.add_special_tokens([special("<|im_start|>"), special("<|im_end|>")]).map_err(failed)?;
    let template = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] \
                    + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}\
                    {{ '<|im_start|>assistant\n' }}{% endif %}";
    let template = ChatTemplate::new(template.into(), None, Some("<|im_end|>".into()));
    Ok(Tokenizer::new(inner, Some(template)))
}
