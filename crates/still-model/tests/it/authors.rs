//! Checkpoints of STILL's released code, against a float64 model of the same (`data/authors/make.py`): a directory after stage 1,
//! PEFT's adapter after stage 2; and what is neither.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};
use still_attention::{FeatureMap, LinearNorm, RowDtype, SelectionHead};
use still_model::random::{random_model, tiny_config};
use still_model::{ExportKind, LoraTarget, Model, ModelError, save_student};
use still_testing::relative_rms;

/// Files of a directory after stage 1, and of an adapter.
const STAGE1: [&str; 2] = ["config.json", "model.safetensors"];
const ADAPTER: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/authors")
}

fn copy(stage: &str, files: &[&str], to: &Path) {
    fs::create_dir_all(to).unwrap();
    for file in files {
        fs::copy(data().join(stage).join(file), to.join(file)).unwrap();
    }
}

/// A directory with `stage1/`, which has a tokenizer (logits do not depend on it), and `stage2/`.
fn checkpoints() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    copy("stage1", &STAGE1, &dir.path().join("stage1"));
    copy("stage2", &ADAPTER, &dir.path().join("stage2"));
    random_model(tiny_config(), 0).unwrap().tokenizer.save(&dir.path().join("stage1")).unwrap();
    dir
}

fn load(dir: &Path) -> still_model::Result<Model> {
    Model::load(dir.to_str().unwrap())
}

/// Token ids, positions, and the logits at them after a stage.
struct Expected {
    ids: Vec<u32>,
    positions: Vec<usize>,
    logits: Vec<Vec<f32>>,
}

fn expected(stage: &str) -> Expected {
    let path = data().join("expected.safetensors");
    let tensors = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    let numbers = |name: &str| tensors[name].to_vec1::<i64>().unwrap();
    Expected {
        ids: numbers("ids").into_iter().map(|id| id as u32).collect(),
        positions: numbers("positions").into_iter().map(|at| at as usize).collect(),
        logits: tensors[stage].to_vec2().unwrap(),
    }
}

/// Of the logits of every token, those at the expected positions: relative RMS.
fn error(got: &[Vec<f32>], expected: &Expected) -> f64 {
    assert_eq!(got.len(), expected.ids.len());
    let got: Vec<_> = expected.positions.iter().map(|&at| got[at].clone()).collect();
    relative_rms(&got, &expected.logits)
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

/// At once, in parts, token by token, in lanes.
fn check(model: &Model, stage: &str) {
    let expected = expected(stage);
    for tokens in [expected.ids.len(), 50, 1] {
        let error = error(&logits(model, &expected.ids, tokens), &expected);
        assert!(error <= 1e-5, "{stage}, {tokens} tokens a call: relative RMS {error:e}");
    }
    let hidden = Mutex::new(Vec::new());
    let mut cache = model.new_cache(1, RowDtype::F32).unwrap();
    let read = model.read(&expected.ids, &mut cache, |start, block| {
        hidden.lock().unwrap().push((start, block));
        Ok::<_, ModelError>(())
    });
    read.unwrap();
    // Lanes give their blocks in any order.
    let mut hidden = hidden.into_inner().unwrap();
    hidden.sort_by_key(|&(start, _)| start);
    let hidden: Vec<Tensor> = hidden.into_iter().map(|(_, block)| block).collect();
    let hidden = Tensor::cat(&hidden, 0).unwrap();
    let error = error(&model.logits(&hidden).unwrap().to_vec2().unwrap(), &expected);
    assert!(error <= 1e-5, "{stage}, read: relative RMS {error:e}");
}

#[test]
fn stage_1_gives_the_float64_models_logits() {
    let dir = checkpoints();
    let model = load(&dir.path().join("stage1")).unwrap();
    let still = &model.student.as_ref().unwrap().config;
    assert_eq!((still.chunk, &still.budgets), (64, &vec![vec![4; 4]; 2]));
    assert_eq!(still.selection_head, SelectionHead::QueryHead);
    assert_eq!(still.linear_norm, LinearNorm::Sum);
    assert_eq!(still.feature_map, FeatureMap::NpMap { householder: true });
    assert!(still.gate && !still.window_factor);
    check(&model, "stage1");
}

#[test]
fn stage_2_is_found_by_its_adapter_or_beside_it() {
    let dir = checkpoints();
    let adapter = dir.path().join("stage2");
    let model = load(&adapter).unwrap();
    let lora = model.student.as_ref().unwrap().lora.clone().unwrap();
    assert_eq!((lora.rank, lora.alpha, lora.targets), (4, 8.0, LoraTarget::WITH_GATE.to_vec()));
    check(&model, "stage2");
    // The base by an absolute path; α left to its default; an adapter with a name of its own; a pattern of modules.
    let base = dir.path().join("stage1");
    edit_json(&adapter.join("adapter_config.json"), |json| {
        json["base_model_name_or_path"] = base.to_str().unwrap().into();
        json.as_object_mut().unwrap().remove("lora_alpha");
        json["target_modules"] = ".*_proj".into();
    });
    edit_tensors(&adapter.join("adapter_model.safetensors"), |tensors| {
        let named = |name: String| name.replace(".weight", ".default.weight");
        *tensors = tensors.drain().map(|(name, tensor)| (named(name), tensor)).collect();
    });
    check(&load(&adapter).unwrap(), "stage2");
    // Beside the weights, whatever base it was trained on.
    copy("stage2", &ADAPTER, &base);
    edit_json(&base.join("adapter_config.json"), |json| {
        json["base_model_name_or_path"] = "./checkpoints/still_at".into();
    });
    check(&load(&base).unwrap(), "stage2");
}

/// α/√r instead of α/r: with α = 4 the same scale at rank 4.
#[test]
fn a_rank_stabilised_adapter_has_its_own_scale() {
    let dir = checkpoints();
    let adapter = dir.path().join("stage2");
    edit_json(&adapter.join("adapter_config.json"), |json| {
        json["use_rslora"] = true.into();
        json["lora_alpha"] = 4.into();
    });
    check(&load(&adapter).unwrap(), "stage2");
}

/// What each part is worth: an import that left it out would be far from the logits.
#[test]
fn every_part_counts() {
    let dir = checkpoints();
    let base = dir.path().join("stage1");
    let weights = base.join("model.safetensors");
    let without = |part: &str| {
        copy("stage1", &STAGE1, &base);
        edit_tensors(&weights, |tensors| tensors.retain(|name, _| !name.contains(part)));
        let expected = expected("stage1");
        error(&logits(&load(&base).unwrap(), &expected.ids, 64), &expected)
    };
    for part in ["hh.u", "g_proj"] {
        assert!(without(part) > 1e-3, "{part}: {:e}", without(part));
    }
    assert!(without("window_factors") <= 1e-5, "their code saves it and does not use it");
    let adapter = dir.path().join("stage2/adapter_model.safetensors");
    copy("stage1", &STAGE1, &base);
    edit_tensors(&adapter, |tensors| tensors.retain(|name, _| !name.contains("g_proj")));
    edit_json(&dir.path().join("stage2/adapter_config.json"), |json| {
        json["target_modules"] = json!(["q_proj", "k_proj", "v_proj", "o_proj"]);
    });
    let expected = expected("stage2");
    let model = load(&dir.path().join("stage2")).unwrap();
    assert!(error(&logits(&model, &expected.ids, 64), &expected) > 1e-3);
}

/// A width of features that is not the head's, no reflection, no gate, another chunk: what a fork of their code may save.
#[test]
fn tensors_and_keys_say_what_there_is() {
    let dir = checkpoints();
    let base = dir.path().join("stage1");
    edit_tensors(&base.join("model.safetensors"), |tensors| {
        tensors.retain(|name, _| !name.contains("hh.u") && !name.contains("g_proj"));
        for (name, tensor) in tensors.iter_mut().filter(|(name, _)| name.contains(".linears.")) {
            assert_eq!(tensor.dims(), [16, 16], "{name}");
            *tensor = Tensor::cat(&[&*tensor, &tensor.narrow(0, 0, 8).unwrap()], 0).unwrap();
        }
    });
    edit_json(&base.join("config.json"), |json| {
        json["chunk_size"] = 32.into();
        json["topk_ratio"] = 0.25.into();
        json["feature_dim"] = 24.into();
        json["use_gate"] = false.into();
    });
    let model = load(&base).unwrap();
    let still = &model.student.as_ref().unwrap().config;
    assert_eq!((still.chunk, still.budgets[1][3], still.feature_dim), (32, 8, 24));
    assert_eq!(still.feature_map, FeatureMap::NpMap { householder: false });
    assert!(!still.gate);
    let ids = expected("stage1").ids;
    let (whole, single) = (logits(&model, &ids, ids.len()), logits(&model, &ids, 1));
    let same = Expected { positions: (0..ids.len()).collect(), logits: whole, ids };
    assert!(error(&single, &same) <= 1e-5);
}

/// Saved as ours, with all weights or as what differs from theirs, it is the same model.
#[test]
fn it_can_be_saved_as_ours() {
    let dir = checkpoints();
    for (stage, source) in [("stage1", "stage1"), ("stage2", "stage2")] {
        let model = load(&dir.path().join(source)).unwrap();
        for (kind, out) in [(ExportKind::Full(DType::F32), "full"), (ExportKind::Delta, "delta")] {
            let out = dir.path().join(format!("{stage}-{out}"));
            save_student(&out, &model, kind).unwrap();
            check(&load(&out).unwrap(), stage);
        }
    }
}

fn edit_json(path: &Path, edit: impl FnOnce(&mut Value)) {
    let mut json = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    edit(&mut json);
    fs::write(path, json.to_string()).unwrap();
}

fn edit_tensors(path: &Path, edit: impl FnOnce(&mut HashMap<String, Tensor>)) {
    let mut tensors = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    edit(&mut tensors);
    candle_core::safetensors::save(&tensors, path).unwrap();
}

/// The error of loading `stage` after an edit, which names a file and says what to do.
fn refused(stage: &str, edit: impl FnOnce(&Path)) -> String {
    let dir = checkpoints();
    let at = dir.path().join(stage);
    edit(&at);
    let error = load(&at).unwrap_err();
    assert!(error.hint().is_some(), "{error}");
    let text = error.to_string();
    assert!(text.contains(dir.path().to_str().unwrap()), "{text}");
    text
}

#[test]
fn keys_that_mean_something_else_are_refused_by_name() {
    for (key, value) in [
        ("feature_map", json!("hedgehog")),
        ("tie_feature_map_qk", json!(true)),
        ("expand_k", json!(0.5)),
        ("expand_v", json!(2)),
        ("attn", json!({ "layers": [0] })),
        ("chunk_size", json!("64")),
        ("chunk_size", json!(0)),
        ("chunk_size", json!(-64)),
        ("window_size", json!(128)),
        ("topk_ratio", json!(1.5)),
        ("topk", json!(65)),
        ("feature_dim", json!(32)),
        ("use_gate", json!(false)),
        ("householder", json!(false)),
        ("householder", json!(1)),
        ("affine_attention_factors", json!(true)),
        ("sparse_topk_layers", json!([1])),
        ("num_hidden_layers", json!(1)),
        ("num_hidden_layers", json!(3)),
        ("still", json!({})),
    ] {
        let config = |dir: &Path| {
            edit_json(&dir.join("config.json"), |json| json[key] = value.clone());
        };
        let text = refused("stage1", config);
        let named = match key {
            "num_hidden_layers" => "layer",
            "topk" => "65",
            "chunk_size" if value == json!(0) => "chunk",
            _ => key,
        };
        assert!(text.contains(named), "{key} = {value}: {text}");
    }
    // Two keys that contradict each other.
    let text = refused("stage1", |dir| {
        edit_json(&dir.join("config.json"), |json| {
            json["topk"] = 4.into();
            json["topk_ratio"] = 0.5.into();
        });
    });
    assert!(text.contains("topk_ratio"), "{text}");
}

#[test]
fn tensors_that_do_not_fit_are_refused_by_name() {
    type Edit = fn(&mut HashMap<String, Tensor>);
    const LAYER: &str = "model.layers.1.self_attn.";
    let cases: [(&str, Edit); 7] = [
        // The base that stage 1 starts from, with only its configuration edited.
        ("no feature maps", |tensors| {
            tensors.retain(|name, _| !name.contains("feature_map") && !name.contains("g_proj"));
        }),
        ("layer 1 has no g_proj", |tensors| {
            tensors.remove(&format!("{LAYER}g_proj.weight")).unwrap();
        }),
        ("layer 1 has no feature_map_k.hh.u", |tensors| {
            tensors.remove(&format!("{LAYER}feature_map_k.hh.u")).unwrap();
        }),
        ("feature_map_q.mlp.linears.2.weight is missing", |tensors| {
            tensors.remove(&format!("{LAYER}feature_map_q.mlp.linears.2.weight")).unwrap();
        }),
        ("feature_map_q.mlp.linears.4.weight", |tensors| {
            let map = tensors[&format!("{LAYER}feature_map_q.mlp.linears.3.weight")].clone();
            tensors.insert(format!("{LAYER}feature_map_q.mlp.linears.4.weight"), map);
        }),
        ("g_proj.bias", |tensors| {
            let bias = tensors["model.norm.weight"].clone();
            tensors.insert(format!("{LAYER}g_proj.bias"), bias);
        }),
        // LoLCATs' maps, of which there is one tensor a layer.
        ("feature_map_q.mlp.layer", |tensors| {
            let map = tensors[&format!("{LAYER}feature_map_q.mlp.linears.0.weight")].clone();
            tensors.insert(format!("{LAYER}feature_map_q.mlp.layer"), map);
        }),
    ];
    for (named, edit) in cases {
        let text = refused("stage1", |dir| edit_tensors(&dir.join("model.safetensors"), edit));
        assert!(text.contains(named), "{named}: {text}");
    }
}

#[test]
fn what_is_not_plain_lora_is_refused_by_name() {
    for (key, value) in [
        ("use_dora", json!(true)),
        ("fan_in_fan_out", json!(true)),
        ("bias", json!("all")),
        ("lora_bias", json!(true)),
        ("modules_to_save", json!(["feature_map_q"])),
        ("rank_pattern", json!({ "q_proj": 16 })),
        ("alpha_pattern", json!({ "q_proj": 16 })),
        ("layers_to_transform", json!([0])),
        ("layer_replication", json!([[0, 1]])),
        ("init_lora_weights", json!("pissa")),
        ("loftq_config", json!({ "loftq_bits": 4 })),
        ("peft_type", json!("IA3")),
        ("revision", json!("5e3a")),
        ("something_of_tomorrow", json!("x")),
        ("r", json!(0)),
        ("r", json!("4")),
        ("lora_alpha", json!("8")),
        ("use_rslora", json!(1)),
        ("target_modules", json!([1])),
        ("base_model_name_or_path", json!(3)),
    ] {
        let text = refused("stage2", |dir| {
            edit_json(&dir.join("adapter_config.json"), |json| json[key] = value.clone());
        });
        assert!(text.contains(key) && text.contains("adapter_config.json"), "{key}: {text}");
    }
    for (named, key, value) in [
        ("its rank and base need", "r", json!(8)),
        ("its rank and base need", "r", json!(1_000_000_000_000_u64)),
        ("no update of gate_proj", "target_modules", json!(["q_proj", "gate_proj"])),
    ] {
        let text = refused("stage2", |dir| {
            edit_json(&dir.join("adapter_config.json"), |json| json[key] = value.clone());
        });
        assert!(text.contains(named), "{named}: {text}");
    }
}

#[test]
fn an_adapters_tensors_belong_to_its_base() {
    type Edit = fn(&mut HashMap<String, Tensor>);
    const STEM: &str = "base_model.model.model.layers";
    fn add(tensors: &mut HashMap<String, Tensor>, name: &str) {
        let any = tensors.values().next().unwrap().clone();
        tensors.insert(name.to_owned(), any);
    }
    let cases: [(&str, Edit); 6] = [
        ("layers.1.self_attn.o_proj.lora_B.weight is missing", |tensors| {
            tensors.remove(&format!("{STEM}.1.self_attn.o_proj.lora_B.weight")).unwrap();
        }),
        ("mlp.gate_proj.lora_A", |tensors| {
            add(tensors, &format!("{STEM}.0.mlp.gate_proj.lora_A.weight"));
        }),
        ("lora_magnitude_vector", |tensors| {
            add(tensors, &format!("{STEM}.0.self_attn.q_proj.lora_magnitude_vector"));
        }),
        ("layers.2.self_attn.q_proj.lora_A", |tensors| {
            add(tensors, &format!("{STEM}.2.self_attn.q_proj.lora_A.weight"));
        }),
        ("under two names", |tensors| {
            add(tensors, &format!("{STEM}.0.self_attn.q_proj.lora_A.default.weight"));
        }),
        ("empty", HashMap::clear),
    ];
    for (named, edit) in cases {
        let text =
            refused("stage2", |dir| edit_tensors(&dir.join("adapter_model.safetensors"), edit));
        assert!(text.contains(named), "{named}: {text}");
    }
    let no_gate = refused("stage2", |dir| {
        let base = dir.parent().unwrap().join("stage1/model.safetensors");
        edit_tensors(&base, |tensors| tensors.retain(|name, _| !name.contains("g_proj")));
    });
    assert!(no_gate.contains("g_proj"), "{no_gate}");
}

#[test]
fn an_adapter_without_its_base_says_what_to_do() {
    let config = |dir: &Path, edit: fn(&mut Value)| {
        edit_json(&dir.join("adapter_config.json"), edit);
    };
    let gone = refused("stage2", |dir| {
        config(dir, |json| json["base_model_name_or_path"] = "./not/there".into());
    });
    assert!(gone.contains("not/there"), "{gone}");
    let none = refused("stage2", |dir| {
        config(dir, |json| json["base_model_name_or_path"] = Value::Null);
    });
    assert!(none.contains("base_model_name_or_path"), "{none}");
    // Itself.
    let own =
        refused("stage2", |dir| config(dir, |json| json["base_model_name_or_path"] = ".".into()));
    assert!(own.contains("no config.json"), "{own}");
    // A base with an adapter of its own, and a dense one.
    let twice =
        refused("stage2", |dir| copy("stage2", &ADAPTER, &dir.parent().unwrap().join("stage1")));
    assert!(twice.contains("adapter"), "{twice}");
    let dense = refused("stage2", |dir| {
        edit_json(&dir.parent().unwrap().join("stage1/config.json"), |json| {
            json["model_type"] = "llama".into();
        });
    });
    assert!(dense.contains("not from STILL's authors"), "{dense}");
    let binary = refused("stage2", |dir| {
        fs::remove_file(dir.join("adapter_model.safetensors")).unwrap();
    });
    assert!(binary.contains("adapter_model.safetensors"), "{binary}");
}
