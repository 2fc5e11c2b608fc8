//! Every family against Hugging Face's implementation (`data/families.py`), from safetensors and from GGUF; what its
//! configuration may say; gradients through the norms of queries and keys.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor, Var};
use serde_json::json;
use still_attention::{RowDtype, StillConfig};
use still_model::random::{random_model, save_base, tiny_config, tiny_sliding_config};
use still_model::{
    Architecture, Checkpoint, DecoderLayer, ExportKind, FeatureInit, GgufFormat, Linear, Lora,
    LoraConfig, LoraLayer, LoraTarget, Model, ModelConfig, ModelError, NormWeight, RopeScaling,
    Rotation, Student, StudentLayer, Weight, export_gguf, names, save_student,
};
use still_testing::{relative_rms, uniform};

const FAMILIES: [&str; 12] = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "llama_biased",
    "qwen3_biased",
    "llama_sentencepiece",
    "phi3",
    "phi3_plain",
    "gemma3_text",
    "gemma3_text_scaled",
    "gemma",
];

/// What the frequencies of the family "llama" are divided by, in a GGUF file as llama.cpp's converter writes it.
const ROPE_FREQS: [f32; 4] = [1.0, 2.166_375_2, 8.0, 8.0];

fn data(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/families").join(family)
}

/// A family's model; the logits do not depend on the tokenizer, so any will do.
fn model(family: &str) -> Model {
    let dir = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(data(family).join(file), dir.path().join(file)).unwrap();
    }
    random_model(tiny_config(), 0).unwrap().tokenizer.save(dir.path()).unwrap();
    Model::load(dir.path().to_str().unwrap()).unwrap()
}

/// Token ids and the logits that Hugging Face has for them.
fn expected(family: &str) -> (Vec<u32>, Vec<Vec<f32>>) {
    let path = data(family).join("expected.safetensors");
    let tensors = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    let ids = tensors["ids"].to_vec1::<i64>().unwrap();
    (ids.into_iter().map(|id| id as u32).collect(), tensors["logits"].to_vec2().unwrap())
}

/// Logits of a sequence that is fed in parts of `tokens` tokens.
fn logits(model: &Model, ids: &[u32], tokens: usize) -> Vec<Vec<f32>> {
    let mut cache = model.new_cache(1, RowDtype::F32).unwrap();
    let feed = |ids: &[u32]| {
        let ids = Tensor::new(ids, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        let hidden = model.forward(&ids, &mut cache, None).unwrap().squeeze(0).unwrap();
        model.logits(&hidden).unwrap().to_vec2::<f32>().unwrap()
    };
    ids.chunks(tokens).flat_map(feed).collect()
}

#[test]
fn logits_equal_hugging_faces() {
    for family in FAMILIES {
        let (model, (ids, expected)) = (model(family), expected(family));
        assert!(family.starts_with(model.config().architecture.model_type()));
        // At once, in parts, token by token.
        for tokens in [ids.len(), 7, 1] {
            let error = relative_rms(&logits(&model, &ids, tokens), &expected);
            assert!(error <= 1e-5, "{family}, {tokens} tokens a call: relative RMS {error:e}");
        }
        // In lanes.
        let hidden = Mutex::new(Vec::new());
        let mut cache = model.new_cache(1, RowDtype::F32).unwrap();
        let read = model.read(&ids, &mut cache, |_, block| {
            hidden.lock().unwrap().push(block);
            Ok::<_, ModelError>(())
        });
        read.unwrap();
        let hidden = hidden.into_inner().unwrap();
        let got = model.logits(&Tensor::cat(&hidden, 0).unwrap()).unwrap().to_vec2().unwrap();
        let error = relative_rms(&got, &expected);
        assert!(error <= 1e-5, "{family}, read: relative RMS {error:e}");
    }
}

/// A student that keeps every token of the layers that it replaces.
fn full_student(config: &ModelConfig) -> Student {
    let still = StillConfig::uniform(config.num_hidden_layers, config.geometry(), 8, 8);
    Student::init(config.fit_still(still), config, FeatureInit::Identity, 0).unwrap()
}

#[test]
fn a_student_of_full_budget_is_each_familys_teacher() {
    for family in FAMILIES {
        let (model, (ids, expected)) = (model(family), expected(family));
        let config = model.config();
        let student = model.with_student(full_student(config));
        for tokens in [ids.len(), 7, 1] {
            let error = relative_rms(&logits(&student, &ids, tokens), &expected);
            assert!(error <= 1e-5, "{family}, {tokens} tokens a call: relative RMS {error:e}");
        }
    }
}

/// Half rotation's rows, of a matrix or a bias, in the interleaved order of Llama GGUF files.
fn interleaved(tensor: &Tensor, heads: usize) -> Tensor {
    let rows = tensor.dims()[0];
    let halves = tensor.reshape((heads, 2, rows / heads / 2, ())).unwrap();
    halves.transpose(1, 2).unwrap().contiguous().unwrap().reshape(tensor.shape()).unwrap()
}

/// `data/tokenizers/NAME.json`.
fn vocabulary_fixture(name: &str) -> serde_json::Value {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/tokenizers");
    serde_json::from_str(&std::fs::read_to_string(dir.join(format!("{name}.json"))).unwrap())
        .unwrap()
}

/// Metadata of a family's tokenizer: Llama 2's own for `llama_sentencepiece`, single characters for all others.
fn vocabulary(family: &str, size: usize) -> Vec<(String, Value)> {
    let texts = |all: Vec<String>| Value::Array(all.into_iter().map(Value::String).collect());
    let entries = if family == "llama_sentencepiece" {
        let fixture = vocabulary_fixture("llama-2");
        let list = |key: &str| fixture[key].as_array().unwrap().iter();
        let id = |key: &str| Value::U32(fixture[key].as_u64().unwrap() as u32);
        vec![
            ("model", Value::String("llama".into())),
            ("tokens", texts(list("tokens").map(|t| t.as_str().unwrap().into()).collect())),
            (
                "scores",
                Value::Array(
                    list("scores").map(|s| Value::F32(s.as_f64().unwrap() as f32)).collect(),
                ),
            ),
            (
                "token_type",
                Value::Array(
                    list("kinds").map(|k| Value::I32(k.as_i64().unwrap() as i32)).collect(),
                ),
            ),
            ("bos_token_id", id("bos")),
            ("eos_token_id", id("eos")),
            ("unknown_token_id", id("unk")),
        ]
    } else {
        let characters = (1..size).map(|id| char::from(b'!' + id as u8).to_string());
        vec![
            ("model", Value::String("gpt2".into())),
            ("pre", Value::String("qwen2".into())),
            ("tokens", texts(std::iter::once("<s>".to_owned()).chain(characters).collect())),
            ("token_type", Value::Array(vec![Value::I32(1); size])),
            ("merges", Value::Array(Vec::new())),
        ]
    };
    entries.into_iter().map(|(key, value)| (format!("tokenizer.ggml.{key}"), value)).collect()
}

/// One file as Llama 2's are: from text to logits what `transformers` has.
#[test]
fn a_sentencepiece_gguf_gives_the_logits_of_a_text() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let family = "llama_sentencepiece";
    write_gguf(&path, family, "llama", &[]);
    let model = Model::load(path.to_str().unwrap()).unwrap();
    let ids = model.tokenizer.encode("你好，世界。 こんにちは カタカナ", true).unwrap();
    let (expected_ids, expected) = expected(family);
    assert_eq!(ids, expected_ids);
    let error = relative_rms(&logits(&model, &ids, ids.len()), &expected);
    assert!(error <= 1e-5, "relative RMS {error:e}");
}

/// Writes a family's model as llama.cpp would have it, in f32, with `extra` metadata.
fn write_gguf(path: &Path, family: &str, architecture: &str, extra: &[(&str, Value)]) {
    let stored =
        candle_core::safetensors::load(data(family).join("model.safetensors"), &Device::Cpu);
    write_tensors(path, family, architecture, extra, stored.unwrap());
}

/// [`write_gguf`] of some of a family's tensors.
fn write_tensors(
    path: &Path,
    family: &str,
    architecture: &str,
    extra: &[(&str, Value)],
    stored: HashMap<String, Tensor>,
) {
    let config = model(family).config().clone();
    let mut tensors: Vec<(String, QTensor)> = stored
        .into_iter()
        .map(|(name, tensor)| {
            let heads = match architecture {
                "llama" if name.contains("q_proj.") => Some(config.num_attention_heads),
                "llama" if name.contains("k_proj.") => Some(config.num_key_value_heads),
                _ => None,
            };
            let tensor = heads.map_or(tensor.clone(), |heads| interleaved(&tensor, heads));
            let tensor = match architecture.starts_with("gemma") && name.ends_with("norm.weight") {
                true => (tensor + 1.0).unwrap(),
                false => tensor,
            };
            let tensor = QTensor::quantize(&tensor, GgmlDType::F32).unwrap();
            let stored =
                match name.rsplit_once('.').unwrap().0.rsplit_once('.').unwrap_or_default().1 {
                    "qkv_proj" => name
                        .replace("model.layers", "blk")
                        .replace("self_attn.qkv_proj", "attn_qkv"),
                    "gate_up_proj" => {
                        name.replace("model.layers", "blk").replace("mlp.gate_up_proj", "ffn_up")
                    }
                    _ => names::to_gguf(config.architecture, &name).unwrap(),
                };
            (stored, tensor)
        })
        .collect();
    if let Some(RopeScaling::LongRope { short_factor, long_factor, .. }) = &config.rope_scaling {
        for (name, factors) in [("short", short_factor), ("long", long_factor)] {
            let factors: Vec<f32> = factors.iter().map(|&factor| factor as f32).collect();
            let factors = Tensor::new(factors, &Device::Cpu).unwrap();
            let factors = QTensor::quantize(&factors, GgmlDType::F32).unwrap();
            tensors.push((format!("rope_factors_{name}.weight"), factors));
        }
    }
    if family == "llama" {
        let freqs = Tensor::new(&ROPE_FREQS, &Device::Cpu).unwrap();
        let freqs = QTensor::quantize(&freqs, GgmlDType::F32).unwrap();
        tensors.push(("rope_freqs.weight".into(), freqs));
    }
    let of = |key: &str| format!("{architecture}.{key}");
    let number = |n: usize| Value::U32(n as u32);
    let metadata: HashMap<String, Value> = [
        ("general.architecture".into(), Value::String(architecture.into())),
        (of("embedding_length"), number(config.hidden_size)),
        (of("feed_forward_length"), number(config.intermediate_size)),
        (of("block_count"), number(config.num_hidden_layers)),
        (of("attention.head_count"), number(config.num_attention_heads)),
        (of("attention.head_count_kv"), number(config.num_key_value_heads)),
        (of("attention.key_length"), number(config.head_dim)),
        (of("attention.layer_norm_rms_epsilon"), Value::F32(config.rms_norm_eps as f32)),
        (of("rope.freq_base"), Value::F32(config.rope_theta as f32)),
        (of("rope.dimension_count"), number(config.rotary_dim())),
        (of("context_length"), number(config.max_position_embeddings)),
    ]
    .into_iter()
    .chain(vocabulary(family, config.vocab_size))
    .chain(extra.iter().map(|(key, value)| (of(key), value.clone())))
    .collect();
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let mut file = std::fs::File::create(path).unwrap();
    gguf_file::write(&mut file, &metadata, &tensors).unwrap();
}

/// Projections that a file holds as rows of larger matrices, in f32 and in 16 bits; saved, they are projections of their own.
#[test]
fn fused_projections_are_found_by_their_rows() {
    let dir = tempfile::tempdir().unwrap();
    for family in ["phi3", "phi3_plain"] {
        let original = model(family);
        let config = original.config();
        let (ids, expected) = expected(family);
        let still = StillConfig::uniform(config.num_hidden_layers, config.geometry(), 8, 8);
        let student = Student::init(still, config, FeatureInit::Identity, 0).unwrap();
        let student = original.with_student(student);
        let saved = dir.path().join(family);
        save_student(&saved, &student, ExportKind::Full(DType::F32)).unwrap();
        let exported = dir.path().join(format!("{family}.gguf"));
        export_gguf(&exported, &student, GgufFormat::Q8_0).unwrap();
        for (path, bound) in [(saved, 1e-5), (exported, 0.05)] {
            let again = Model::load(path.to_str().unwrap()).unwrap();
            assert_eq!(again.config(), config);
            let error = relative_rms(&logits(&again, &ids, ids.len()), &expected);
            assert!(error <= bound, "{}: relative RMS {error:e}", path.display());
        }

        let narrow = dir.path().join(format!("{family}-bf16"));
        std::fs::create_dir(&narrow).unwrap();
        std::fs::copy(data(family).join("config.json"), narrow.join("config.json")).unwrap();
        original.tokenizer.save(&narrow).unwrap();
        let file = data(family).join("model.safetensors");
        let stored = candle_core::safetensors::load(file, &Device::Cpu).unwrap();
        let stored: HashMap<String, Tensor> = stored
            .into_iter()
            .map(|(name, tensor)| (name, tensor.to_dtype(DType::BF16).unwrap()))
            .collect();
        candle_core::safetensors::save(&stored, narrow.join("model.safetensors")).unwrap();
        let narrow = Model::load(narrow.to_str().unwrap()).unwrap();
        // Rows of 16 values are no whole block.
        let packed = matches!(narrow.decoder.layers[0].k_proj.weight, Weight::Packed(_));
        assert_eq!(packed, config.hidden_size.is_multiple_of(32), "{family}");
        let error = relative_rms(&logits(&narrow, &ids, ids.len()), &expected);
        assert!(error <= 0.02, "{family}, bf16: relative RMS {error:e}");
    }
}

/// One set of factors for a whole run, by the length that sequences are declared to have at most.
#[test]
fn long_rope_is_chosen_once() {
    let scaling = |changes: serde_json::Value| {
        let mut json: serde_json::Value = serde_json::from_str(
            &std::fs::read_to_string(data("phi3").join("config.json")).unwrap(),
        )
        .unwrap();
        json["rope_parameters"]
            .as_object_mut()
            .unwrap()
            .extend(changes.as_object().unwrap().clone());
        ModelConfig::from_hf_json(&json)
    };
    let declared = |config: &ModelConfig| match config.rope_scaling {
        Some(RopeScaling::LongRope { declared_length, .. }) => declared_length,
        ref other => panic!("{other:?}"),
    };
    let config = scaling(json!({})).unwrap();
    assert_eq!((config.rotary_dim(), declared(&config)), (4, 128));
    let short = scaling(json!({ "declared_length": 16 })).unwrap();
    assert_eq!(declared(&short), 16);
    // It is saved, and decides the logits.
    assert_eq!(ModelConfig::from_hf_json(&short.to_hf_json()).unwrap(), short);
    let long = model("phi3");
    let decoder = &*long.decoder;
    let decoder = still_model::Decoder::new(
        short,
        decoder.embed_tokens.clone(),
        decoder.layers.clone(),
        decoder.norm.clone(),
        decoder.lm_head.clone(),
    );
    let short = Model { decoder: decoder.into(), ..long.clone() };
    let (ids, expected) = expected("phi3");
    assert!(relative_rms(&logits(&short, &ids, ids.len()), &expected) > 1e-2);
    for (wrong, why) in [
        (json!({ "long_factor": [1.0] }), "1 factors for the 2 frequencies"),
        (json!({ "long_factor": null }), "long_factor"),
        (json!({ "partial_rotary_factor": 0.4 }), "3 channels"),
        (json!({ "short_mscale": 1.1 }), "short_mscale"),
    ] {
        let error = scaling(wrong).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    }
}

#[test]
fn gguf_gives_the_same_logits() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let linear = [
        ("rope.scaling.type", Value::String("linear".into())),
        ("rope.scaling.factor", Value::F32(2.0)),
    ];
    // The keys of llama.cpp; what a file leaves out is as in its code.
    let gemma = [
        ("attention.sliding_window", Value::U32(8)),
        (
            "attention.sliding_window_pattern",
            Value::Array([true, true, false, true, true, false].map(Value::Bool).into()),
        ),
        ("rope.freq_base_swa", Value::F32(5000.0)),
        ("rope.scaling.type", Value::String("linear".into())),
        ("rope.scaling.factor", Value::F32(8.0)),
    ];
    // llama.cpp knows the scale of queries by the number of layers alone: no file can say it of a small model.
    for family in FAMILIES.into_iter().filter(|&family| family != "gemma3_text_scaled") {
        let architecture = match family {
            "mistral" => "llama",
            _ => family.split('_').next().unwrap(),
        };
        let original = [("rope.scaling.original_context_length", Value::U32(16))];
        let extra = match family {
            "mistral" => linear.as_slice(),
            "phi3" => &original,
            "gemma3_text" => &gemma,
            _ => &[],
        };
        write_gguf(&path, family, architecture, extra);
        let loaded = Model::load(path.to_str().unwrap()).unwrap();
        let config = loaded.config();
        assert_eq!(Architecture::from_gguf(architecture).unwrap(), config.architecture);
        let original = model(family);
        let mut as_original =
            ModelConfig { architecture: original.config().architecture, ..config.clone() };
        if family == "llama" {
            let factors = ROPE_FREQS.map(f64::from).to_vec();
            assert_eq!(config.rope_scaling, Some(RopeScaling::Factors(factors)));
            as_original.rope_scaling = original.config().rope_scaling.clone();
        }
        assert_eq!(&as_original, original.config());
        let (ids, expected) = expected(family);
        for tokens in [ids.len(), 1] {
            let error = relative_rms(&logits(&loaded, &ids, tokens), &expected);
            assert!(error <= 1e-5, "{family}, {tokens} tokens a call: relative RMS {error:e}");
        }
        // A student saved in either form is of the same base.
        let student = loaded.with_student(full_student(config));
        let saved = dir.path().join(format!("{family}-student"));
        save_student(&saved, &student, ExportKind::Full(DType::F32)).unwrap();
        let again = Model::load(saved.to_str().unwrap()).unwrap();
        assert_eq!(again.config(), config);
        let error = relative_rms(&logits(&again, &ids, ids.len()), &expected);
        assert!(error <= 1e-5, "{family}, saved: relative RMS {error:e}");
        let exported = dir.path().join("student.gguf");
        export_gguf(&exported, &student, GgufFormat::Q8_0).unwrap();
        let again = Model::load(exported.to_str().unwrap()).unwrap();
        assert_eq!(again.config(), config);
        let error = relative_rms(&logits(&again, &ids, ids.len()), &expected);
        assert!(error <= 0.05, "{family}, exported: relative RMS {error:e}");
    }
    // A window shorter than the context is refused, one that is as long is none.
    let window = |tokens: u32| {
        let mut extra = linear.to_vec();
        extra.push(("attention.sliding_window", Value::U32(tokens)));
        extra
    };
    write_gguf(&path, "mistral", "llama", &window(128));
    Checkpoint::open(path.to_str().unwrap()).unwrap();
    write_gguf(&path, "mistral", "llama", &window(64));
    let error = Checkpoint::open(path.to_str().unwrap()).unwrap_err();
    assert!(error.to_string().contains("llama.attention.sliding_window"), "{error}");
    assert!(error.to_string().contains("model.gguf") && error.hint().is_some(), "{error}");
    // A Qwen3 without its norms is broken, not another model.
    write_gguf(&path, "qwen2", "qwen3", &[]);
    let error = Model::load(path.to_str().unwrap()).unwrap_err();
    assert!(error.to_string().contains("self_attn.k_norm.weight is missing"), "{error}");
}

/// GGUF files may have biases on q, k and v without one on o, or the other way round; Hugging Face's configuration cannot say so.
#[test]
fn biases_come_in_parts_too() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let family = "llama_biased";
    let file = data(family).join("model.safetensors");
    let stored = candle_core::safetensors::load(file, &Device::Cpu).unwrap();
    let whole = model(family);
    let (ids, expected) = expected(family);
    for (kept, attention, output, mlp) in [
        (["q_proj", "k_proj", "v_proj"].as_slice(), true, false, false),
        (&["o_proj"], false, true, false),
        (&["gate_proj", "up_proj", "down_proj"], false, false, true),
        (&[], false, false, false),
    ] {
        let keep =
            |name: &str| !name.ends_with(".bias") || kept.iter().any(|kept| name.contains(kept));
        let some = stored.clone().into_iter().filter(|(name, _)| keep(name)).collect();
        write_tensors(&path, family, "llama", &[], some);
        let loaded = Model::load(path.to_str().unwrap()).unwrap();
        let config = loaded.config();
        let biases = (config.attention_bias, config.attention_output_bias, config.mlp_bias);
        assert_eq!(biases, (attention, output, mlp));
        assert_eq!(&ModelConfig::from_hf_json(&config.to_hf_json()).unwrap(), config);

        let mut decoder = (*whole.decoder).clone();
        for layer in &mut decoder.layers {
            let DecoderLayer { q_proj, k_proj, v_proj, o_proj, mlp: wide, .. } = layer;
            for (linear, keep) in [
                (q_proj, attention),
                (k_proj, attention),
                (v_proj, attention),
                (o_proj, output),
                (&mut wide.gate, mlp),
                (&mut wide.up, mlp),
                (&mut wide.down, mlp),
            ] {
                assert!(linear.bias.is_some());
                linear.bias = linear.bias.take().filter(|_| keep);
            }
        }
        let same = Model { decoder: decoder.into(), ..whole.clone() };
        for tokens in [ids.len(), 1] {
            let got = logits(&loaded, &ids, tokens);
            assert!(relative_rms(&got, &logits(&same, &ids, tokens)) <= 1e-5, "{kept:?}");
            assert!(relative_rms(&got, &expected) > 1e-2, "the others count");
        }
    }
    // A bias without those that belong with it.
    let some = stored.into_iter().filter(|(name, _)| !name.contains("layers.1.mlp.up_proj.bias"));
    write_tensors(&path, family, "llama", &[], some.collect());
    let error = Model::load(path.to_str().unwrap()).unwrap_err();
    assert!(error.to_string().contains("blk.1.ffn_up.bias"), "{error}");
}

/// As llama.cpp reads them: a factor without a type is linear, one for all adds to one for each.
#[test]
fn rope_scaling_in_gguf() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let (ids, expected) = expected("mistral");
    let float = |key, factor| (key, Value::F32(factor));
    let kind = |kind: &str| ("rope.scaling.type", Value::String(kind.into()));
    let read = |family: &str, extra: &[(&str, Value)]| {
        write_gguf(&path, family, "llama", extra);
        Model::load(path.to_str().unwrap())
    };
    for extra in [
        vec![float("rope.scaling.factor", 2.0)],
        vec![float("rope.scale_linear", 2.0)],
        vec![float("rope.scaling.factor", 2.0), float("rope.scale_linear", 4.0)],
        vec![
            kind("linear"),
            float("rope.scaling.factor", 2.0),
            float("rope.scaling.attn_factor", 1.0),
        ],
    ] {
        let loaded = read("mistral", &extra).unwrap();
        assert!(relative_rms(&logits(&loaded, &ids, ids.len()), &expected) <= 1e-5, "{extra:?}");
    }
    for extra in [
        vec![],
        vec![kind("none"), float("rope.scaling.factor", 2.0)],
        vec![float("rope.scaling.factor", 0.0)],
    ] {
        assert_eq!(read("mistral", &extra).unwrap().config().rope_scaling, None, "{extra:?}");
    }
    let both = read("llama", &[float("rope.scaling.factor", 2.0)]).unwrap();
    let doubled = ROPE_FREQS.map(|factor| 2.0 * f64::from(factor)).to_vec();
    assert_eq!(both.config().rope_scaling, Some(RopeScaling::Factors(doubled)));
    let error = read("mistral", &[kind("yarn"), float("rope.scaling.factor", 2.0)]).unwrap_err();
    assert!(error.to_string().contains("\"yarn\""), "{error}");
}

fn read_config(family: &str, changes: serde_json::Value) -> still_model::Result<ModelConfig> {
    let text = std::fs::read_to_string(data(family).join("config.json")).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    for (key, value) in changes.as_object().unwrap() {
        json[key] = value.clone();
    }
    ModelConfig::from_hf_json(&json)
}

#[test]
fn a_sliding_window_is_refused_unless_it_holds_the_context() {
    let refused = |family: &str, changes: serde_json::Value, key: &str| {
        let error = read_config(family, changes).unwrap_err();
        assert!(matches!(error, ModelError::Unsupported { .. }), "{error}");
        assert!(error.to_string().contains(&format!("\"{key}\"")), "{error}");
        assert!(error.hint().unwrap().contains("without a window"), "{error}");
    };
    let read = |family: &str, changes| read_config(family, changes).unwrap();

    let plain = read("mistral", json!({ "sliding_window": null }));
    assert_eq!(plain, read("mistral", json!({})));
    // Saved and read back, it still has none: a Mistral that says nothing has one of 4096.
    assert_eq!(ModelConfig::from_hf_json(&plain.to_hf_json()).unwrap(), plain);
    refused("mistral", json!({ "sliding_window": 127 }), "sliding_window");
    let mut silent = plain.to_hf_json();
    silent["max_position_embeddings"] = 32768.into();
    silent.as_object_mut().unwrap().remove("sliding_window");
    let error = ModelConfig::from_hf_json(&silent).unwrap_err().to_string();
    assert!(error.contains("4096 tokens") && error.contains("32768"), "{error}");

    for family in ["qwen2", "qwen3"] {
        let on = |more: serde_json::Value| {
            let mut json = json!({
                "use_sliding_window": true, "sliding_window": 16, "max_window_layers": 1, "layer_types": null,
            });
            json.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            json
        };
        refused(family, on(json!({})), "use_sliding_window");
        let types = json!({ "layer_types": ["full_attention", "sliding_attention"] });
        refused(family, on(types), "layer_types");
        for harmless in [
            json!({ "use_sliding_window": false }),
            json!({ "max_window_layers": 2 }),
            json!({ "sliding_window": 128 }),
            json!({ "sliding_window": null }),
        ] {
            assert_eq!(read(family, on(harmless)), read(family, json!({})));
        }
    }
    assert!(read_config("llama", json!({ "sliding_window": 16 })).is_ok());
}

#[test]
fn what_is_not_supported_is_named_with_what_is() {
    let error = read_config("llama", json!({ "model_type": "mamba" })).unwrap_err();
    assert!(error.to_string().contains("\"mamba\""), "{error}");
    assert_eq!(
        error.hint().unwrap(),
        "supported architectures: llama, mistral, qwen2, qwen3, phi3, gemma3_text, gemma"
    );
    // llama.cpp calls a Mistral "llama", so nobody knows how a "mistral" orders its rows.
    let error = Architecture::from_gguf("mistral").unwrap_err();
    assert!(
        error.hint().unwrap().contains("llama (Mistral too), qwen2, qwen3, phi3, gemma3, gemma"),
        "{error}"
    );
    for (family, key) in [
        ("mistral", "attention_bias"),
        ("mistral", "mlp_bias"),
        ("qwen2", "mlp_bias"),
        ("qwen3", "mlp_bias"),
    ] {
        let error = read_config(family, json!({ key: true })).unwrap_err();
        assert!(error.to_string().contains(&format!("\"{key}\"")), "{error}");
    }
    let mut json = read_config("qwen3", json!({})).unwrap().to_hf_json();
    json.as_object_mut().unwrap().remove("head_dim");
    assert_eq!(ModelConfig::from_hf_json(&json).unwrap().head_dim, 128);
}

/// A layer's attention inputs in f64, where differences are exact enough to check gradients.
fn in_f64(layer: &DecoderLayer) -> DecoderLayer {
    let wide = |tensor: &Tensor| tensor.to_dtype(DType::F64).unwrap();
    let norm = |norm: &NormWeight| NormWeight::from(wide(&norm.scale));
    let linear = |linear: &Linear| Linear {
        weight: wide(&linear.weight.to_tensor().unwrap()).into(),
        bias: linear.bias.as_ref().map(wide),
    };
    DecoderLayer {
        input_layernorm: norm(&layer.input_layernorm),
        q_proj: linear(&layer.q_proj),
        k_proj: linear(&layer.k_proj),
        v_proj: linear(&layer.v_proj),
        q_norm: layer.q_norm.as_ref().map(norm),
        k_norm: layer.k_norm.as_ref().map(norm),
        ..layer.clone()
    }
}

#[test]
fn gradients_of_updates_flow_through_the_heads_norms() {
    let model = model("qwen3");
    let config = model.config();
    let (e, d) = (config.hidden_size, config.head_dim);
    let layer = in_f64(&model.decoder.layers[0]);
    let still = StillConfig::uniform(config.num_hidden_layers, config.geometry(), 8, 2);
    let student = Student::init(still, config, FeatureInit::Identity, 0).unwrap().layers.remove(0);
    let rotation: Rotation = model.decoder.rotation(3, 5).unwrap();
    let x = uniform(&[1, 5, e], 1.0, 1);
    let (q, k) = (config.num_attention_heads, config.num_key_value_heads);
    let vars = [vec![2, e], vec![q * d, 2], vec![2, e], vec![k * d, 2]]
        .iter()
        .zip(2..)
        .map(|(shape, seed)| Var::from_tensor(&uniform(shape.as_slice(), 1.0, seed)).unwrap())
        .collect::<Vec<_>>();
    let toward = [uniform(&[1, q, 5, d], 1.0, 7), uniform(&[1, k, 5, d], 1.0, 8)];
    let objective = |vars: &[Tensor]| {
        let lora = |i: usize| Lora {
            a: vars[i].clone(),
            b: vars[i + 1].clone(),
            scale: 0.5,
            dropout: None,
        };
        let lora = LoraLayer { q: Some(lora(0)), k: Some(lora(2)), ..Default::default() };
        let student = StudentLayer { lora: Some(lora), ..student.clone() };
        let inputs = layer.attention_inputs(&x, &rotation, Some(&student)).unwrap();
        let along = |x: &Tensor, toward: &Tensor| (x * toward).unwrap().sum_all().unwrap();
        (along(&inputs.q, &toward[0]) + along(&inputs.k, &toward[1])).unwrap()
    };
    let tensors: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
    let gradients = objective(&tensors).backward().unwrap();
    for (n, var) in vars.iter().enumerate() {
        let gradient = gradients.get(var).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let values = var.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        for (i, gradient) in gradient.iter().enumerate() {
            let at = |delta: f64| {
                let mut values = values.clone();
                values[i] += delta;
                let mut moved: Vec<Tensor> = tensors.iter().map(Tensor::detach).collect();
                moved[n] = Tensor::from_vec(values, var.shape(), &Device::Cpu).unwrap();
                objective(&moved).to_scalar::<f64>().unwrap()
            };
            let numeric = (at(1e-5) - at(-1e-5)) / 2e-5;
            assert!((gradient - numeric).abs() < 1e-6, "{n}, {i}: {gradient} vs {numeric}");
        }
    }
}

/// Gemma 3's two ways to say which layers have a window and by which base they are rotated; what is not computed here is named.
#[test]
fn gemmas_configuration() {
    let read = |changes| read_config("gemma3_text", changes);
    let config = read(json!({})).unwrap();
    assert_eq!(config.full_layers().collect::<Vec<_>>(), [2, 5]);
    assert_eq!((config.sliding_window(0), config.sliding_window(5)), (Some(8), None));
    assert_eq!(ModelConfig::from_hf_json(&config.to_hf_json()).unwrap(), config);
    // As its first files have it.
    let old = json!({
        "rope_parameters": null, "layer_types": null, "sliding_window_pattern": 3,
        "rope_theta": 1e6, "rope_local_base_freq": 5000.0,
        "rope_scaling": { "rope_type": "linear", "factor": 8.0 },
    });
    assert_eq!(read(old).unwrap(), config);
    let silent = json!({ "rope_parameters": null, "layer_types": null, "sliding_window": null });
    let error = read(silent).unwrap_err().to_string();
    assert!(error.contains("\"sliding_window\""), "{error}");
    let mut json = config.to_hf_json();
    for key in
        ["layer_types", "sliding_window", "rope_theta", "rope_local_base_freq", "rope_scaling"]
    {
        json.as_object_mut().unwrap().remove(key);
    }
    let usual = ModelConfig::from_hf_json(&json).unwrap();
    assert_eq!(usual.full_layers().collect::<Vec<_>>(), [5]);
    let sliding = usual.sliding.unwrap();
    assert_eq!((sliding.window, sliding.rope_theta, usual.rope_theta), (4096, 1e4, 1e6));
    // Queries are scaled by the root of the key; by that of 256, if it is not there.
    for (scalar, scale) in [
        (json!(8), None),
        (json!(168), Some(168_f64.powf(-0.5))),
        (json!(2.5), Some(2.5_f64.powf(-0.5))),
        (json!(null), Some(0.0625)),
    ] {
        let scaled = read(json!({ "query_pre_attn_scalar": scalar })).unwrap();
        assert_eq!(scaled.logit_scale(), scale);
        assert_eq!(ModelConfig::from_hf_json(&scaled.to_hf_json()).unwrap(), scaled);
    }
    for wrong in [json!(0), json!(-4), json!("8")] {
        let error = read(json!({ "query_pre_attn_scalar": wrong })).unwrap_err().to_string();
        assert!(error.contains("query_pre_attn_scalar"), "{error}");
    }
    for (changes, named) in [
        (json!({ "attn_logit_softcapping": 50.0 }), "attn_logit_softcapping"),
        (json!({ "final_logit_softcapping": 30.0 }), "final_logit_softcapping"),
        (json!({ "use_bidirectional_attention": true }), "use_bidirectional_attention"),
        (json!({ "hidden_activation": "gelu" }), "\"gelu\""),
        (json!({ "model_type": "gemma3" }), "\"gemma3\""),
        (
            json!({ "rope_parameters": { "sliding_attention": { "rope_type": "linear", "factor": 2.0 } } }),
            "sliding_attention",
        ),
    ] {
        let error = read(changes).unwrap_err();
        assert!(matches!(error, ModelError::Unsupported { .. }), "{error}");
        assert!(error.to_string().contains(named) && error.hint().is_some(), "{error}");
    }
    // A student's attention has the model's scale.
    let scaled = read(json!({ "query_pre_attn_scalar": 20 })).unwrap();
    let still = scaled.fit_still(StillConfig::uniform(6, config.geometry(), 8, 2));
    assert!(scaled.check_still(&still).is_ok());
    let told = serde_json::to_value(&still).unwrap();
    assert_eq!(told["logit_scale"], 20_f64.powf(-0.5));
    let error = Student::init(still, &config, FeatureInit::Identity, 0).unwrap_err().to_string();
    assert!(error.contains("logit_scale is 0.22") && error.contains("by 0.35"), "{error}");
    let usual = serde_json::to_value(StillConfig::uniform(6, config.geometry(), 8, 2)).unwrap();
    assert!(usual.get("logit_scale").is_none(), "{usual}");
    // Budgets belong to layers with full attention, to all of them.
    let still = StillConfig::uniform(6, config.geometry(), 8, 2);
    let error = Student::init(still.clone(), &config, FeatureInit::Identity, 0).unwrap_err();
    assert!(error.to_string().contains("layer 0 has budgets"), "{error}");
    let error = Student::init(still.in_layers([2]), &config, FeatureInit::Identity, 0).unwrap_err();
    assert!(error.to_string().contains("layer 5: 0 budgets"), "{error}");
}

/// The first releases' files say "gelu" of the tanh form, which they were trained with; transformers reads it so.
#[test]
fn the_first_gemmas_gelu_is_the_tanh_form() {
    let text = std::fs::read_to_string(data("gemma").join("config.json")).unwrap();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let read = |key: &str, name: serde_json::Value| {
        let mut json = json.clone();
        json[key] = name;
        ModelConfig::from_hf_json(&json)
    };
    let config = ModelConfig::from_hf_json(&json).unwrap();
    for (key, name) in [
        ("hidden_act", json!("gelu")),
        ("hidden_activation", json!(null)),
        ("hidden_activation", json!("gelu_pytorch_tanh")),
    ] {
        assert_eq!(read(key, name).unwrap(), config);
    }
    assert_eq!(config.to_hf_json()["hidden_act"], "gelu_pytorch_tanh");
    let error = read("hidden_act", json!("silu")).unwrap_err();
    assert!(error.to_string().contains("\"silu\""), "{error}");
}

/// Sequences of different lengths in one batch, padded, then token by token: each as if it were alone.
#[test]
fn a_batch_of_different_lengths_is_its_sequences() {
    for family in ["gemma3_text", "gemma3_text_scaled", "gemma", "phi3", "qwen3"] {
        let teacher = model(family);
        let (ids, _) = expected(family);
        let config = teacher.config();
        let still = StillConfig::uniform(config.num_hidden_layers, config.geometry(), 4, 1);
        let still = config.fit_still(still);
        let student = Student::init(still, config, FeatureInit::Identity, 0).unwrap();
        for model in [teacher.clone(), teacher.with_student(student)] {
            let (lengths, rest) = ([31, 12], 9);
            let own = [&ids[..40], &ids[5..5 + 21]];
            let mut cache = model.new_cache(2, RowDtype::F32).unwrap();
            let padded: Vec<u32> = own
                .iter()
                .zip(lengths)
                .flat_map(|(ids, n)| (0..31).map(move |i| if i < n { ids[i] } else { 0 }))
                .collect();
            let padded = Tensor::from_vec(padded, (2, 31), &Device::Cpu).unwrap();
            let hidden = model.forward(&padded, &mut cache, Some(&lengths)).unwrap();
            let mut got: Vec<Vec<Vec<f32>>> = (0..2)
                .map(|n| {
                    let rows = hidden.get(n).unwrap().narrow(0, 0, lengths[n]).unwrap();
                    model.logits(&rows).unwrap().to_vec2().unwrap()
                })
                .collect();
            for step in 0..rest {
                let next = [own[0][lengths[0] + step], own[1][lengths[1] + step]];
                let vocab = config.vocab_size;
                let both = model.decode(&next, &mut cache).unwrap().to_vec();
                for (got, logits) in got.iter_mut().zip(both.chunks_exact(vocab)) {
                    got.push(logits.to_vec());
                }
            }
            for (n, ids) in own.iter().enumerate() {
                let alone = logits(&model, ids, 7);
                let error = relative_rms(&got[n], &alone);
                assert!(error <= 1e-5, "{family}, sequence {n}: relative RMS {error:e}");
            }
        }
    }
}

/// A student leaves layers with a window as they are: saved in every form it is the same, and its cache takes the window's rows alone.
#[test]
fn students_of_gemma_keep_its_windows() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base");
    let random = random_model(tiny_sliding_config(), 3).unwrap();
    save_base(&base, &random, DType::F32).unwrap();
    let teacher = Model::load(base.to_str().unwrap()).unwrap();
    let config = teacher.config();
    assert_eq!(config, random.config());
    let ids: Vec<u32> = (0..90).map(|i| (i * i + 3) % 256).collect();
    let expected = logits(&random, &ids, ids.len());
    assert!(relative_rms(&logits(&teacher, &ids, 7), &expected) <= 1e-5);

    let still = StillConfig::uniform(config.num_hidden_layers, config.geometry(), 8, 2);
    let still = still.in_layers(config.full_layers());
    let mut student = Student::init(still, config, FeatureInit::Normal, 1).unwrap();
    let lora = LoraConfig { rank: 2, alpha: 2.0, targets: LoraTarget::ALL.to_vec() };
    student.add_lora(config, lora, 2).unwrap();
    let moved = student.map_tensors(|name, tensor| {
        assert!([".1.", ".4."].iter().any(|layer| name.contains(layer)), "{name} learns");
        Ok(if name.contains("lora_B") { (tensor + 0.02)? } else { tensor.clone() })
    });
    let student = teacher.with_student(moved.unwrap());
    let whole = logits(&student, &ids, ids.len());
    assert!(relative_rms(&whole, &expected) > 1e-3, "the student is another model");
    for tokens in [13, 1] {
        let error = relative_rms(&logits(&student, &ids, tokens), &whole);
        assert!(error <= 1e-5, "{tokens} tokens a call: relative RMS {error:e}");
    }
    for (name, kind) in [("full", ExportKind::Full(DType::F32)), ("delta", ExportKind::Delta)] {
        let saved = dir.path().join(name);
        save_student(&saved, &student, kind).unwrap();
        let again = Model::load(saved.to_str().unwrap()).unwrap();
        assert_eq!(again.config(), config);
        let error = relative_rms(&logits(&again, &ids, ids.len()), &whole);
        assert!(error <= 1e-5, "{name}: relative RMS {error:e}");
    }
    // Norms are saved as the base has them, bit by bit.
    let norms = |of: &str| {
        let file = dir.path().join(of).join("model.safetensors");
        candle_core::safetensors::load(file, &Device::Cpu).unwrap()
    };
    let (of_base, of_student) = (norms("base"), norms("full"));
    for (name, tensor) in of_base.iter().filter(|(name, _)| name.contains("norm")) {
        let bits = |x: &Tensor| {
            x.to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect::<Vec<_>>()
        };
        assert_eq!(bits(tensor), bits(&of_student[name]), "{name}");
    }
    let exported = dir.path().join("student.gguf");
    export_gguf(&exported, &student, GgufFormat::Q8_0).unwrap();
    let again = Model::load(exported.to_str().unwrap()).unwrap();
    assert!(relative_rms(&logits(&again, &ids, ids.len()), &whole) <= 0.05);

    // Three windows of 12 rows, in tiles of 16 for the keys, beside two hybrid layers.
    let bytes = |model: &Model, tokens: usize| {
        let mut cache = model.new_cache(1, RowDtype::F32).unwrap();
        model.prefill(&ids[..tokens], &mut cache).unwrap();
        cache.size_bytes()
    };
    let windows = 3 * 2 * (16 + 12) * 8 * 4;
    let dense = |tokens: usize| 2 * 2 * (tokens.next_multiple_of(16) + tokens) * 8 * 4;
    assert_eq!(bytes(&teacher, 90), windows + dense(90));
    assert!(bytes(&student, 90) > windows && bytes(&student, 90) < windows + dense(90));
}
