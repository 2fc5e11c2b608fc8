//! Safetensors directories: every tensor is read or the model is refused; 8-bit weights are widened; dtypes and sizes are
//! checked before anything is made of them.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use still_attention::{RowDtype, StillConfig};
use still_model::random::{random_model, tiny_config};
use still_model::{
    Architecture, ExportKind, FeatureInit, LoraConfig, LoraTarget, Model, ModelConfig, Student,
    save_student,
};

/// A tensor of a file: dtype, shape, bytes.
type Stored = (Dtype, Vec<usize>, Vec<u8>);
type File = BTreeMap<String, Stored>;

fn floats(shape: &[usize], values: &[f32]) -> Stored {
    (Dtype::F32, shape.to_vec(), values.iter().flat_map(|x| x.to_le_bytes()).collect())
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// A random model and its tensors as a file.
fn model_and_file(config: ModelConfig) -> (Model, File) {
    let model = random_model(config, 4).unwrap();
    let mut file = File::new();
    let visited = model.decoder.visit_tensors(|name, tensor| {
        file.insert(name.to_owned(), floats(tensor.dims(), &values(&tensor)));
        Ok(())
    });
    visited.unwrap();
    (model, file)
}

fn write_file(path: &Path, file: &File) {
    let views = file.iter().map(|(name, (dtype, shape, bytes))| {
        (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// A directory with these weights and the model's configuration, changed.
fn write(dir: &Path, model: &Model, file: &File, changes: &Value) {
    write_file(&dir.join("model.safetensors"), file);
    model.tokenizer.save(dir).unwrap();
    let mut config = model.config().to_hf_json();
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
}

fn load(model: &Model, file: &File, changes: &Value) -> still_model::Result<Model> {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), model, file, changes);
    Model::load(dir.path().to_str().unwrap())
}

/// The error of loading, which names the weights' file.
fn refused(model: &Model, file: &File, changes: &Value) -> String {
    let error = load(model, file, changes).unwrap_err();
    assert!(error.hint().is_some(), "{error}");
    assert!(error.to_string().contains("model.safetensors"), "{error}");
    error.to_string()
}

fn logits(model: &Model) -> Vec<f32> {
    let ids: Vec<u32> = (0..20).map(|t| (t * 37 + 5) % 256).collect();
    let mut cache = model.new_cache(1, RowDtype::F32).unwrap();
    let ids = Tensor::new(ids, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let hidden = model.forward(&ids, &mut cache, None).unwrap();
    values(&model.logits(&hidden).unwrap())
}

fn untied() -> ModelConfig {
    ModelConfig { tie_word_embeddings: false, ..tiny_config() }
}

#[test]
fn a_tensor_that_nothing_reads_is_named() {
    let (model, file) = model_and_file(untied());
    let expected = logits(&model);
    let none = json!({});
    assert_eq!(logits(&load(&model, &file, &none).unwrap()), expected);
    let with = |names: &[&str]| {
        let mut file = file.clone();
        for name in names {
            file.insert((*name).to_owned(), floats(&[2], &[1.0, 2.0]));
        }
        file
    };
    for (name, hint) in [
        ("model.layers.1.self_attn.q_proj.bias", "attention_bias"),
        ("model.layers.0.mlp.down_proj.bias", "mlp_bias"),
        ("model.layers.0.self_attn.q_norm.weight", "another kind"),
        ("model.layers.0.self_attn.sinks", "another kind"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "still_lora"),
        ("model.layers.0.self_attn.feature_map_q.mlp.linears.0.weight", "still"),
        ("model.layers.0.mlp.up_proj.weight_scale_inv", "quantization_config"),
        ("score.weight", "another kind"),
        ("vision_tower.x", "another kind"),
    ] {
        let error = load(&model, &with(&[name]), &none).unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
        assert!(error.hint().unwrap().contains(hint), "{name}: {:?}", error.hint());
    }
    let many: Vec<String> = (0..12).map(|n| format!("extra.{n}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    let error = refused(&model, &with(&many), &none);
    assert!(error.contains("12 tensors") && error.contains("and 8 more"), "{error}");
    // Layers beyond the configuration's.
    let error = refused(&model, &file, &json!({ "num_hidden_layers": 1 }));
    assert!(error.contains("layers beyond the 1") && error.contains("model.layers.1."), "{error}");
    // What is computed anew, and what holds nothing.
    let mut harmless =
        with(&["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"]);
    harmless.insert("vision.empty".into(), (Dtype::F32, vec![0, 3], Vec::new()));
    assert_eq!(logits(&load(&model, &harmless, &none).unwrap()), expected);
}

#[test]
fn a_tied_head_is_the_embeddings() {
    let (model, mut file) = model_and_file(tiny_config());
    let none = json!({});
    let embeddings = file["model.embed_tokens.weight"].clone();
    file.insert("lm_head.weight".into(), embeddings);
    assert_eq!(logits(&load(&model, &file, &none).unwrap()), logits(&model));
    file.get_mut("lm_head.weight").unwrap().2[0] ^= 1;
    let error = refused(&model, &file, &none);
    assert!(error.contains("tie_word_embeddings"), "{error}");
    load(&model, &file, &json!({ "tie_word_embeddings": false })).unwrap();
    file.remove("lm_head.weight");
    let error = load(&model, &file, &json!({ "tie_word_embeddings": false })).unwrap_err();
    assert!(error.to_string().contains("lm_head.weight is missing"), "{error}");
    assert!(error.hint().unwrap().contains("tie_word_embeddings"), "{error}");
}

#[test]
fn a_body_saved_without_its_prefix_is_read() {
    let (model, file) = model_and_file(untied());
    let bare = |name: &String| name.strip_prefix("model.").unwrap_or(name).to_owned();
    let file: File = file.iter().map(|(name, tensor)| (bare(name), tensor.clone())).collect();
    assert_eq!(logits(&load(&model, &file, &json!({})).unwrap()), logits(&model));
}

#[test]
fn a_dtype_that_is_no_weight_is_named() {
    let (model, file) = model_and_file(tiny_config());
    const NAME: &str = "model.layers.0.mlp.up_proj.weight";
    for (dtype, bits) in [
        (Dtype::BOOL, 8),
        (Dtype::I8, 8),
        (Dtype::U8, 8),
        (Dtype::I16, 16),
        (Dtype::I32, 32),
        (Dtype::I64, 64),
        (Dtype::U64, 64),
        (Dtype::F8_E4M3, 8),
        (Dtype::F8_E5M2, 8),
        (Dtype::F8_E8M0, 8),
        (Dtype::F4, 4),
        (Dtype::C64, 64),
    ] {
        let mut file = file.clone();
        let stored = file.get_mut(NAME).unwrap();
        let elements: usize = stored.1.iter().product();
        (stored.0, stored.2) = (dtype, vec![1; elements * bits / 8]);
        let error = refused(&model, &file, &json!({}));
        assert!(error.contains(NAME) && error.contains(&format!("{dtype:?}")), "{error}");
        // Where the head of a norm should be, too.
        let norm = "model.norm.weight";
        let mut file = file.clone();
        let stored = file.get_mut(norm).unwrap();
        let elements: usize = stored.1.iter().product();
        (stored.0, stored.2) = (dtype, vec![1; elements * bits / 8]);
        refused(&model, &file, &json!({}));
    }
    let mut wide = file.clone();
    let stored = wide.get_mut(NAME).unwrap();
    let doubles: Vec<u8> = stored
        .2
        .chunks(4)
        .flat_map(|x| f64::from(f32::from_le_bytes(x.try_into().unwrap())).to_le_bytes())
        .collect();
    (stored.0, stored.2) = (Dtype::F64, doubles);
    assert_eq!(logits(&load(&model, &wide, &json!({})).unwrap()), logits(&model));
}

#[test]
fn sizes_are_compared_with_the_file_before_anything_is_made() {
    let (model, file) = model_and_file(tiny_config());
    for (key, value) in [
        ("hidden_size", 1 << 20),
        ("intermediate_size", 1 << 22),
        ("vocab_size", 1 << 24),
        ("num_attention_heads", 1 << 14),
        ("head_dim", 1 << 12),
    ] {
        let error = refused(&model, &file, &json!({ key: value }));
        assert!(error.contains("has shape"), "{key}: {error}");
    }
    let error = refused(&model, &file, &json!({ "num_hidden_layers": 1 << 12 }));
    assert!(error.contains("model.layers.2.") && error.contains("missing"), "{error}");
}

#[test]
fn a_tensor_in_two_shards_is_refused() {
    let (model, file) = model_and_file(tiny_config());
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &model, &file, &json!({}));
    let whole = dir.path().join("model.safetensors");
    std::fs::rename(&whole, dir.path().join("a.safetensors")).unwrap();
    let twice = [file.first_key_value().unwrap()].map(|(n, t)| (n.clone(), t.clone())).into();
    write_file(&dir.path().join("b.safetensors"), &twice);
    let index = json!({ "weight_map": { "x": "a.safetensors", "y": "b.safetensors" } });
    std::fs::write(dir.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    let error = Model::load(dir.path().to_str().unwrap()).unwrap_err().to_string();
    assert!(error.contains("b.safetensors") && error.contains("a.safetensors"), "{error}");
}

// 8-bit weights.

/// Wide enough that blocks of 128 are whole, cut and alone.
fn blocky() -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Llama,
        hidden_size: 160,
        intermediate_size: 272,
        num_attention_heads: 5,
        num_key_value_heads: 1,
        head_dim: 32,
        ..untied()
    }
}

/// E4M3, by its definition.
fn e4m3(byte: u8) -> f32 {
    let sign = if byte & 0x80 == 0 { 1.0 } else { -1.0 };
    let (exponent, mantissa) = ((byte >> 3) & 15, f32::from(byte & 7) / 8.0);
    match exponent {
        0 => sign * mantissa / 64.0,
        _ => sign * (1.0 + mantissa) * 2.0_f32.powi(i32::from(exponent) - 7),
    }
}

fn nearest_e4m3(x: f32) -> u8 {
    let bytes = (0..=255_u8).filter(|byte| byte & 0x7f != 0x7f);
    bytes.min_by(|&a, &b| (e4m3(a) - x).abs().total_cmp(&(e4m3(b) - x).abs())).unwrap()
}

/// Quantizes a matrix by rectangles of `block`; returns the file's tensors and the values they stand for.
fn quantized(
    dtype: Dtype,
    matrix: &[f32],
    [rows, columns]: [usize; 2],
    [r, c]: [usize; 2],
) -> (Stored, Vec<f32>, Vec<f32>) {
    let (down, across) = (rows.div_ceil(r), columns.div_ceil(c));
    let mut scales = vec![0.0_f32; down * across];
    for (i, x) in matrix.iter().enumerate() {
        let scale = &mut scales[i / columns / r * across + i % columns / c];
        *scale = scale.max(x.abs());
    }
    let most = if dtype == Dtype::I8 { 127.0 } else { 448.0 };
    scales.iter_mut().for_each(|scale| *scale /= most);
    let (mut bytes, mut values) = (Vec::new(), Vec::new());
    for (i, x) in matrix.iter().enumerate() {
        let scale = scales[i / columns / r * across + i % columns / c];
        let (byte, value) = match dtype {
            Dtype::I8 => {
                let n = (x / scale).round() as i8;
                (n as u8, f32::from(n))
            }
            _ => {
                let byte = nearest_e4m3(x / scale);
                (byte, e4m3(byte))
            }
        };
        bytes.push(byte);
        values.push(value * scale);
    }
    ((dtype, vec![rows, columns], bytes), scales, values)
}

/// What a scale is for, its shape for a matrix and its name's end.
#[derive(Clone, Copy)]
enum Layout {
    Tensor,
    Row,
    Block,
}

/// The model's file with its projections quantized, and the model with the values that this stands for.
fn quantized_file(
    model: &Model,
    file: &File,
    dtype: Dtype,
    layout: Layout,
    end: &str,
) -> (File, Model) {
    let (mut stored, mut plain) = (file.clone(), HashMap::new());
    for (name, (_, shape, bytes)) in file {
        let floats32: Vec<f32> =
            bytes.chunks(4).map(|x| f32::from_le_bytes(x.try_into().unwrap())).collect();
        let mut kept = floats32.clone();
        if name.contains("proj.weight") {
            let size = [shape[0], shape[1]];
            let (block, scale_shape) = match layout {
                Layout::Tensor => (size, vec![]),
                Layout::Row => ([1, size[1]], vec![size[0], 1]),
                Layout::Block => ([128, 128], vec![size[0].div_ceil(128), size[1].div_ceil(128)]),
            };
            let (tensor, scales, stands_for) = quantized(dtype, &floats32, size, block);
            stored.insert(name.clone(), tensor);
            stored.insert(format!("{name}{end}"), floats(&scale_shape, &scales));
            kept = stands_for;
        }
        let tensor = Tensor::from_vec(kept, shape.as_slice(), &Device::Cpu).unwrap();
        plain.insert(name.clone(), tensor);
    }
    let weights = still_model::Weights::from_tensors(plain);
    let decoder =
        still_model::Decoder::load(model.config(), &weights, &Device::Cpu, DType::F32).unwrap();
    (stored, Model { decoder: decoder.into(), ..model.clone() })
}

/// The configuration of a compressed-tensors checkpoint.
fn compressed(format: &str, kind: &str, strategy: &str, block: Value) -> Value {
    json!({ "quantization_config": {
        "quant_method": "compressed-tensors", "format": format, "quantization_status": "compressed",
        "kv_cache_scheme": null, "ignore": ["lm_head"], "sparsity_config": {}, "transform_config": {},
        "config_groups": { "group_0": {
            "targets": ["Linear"], "output_activations": null,
            "input_activations": { "num_bits": 8, "type": kind, "strategy": "token", "dynamic": true },
            "weights": { "num_bits": 8, "type": kind, "strategy": strategy, "symmetric": true,
                         "dynamic": false, "group_size": null, "block_structure": block },
        } },
    } })
}

#[test]
fn eight_bit_weights_are_widened() {
    let (model, file) = model_and_file(blocky());
    let fp8 = |block: Value| {
        json!({ "quantization_config": {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": block,
            "modules_to_not_convert": ["lm_head"],
        } })
    };
    let bare = json!({ "quantization_config": { "quant_method": "compressed-tensors", "format": "int-quantized" } });
    let cases = [
        (Dtype::F8_E4M3, Layout::Block, "_scale_inv", fp8(json!([128, 128]))),
        (Dtype::F8_E4M3, Layout::Tensor, "_scale", fp8(Value::Null)),
        (Dtype::F8_E4M3, Layout::Tensor, "_scale_inv", fp8(Value::Null)),
        (Dtype::F8_E4M3, Layout::Row, "_scale", fp8(Value::Null)),
        (
            Dtype::F8_E4M3,
            Layout::Tensor,
            "_scale",
            compressed("float-quantized", "float", "tensor", Value::Null),
        ),
        (
            Dtype::F8_E4M3,
            Layout::Row,
            "_scale",
            compressed("float-quantized", "float", "channel", Value::Null),
        ),
        (
            Dtype::F8_E4M3,
            Layout::Block,
            "_scale",
            compressed("float-quantized", "float", "block", json!([128, 128])),
        ),
        (
            Dtype::I8,
            Layout::Row,
            "_scale",
            compressed("int-quantized", "int", "channel", Value::Null),
        ),
        (
            Dtype::I8,
            Layout::Tensor,
            "_scale",
            compressed("int-quantized", "int", "tensor", Value::Null),
        ),
        (Dtype::I8, Layout::Row, "_scale", bare),
    ];
    for (dtype, layout, end, config) in cases {
        let (mut stored, expected) = quantized_file(&model, &file, dtype, layout, end);
        // Scales of activations and of a KV cache are no part of the weights.
        stored.insert("model.layers.0.self_attn.q_proj.input_scale".into(), floats(&[1], &[0.1]));
        stored.insert("model.layers.0.self_attn.k_scale".into(), floats(&[1], &[0.1]));
        let loaded = load(&model, &stored, &config).unwrap();
        assert_eq!(logits(&loaded), logits(&expected), "{config}");
        assert_ne!(logits(&loaded), logits(&model));
        // Scales and configuration belong together.
        let without = refused(&model, &stored, &json!({}));
        assert!(
            without.contains("proj.weight") && without.contains(&format!("{dtype:?}")),
            "{without}"
        );
        let mut missing = stored.clone();
        missing.remove(&format!("model.layers.1.mlp.up_proj.weight{end}")).unwrap();
        let error = refused(&model, &missing, &config);
        assert!(
            error.contains("model.layers.1.mlp.up_proj.weight") && error.contains("scales"),
            "{error}"
        );
        let error = refused(&model, &file, &config);
        assert!(error.contains("quantization_config"), "{error}");
    }
}

#[test]
fn a_quantized_teacher_gives_a_plain_student() {
    let (model, file) = model_and_file(tiny_config());
    let (stored, expected) = quantized_file(&model, &file, Dtype::I8, Layout::Row, "_scale");
    let config = compressed("int-quantized", "int", "channel", Value::Null);
    let teacher = load(&model, &stored, &config).unwrap();
    let still = StillConfig::uniform(2, teacher.config().geometry(), 8, 8);
    let student = Student::init(still, teacher.config(), FeatureInit::Identity, 0).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("student");
    save_student(&out, &teacher.with_student(student), ExportKind::Full(DType::F32)).unwrap();
    let student = Model::load(out.to_str().unwrap()).unwrap();
    assert_eq!(logits(&student.teacher()), logits(&expected));
}

#[test]
fn other_quantizations_are_refused_by_name() {
    let (model, file) = model_and_file(tiny_config());
    let error = |config: &Value| {
        let error = load(&model, &file, config).unwrap_err();
        assert!(error.hint().is_some_and(|hint| !hint.is_empty()), "{error}");
        assert!(error.to_string().contains("config.json"), "{error}");
        error.to_string()
    };
    for method in
        ["gptq", "awq", "bitsandbytes", "hqq", "aqlm", "mxfp4", "fbgemm_fp8", "modelopt", "quark"]
    {
        let config = json!({ "quantization_config": { "quant_method": method, "bits": 4 } });
        let error = error(&config);
        assert!(error.contains(method) && error.contains("quantization_config"), "{error}");
    }
    let old = json!({ "quantization_config": { "load_in_4bit": true } });
    assert!(error(&old).contains("bitsandbytes"));
    assert!(error(&json!({ "quantization_config": { "bits": 8 } })).contains("quant_method"));
    assert!(error(&json!({ "quantization_config": "fp8" })).contains("quantization_config"));
    assert!(
        error(&json!({ "quantization": { "group_size": 64, "bits": 4 } })).contains("quantization")
    );
    let with = |path: &str, value: Value| {
        let mut config = compressed("int-quantized", "int", "channel", Value::Null);
        *config.pointer_mut(&format!("/quantization_config/{path}")).unwrap() = value;
        error(&config)
    };
    let weights = "config_groups/group_0/weights";
    for (path, value, named) in [
        ("format", json!("pack-quantized"), "pack-quantized"),
        ("format", json!("nvfp4-pack-quantized"), "nvfp4-pack-quantized"),
        ("format", json!(3), "format"),
        ("format", Value::Null, "format"),
        ("transform_config", json!({ "config_groups": {} }), "transform_config"),
        ("sparsity_config", json!({ "format": "sparse-24-bitmask" }), "sparsity_config"),
        ("config_groups", json!([]), "config_groups"),
    ] {
        assert!(with(path, value).contains(named), "{path}");
    }
    for (key, value, named) in [
        ("num_bits", json!(4), "weights.num_bits"),
        ("num_bits", json!("8"), "weights.num_bits"),
        ("symmetric", json!(false), "symmetric"),
        ("strategy", json!("group"), "group"),
        ("strategy", json!("block"), "block_structure"),
        ("dynamic", json!(true), "dynamic"),
    ] {
        assert!(with(&format!("{weights}/{key}"), value).contains(named), "{key}");
    }
    for (key, value) in [
        ("weight_block_size", json!([128])),
        ("weight_block_size", json!([0, 128])),
        ("weight_block_size", json!(128)),
        ("fmt", json!("e5m2")),
    ] {
        let mut config = json!({ "quantization_config": { "quant_method": "fp8" } });
        config["quantization_config"][key] = value;
        assert!(error(&config).contains(key));
    }
}

// Students.

/// A base on disk, and a full and a delta student of it with low-rank updates.
fn students(dir: &Path) {
    let (model, file) = model_and_file(tiny_config());
    let base = dir.join("base");
    std::fs::create_dir(&base).unwrap();
    write(&base, &model, &file, &json!({}));
    let base = Model::load(base.to_str().unwrap()).unwrap();
    let still = StillConfig::uniform(2, base.config().geometry(), 8, 2);
    let mut student = Student::init(still, base.config(), FeatureInit::Identity, 0).unwrap();
    let lora = LoraConfig { rank: 2, alpha: 4.0, targets: LoraTarget::ALL.to_vec() };
    student.add_lora(base.config(), lora, 6).unwrap();
    let student = base.with_student(student);
    save_student(&dir.join("delta"), &student, ExportKind::Delta).unwrap();
    save_student(&dir.join("full"), &student, ExportKind::Full(DType::F32)).unwrap();
}

#[test]
fn a_students_sections_are_checked_against_its_file_and_base() {
    let dir = tempfile::tempdir().unwrap();
    students(dir.path());
    let edited = |student: &str, edit: &dyn Fn(&mut Value)| {
        let path = dir.path().join(student).join("config.json");
        let sound = std::fs::read_to_string(&path).unwrap();
        let mut json: Value = serde_json::from_str(&sound).unwrap();
        edit(&mut json);
        std::fs::write(&path, json.to_string()).unwrap();
        let loaded = Model::load(dir.path().join(student).to_str().unwrap());
        std::fs::write(&path, sound).unwrap();
        loaded
    };
    for student in ["full", "delta"] {
        edited(student, &|_| {}).unwrap();
        for (key, values) in [
            ("chunk", json!([0, 1_000_000_000, 9_223_372_036_854_775_808_u64, -1, "8", 8.5])),
            ("feature_dim", json!([0, 10_000_000, 9, -8])),
            ("budgets", json!([[], [[9, 9], [2, 2]], [[2], [2]], [[2, 2], [-1, 2]], 4])),
            ("cap", json!([-1, 1_000_000_000_000_u64, "8"])),
            ("router", json!(["oracle", { "random": { "seed": -1 } }])),
            ("selection_head", json!(["query_head", 3])),
            ("feature_map", json!(["relu"])),
            ("gate", json!(["yes", true])),
            ("surprise", json!([1])),
        ] {
            for value in values.as_array().unwrap() {
                let error = edited(student, &|json| json["still"][key] = value.clone());
                let error = error.expect_err(&format!("{student}: {key}: {value}"));
                assert!(error.hint().is_some(), "{error}");
                let text = error.to_string();
                assert!(
                    text.contains("config.json") || text.contains(".safetensors"),
                    "{key}: {value}: {text}"
                );
            }
        }
    }
    for rank in [json!(0), json!(1_000_000_000), json!(4), json!(-2), json!("2")] {
        let error = edited("delta", &|json| json["still_lora"]["rank"] = rank.clone()).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("still_lora") || text.contains("lora_A"), "{rank}: {text}");
    }
    let error = edited("delta", &|json| json["still_lora"]["alpha"] = 1e300.into()).unwrap_err();
    assert!(error.to_string().contains("alpha"), "{error}");
    // Updates that nobody speaks of would be left out without a word.
    let error = edited("delta", &|json| {
        json.as_object_mut().unwrap().remove("still_lora").unwrap();
    });
    let error = error.unwrap_err();
    assert!(error.to_string().contains("lora_A"), "{error}");
    assert!(error.hint().unwrap().contains("still_lora"), "{error}");
    let error = edited("delta", &|json| json["still_lora"]["targets"] = json!(["q", "k", "v"]));
    assert!(error.unwrap_err().to_string().contains("o_proj.lora_A"));
    // A full student whose sections are gone is no dense model.
    let error = edited("full", &|json| *json = json["base_config"].take());
    assert!(error.unwrap_err().to_string().contains("feature_map_"));
}
