//! Students saved and read back: full, delta, official names; saves that are cut off.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use still_attention::{FeatureMap, LinearNorm, RowDtype, SelectionHead, StillConfig};
use still_model::random::{random_model, save_base, tiny_config};
use still_model::{
    Architecture, Checkpoint, Decoder, ExportKind, FeatureInit, GgufFormat, LoraConfig, LoraTarget,
    Model, ModelConfig, ModelError, RopeScaling, Student, Weight, Weights, export_gguf, names,
    save_student,
};
use still_testing::relative_rms;

/// A student with everything that can be learned, at values that are not the initial ones.
fn student(model: &Model) -> Student {
    let config = model.config();
    let mut still = StillConfig::uniform(config.num_hidden_layers, config.geometry(), 8, 2);
    still.gate = true;
    still.window_factor = true;
    still.linear_norm = LinearNorm::Mean;
    still.feature_map = FeatureMap::NpMap { householder: true };
    let mut student = Student::init(still, config, FeatureInit::Normal, 5).unwrap();
    let lora = LoraConfig { rank: 2, alpha: 4.0, targets: LoraTarget::WITH_GATE.to_vec() };
    student.add_lora(config, lora, 6).unwrap();
    let mut shift = 0.0;
    let moved = student.map_tensors(|_, tensor| {
        shift += 0.001;
        Ok((tensor + shift)?)
    });
    moved.unwrap()
}

/// Bases that differ in what their layers hold.
fn configs() -> [ModelConfig; 2] {
    let normed = ModelConfig { architecture: Architecture::Qwen3, head_dim: 12, ..tiny_config() };
    [tiny_config(), normed]
}

/// Logits of a model that reads 60 tokens.
pub fn logits(model: &Model) -> Vec<f32> {
    let ids: Vec<u32> = (0..60).map(|t| (t * 37 + 5) % 256).collect();
    let mut cache = model.new_cache(1, RowDtype::F32).unwrap();
    let ids = Tensor::new(ids, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let hidden = model.forward(&ids, &mut cache, None).unwrap();
    model.logits(&hidden).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// A base on disk.
fn base_on_disk(dir: &Path, model: &Model) -> Model {
    save_base(dir, model, DType::F32).unwrap();
    Model::load(dir.to_str().unwrap()).unwrap()
}

#[test]
fn a_full_f32_export_gives_identical_logits() {
    for config in configs() {
        let dir = tempfile::tempdir().unwrap();
        let model = random_model(config.clone(), 1).unwrap();
        let (decoder, merged) = student(&model).merged_into(&model.decoder).unwrap();
        let merged = Model { decoder: decoder.into(), student: Some(merged), ..model.clone() };
        let out = dir.path().join("student");
        save_student(&out, &model.with_student(student(&model)), ExportKind::Full(DType::F32))
            .unwrap();
        let loaded = Model::load(out.to_str().unwrap()).unwrap();
        assert_eq!(logits(&loaded), logits(&merged));
        // Merging itself only rounds.
        assert!(
            relative_rms(&logits(&merged), &logits(&model.with_student(student(&model)))) < 1e-5
        );
        assert_eq!(loaded.config(), model.config());
    }
}

#[test]
fn a_bf16_export_is_itself_after_rounding() {
    let dir = tempfile::tempdir().unwrap();
    let model = random_model(tiny_config(), 1).unwrap();
    let first = dir.path().join("first");
    save_student(&first, &model.with_student(student(&model)), ExportKind::Full(DType::BF16))
        .unwrap();
    let loaded = Model::load(first.to_str().unwrap()).unwrap();
    let error = relative_rms(&logits(&loaded), &logits(&model.with_student(student(&model))));
    assert!(error > 0.0 && error < 5e-2, "{error}");
    let second = dir.path().join("second");
    save_student(&second, &loaded, ExportKind::Full(DType::BF16)).unwrap();
    assert_eq!(logits(&Model::load(second.to_str().unwrap()).unwrap()), logits(&loaded));
}

/// As it is on a GPU: weights in bf16, what was learned in f32.
#[test]
fn a_student_of_a_bf16_base_is_merged_in_f32() {
    let dir = tempfile::tempdir().unwrap();
    let wide = random_model(tiny_config(), 1).unwrap();
    let learned = student(&wide);
    let mut decoder = (*wide.decoder).clone();
    let narrow = |weight: &mut Weight| {
        *weight = weight.to_tensor().unwrap().to_dtype(DType::BF16).unwrap().into();
    };
    narrow(&mut decoder.embed_tokens);
    narrow(&mut decoder.lm_head);
    for layer in &mut decoder.layers {
        for linear in [&mut layer.q_proj, &mut layer.k_proj, &mut layer.v_proj, &mut layer.o_proj] {
            narrow(&mut linear.weight);
        }
        for linear in [&mut layer.mlp.gate, &mut layer.mlp.up, &mut layer.mlp.down] {
            narrow(&mut linear.weight);
        }
    }
    let decoder = Arc::new(decoder);
    // The same values, wide: what a save of the narrow ones must be equal to.
    let mut tensors = HashMap::new();
    let widen = decoder.visit_tensors(|name, tensor| {
        tensors.insert(name.to_owned(), tensor.to_dtype(DType::F32)?);
        Ok(())
    });
    widen.unwrap();
    let weights = Weights::from_tensors(tensors);
    let widened = Decoder::load(wide.config(), &weights, &Device::Cpu, DType::F32).unwrap();
    let expected = Model { decoder: widened.into(), ..wide.clone() }.with_student(learned.clone());

    let model = Model { decoder, ..wide }.with_student(learned);
    for (dtype, bound) in [(DType::F32, 1e-5), (DType::BF16, 5e-2)] {
        let out = dir.path().join("student");
        save_student(&out, &model, ExportKind::Full(dtype)).unwrap();
        let loaded = Model::load(out.to_str().unwrap()).unwrap();
        let error = relative_rms(&logits(&loaded), &logits(&expected));
        assert!(error < bound, "{dtype:?}: {error}");
    }
    let out = dir.path().join("student.gguf");
    export_gguf(&out, &model, GgufFormat::Q8_0).unwrap();
    assert!(worst_matrix(&Model::load(out.to_str().unwrap()).unwrap(), &expected) < 0.008);
    let (merged, _) = model.student.as_ref().unwrap().merged_into(&model.decoder).unwrap();
    assert_eq!(merged.layers[0].q_proj.weight.to_tensor().unwrap().dtype(), DType::BF16);
}

#[test]
fn a_delta_gives_identical_logits_and_checks_its_base() {
    for config in configs() {
        let dir = tempfile::tempdir().unwrap();
        let base_dir = dir.path().join("base");
        let base = base_on_disk(&base_dir, &random_model(config.clone(), 1).unwrap());
        assert!(base.student.is_none());
        let model = base.with_student(student(&base));
        let out = dir.path().join("delta");
        save_student(&out, &model, ExportKind::Delta).unwrap();
        assert!(!out.join("model.safetensors").exists());
        let loaded = Model::load(out.to_str().unwrap()).unwrap();
        assert_eq!(logits(&loaded), logits(&model));

        // Another base in the same place is noticed.
        std::fs::remove_dir_all(&base_dir).unwrap();
        let gone = Model::load(out.to_str().unwrap()).unwrap_err();
        assert!(gone.to_string().contains("could not be opened"), "{gone}");
        base_on_disk(&base_dir, &random_model(config.clone(), 2).unwrap());
        let other = Model::load(out.to_str().unwrap()).unwrap_err();
        assert!(other.to_string().contains("sha256"), "{other}");
    }
}

/// Half the bytes, and what it computes is what a student of the rounded values does.
#[test]
fn a_delta_in_f16_has_rounded_matrices_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let base = base_on_disk(&dir.path().join("base"), &random_model(tiny_config(), 1).unwrap());
    let learned = student(&base);
    let path = |name: &str| dir.path().join(name);
    let save = |name: &str, student, kind| {
        save_student(&path(name), &base.with_student(student), kind).unwrap();
        Model::load(path(name).to_str().unwrap()).unwrap()
    };
    let small = save("f16", learned.clone(), ExportKind::DeltaIn(DType::F16));
    let rounded = learned.map_tensors(|name, tensor| {
        let matrix = !["log_lambda", "window_factor"].iter().any(|of| name.ends_with(of));
        let rounded = tensor.to_dtype(DType::F16)?.to_dtype(DType::F32)?;
        Ok(if matrix { rounded } else { tensor.clone() })
    });
    let whole = save("f32", rounded.unwrap(), ExportKind::Delta);
    assert_eq!(logits(&small), logits(&whole));
    let bytes =
        |name: &str| std::fs::metadata(path(name).join("student.safetensors")).unwrap().len();
    assert!(bytes("f16") < bytes("f32") * 3 / 4, "{} of {}", bytes("f16"), bytes("f32"));

    let large = learned.map_tensors(|name, tensor| {
        Ok(if name.ends_with("feature_map_q") { (tensor * 1e6)? } else { tensor.clone() })
    });
    let out = path("large");
    let error =
        save_student(&out, &base.with_student(large.unwrap()), ExportKind::DeltaIn(DType::F16));
    assert!(error.unwrap_err().to_string().contains("does not hold"));
    assert!(!out.exists());
}

#[test]
fn a_delta_of_a_model_in_memory_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let model = random_model(tiny_config(), 1).unwrap();
    let out = dir.path().join("delta");
    let error = save_student(&out, &model.with_student(student(&model)), ExportKind::Delta);
    assert!(matches!(error, Err(ModelError::Invalid(_))));
    assert!(!out.exists());
    let left: Vec<_> = dir.path().read_dir().unwrap().collect();
    assert!(left.is_empty(), "a refused save left {left:?}");
}

#[test]
fn official_names_are_read() {
    // Per-head maps [out, in], reflections and gate under the official names; φ_k per query head.
    let model = random_model(tiny_config(), 1).unwrap();
    let config = model.config();
    let mut still = StillConfig::uniform(config.num_hidden_layers, config.geometry(), 8, 2);
    still.selection_head = SelectionHead::QueryHead;
    still.budgets = vec![vec![2; 4]; 2];
    still.gate = true;
    still.linear_norm = LinearNorm::Sum;
    still.feature_map = FeatureMap::NpMap { householder: true };
    let student = Student::init(still.clone(), config, FeatureInit::Normal, 5).unwrap();
    let tensors: HashMap<String, Tensor> =
        student.checkpoint_tensors().unwrap().into_iter().collect();
    for name in [
        "model.layers.1.self_attn.feature_map_q.mlp.linears.3.weight",
        "model.layers.1.self_attn.feature_map_k.mlp.linears.3.weight",
        "model.layers.0.self_attn.feature_map_q.hh.u",
        "model.layers.0.self_attn.feature_map_k.hh.u",
        "model.layers.0.self_attn.g_proj.weight",
    ] {
        assert!(tensors.contains_key(name), "{name}");
    }
    let map = student.layers[1].attention.feature_map_k.get(3).unwrap().t().unwrap();
    let saved = &tensors["model.layers.1.self_attn.feature_map_k.mlp.linears.3.weight"];
    assert_eq!(saved.to_vec2::<f32>().unwrap(), map.to_vec2::<f32>().unwrap());
    let weights = still_model::Weights::from_tensors(tensors);
    let read = Student::from_weights(still, None, config, &weights).unwrap();
    assert_eq!(logits(&model.with_student(read)), logits(&model.with_student(student)));
}

#[test]
fn a_student_from_before_the_window_factor_and_modes_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let model = random_model(tiny_config(), 1).unwrap();
    let config = model.config();
    let still = StillConfig::uniform(config.num_hidden_layers, config.geometry(), 8, 2);
    let student = Student::init(still, config, FeatureInit::Identity, 0).unwrap();
    let out = dir.path().join("student");
    save_student(&out, &model.with_student(student), ExportKind::Full(DType::F32)).unwrap();
    let expected = logits(&Model::load(out.to_str().unwrap()).unwrap());
    let path = out.join("config.json");
    let mut json: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    let still = json["still"].as_object_mut().unwrap();
    still.remove("window_factor").unwrap();
    still.remove("mode").unwrap();
    std::fs::write(&path, json.to_string()).unwrap();
    assert_eq!(logits(&Model::load(out.to_str().unwrap()).unwrap()), expected);
}

#[test]
fn a_save_that_was_cut_off_leaves_the_one_before() {
    let dir = tempfile::tempdir().unwrap();
    let model = random_model(tiny_config(), 1).unwrap();
    let model = model.with_student(student(&model));
    let out = dir.path().join("student");
    save_student(&out, &model, ExportKind::Full(DType::F32)).unwrap();
    let expected = logits(&Model::load(out.to_str().unwrap()).unwrap());
    // Killed while writing: a staging directory is left, the student is whole.
    let half = dir.path().join(".still-saving-abc");
    std::fs::create_dir(&half).unwrap();
    std::fs::write(half.join("model.safetensors"), b"half").unwrap();
    assert_eq!(logits(&Model::load(out.to_str().unwrap()).unwrap()), expected);
    // Killed between the two renames: what stood there has another name, and is found.
    std::fs::rename(&out, dir.path().join(".student.previous")).unwrap();
    assert_eq!(logits(&Model::load(out.to_str().unwrap()).unwrap()), expected);
    // The next save tidies up.
    save_student(&out, &model, ExportKind::Full(DType::F32)).unwrap();
    save_student(&out, &model, ExportKind::Full(DType::F32)).unwrap();
    assert!(!dir.path().join(".student.previous").exists());
}

#[test]
fn a_directory_of_something_else_is_never_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("thesis.tex"), "years of work").unwrap();
    let model = random_model(tiny_config(), 1).unwrap();
    let model = model.with_student(student(&model));
    let error = save_student(dir.path(), &model, ExportKind::Full(DType::F32)).unwrap_err();
    assert!(error.to_string().contains("not a student"));
    assert!(dir.path().join("thesis.tex").exists());
}

#[test]
fn sharded_weights_and_a_missing_shard() {
    let dir = tempfile::tempdir().unwrap();
    let base = base_on_disk(dir.path(), &random_model(tiny_config(), 1).unwrap());
    let expected = logits(&base);
    let single = dir.path().join("model.safetensors");
    let all = candle_core::safetensors::load(&single, &Device::Cpu).unwrap();
    std::fs::remove_file(&single).unwrap();
    let mut shards: [HashMap<String, Tensor>; 2] = Default::default();
    let mut map = serde_json::Map::new();
    for (i, (name, tensor)) in all.into_iter().enumerate() {
        map.insert(name.clone(), format!("part{}.safetensors", i % 2).into());
        shards[i % 2].insert(name, tensor);
    }
    for (i, shard) in shards.iter().enumerate() {
        let path = dir.path().join(format!("part{i}.safetensors"));
        candle_core::safetensors::save(shard, path).unwrap();
    }
    let index = serde_json::json!({ "weight_map": map });
    std::fs::write(dir.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    let path = dir.path().to_str().unwrap();
    assert_eq!(logits(&Model::load(path).unwrap()), expected);
    std::fs::remove_file(dir.path().join("part1.safetensors")).unwrap();
    let error = Model::load(path).unwrap_err();
    assert!(error.to_string().contains("part1.safetensors"), "{error}");
    assert!(error.hint().is_some());
}

#[test]
fn qwen2_has_biases_and_round_trips() {
    let config = ModelConfig {
        architecture: Architecture::Qwen2,
        attention_bias: true,
        tie_word_embeddings: false,
        ..tiny_config()
    };
    let model = random_model(config, 3).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let base = base_on_disk(&dir.path().join("base"), &model);
    assert_eq!(base.config(), model.config());
    assert_eq!(logits(&base), logits(&model));
    let mut unbiased = (*model.decoder).clone();
    unbiased.layers[0].k_proj.bias = None;
    let unbiased = Model { decoder: unbiased.into(), ..model.clone() };
    assert!(relative_rms(&logits(&unbiased), &logits(&model)) > 1e-3, "the bias counts");
}

#[test]
fn configurations_in_hugging_faces_words() {
    let json = serde_json::json!({
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
        "vocab_size": 128256, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "max_position_embeddings": 131072, "tie_word_embeddings": true,
        "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009],
        "rope_scaling": { "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
                          "high_freq_factor": 4.0, "original_max_position_embeddings": 8192 },
    });
    let config = ModelConfig::from_hf_json(&json).unwrap();
    assert_eq!(config.eos_token_ids, [128001, 128008, 128009]);
    assert!(matches!(config.rope_scaling, Some(RopeScaling::Llama3 { factor: 32.0, .. })));
    let again = ModelConfig::from_hf_json(&config.to_hf_json()).unwrap();
    assert_eq!(again, config);
    let with = |key: &str, value: serde_json::Value| {
        let mut json = json.clone();
        json[key] = value;
        ModelConfig::from_hf_json(&json).unwrap_err().to_string()
    };
    assert!(with("model_type", "mamba".into()).contains("mamba"));
    assert!(with("num_key_value_heads", 5.into()).contains("not a multiple"));
    assert!(with("hidden_act", "gelu".into()).contains("gelu"));
    assert!(with("rope_scaling", serde_json::json!({ "rope_type": "yarn" })).contains("yarn"));
    assert!(with("vocab_size", serde_json::Value::Null).contains("vocab_size"));
}

#[test]
fn names_and_hub_ids() {
    assert_eq!(
        names::to_gguf(Architecture::Llama, "model.layers.3.mlp.up_proj.weight").as_deref(),
        Some("blk.3.ffn_up.weight")
    );
    assert_eq!(
        names::from_gguf(Architecture::Qwen3, "blk.3.attn_q_norm.weight").as_deref(),
        Some("model.layers.3.self_attn.q_norm.weight")
    );
    let error = Checkpoint::open("/no/such/place").unwrap_err();
    assert!(error.to_string().contains("/no/such/place") && error.hint().is_some());
}

/// Wide enough for blocks of 256 in some matrices and of 32 in the others.
fn wide_config() -> ModelConfig {
    ModelConfig { hidden_size: 96, intermediate_size: 256, ..tiny_config() }
}

/// The largest relative error of any tensor, the students' updates merged.
fn worst_matrix(got: &Model, expected: &Model) -> f64 {
    let tensors = |model: &Model| {
        let (decoder, student) =
            model.student.as_ref().unwrap().merged_into(&model.decoder).unwrap();
        let mut all: Vec<(String, Vec<f32>)> = Vec::new();
        let mut add = |name: &str, tensor: &Tensor| {
            all.push((name.to_owned(), tensor.flatten_all().unwrap().to_vec1().unwrap()));
        };
        decoder
            .visit_tensors(|name, tensor| {
                add(name, &tensor);
                Ok(())
            })
            .unwrap();
        student.checkpoint_tensors().unwrap().iter().for_each(|(name, tensor)| add(name, tensor));
        all
    };
    let pairs = tensors(got).into_iter().zip(tensors(expected));
    pairs.fold(0.0, |worst, ((name, got), (expected_name, expected))| {
        assert_eq!(name, expected_name);
        worst.max(relative_rms(&got, &expected))
    })
}

#[test]
fn quantized_exports_differ_by_their_rounding() {
    let dir = tempfile::tempdir().unwrap();
    let architectures = [
        (Architecture::Llama, true),
        (Architecture::Qwen2, false),
        (Architecture::Mistral, false),
        (Architecture::Qwen3, true),
    ];
    for (architecture, tie_word_embeddings) in architectures {
        let attention_bias = architecture == Architecture::Qwen2;
        // What GGUF's own keys could not say must come back too.
        let rope_scaling = Some(RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 64,
        });
        let config = ModelConfig {
            architecture,
            tie_word_embeddings,
            attention_bias,
            rope_scaling,
            ..wide_config()
        };
        let base = random_model(config, 3).unwrap();
        let mut learned = student(&base);
        learned.recipe = Some(serde_json::json!({ "seed": 5 }));
        let model = base.with_student(learned);
        let out = dir.path().join("student.gguf");
        let mut errors = Vec::new();
        for (format, other, counts) in [
            (GgufFormat::Q8_0, 0, vec![("Q8_0", 15)]),
            (GgufFormat::Q4_1, 0, vec![("Q4_1", 14), ("Q8_0", 1)]),
            (GgufFormat::Q4K, 12, vec![("Q4K", 2), ("Q4_1", 12), ("Q8_0", 1)]),
        ] {
            let export = export_gguf(&out, &model, format).unwrap();
            let vocabularies = 1 + usize::from(!tie_word_embeddings);
            let expected = counts.into_iter().map(|(name, count)| {
                (name.to_owned(), count + if name == "Q8_0" { vocabularies - 1 } else { 0 })
            });
            assert_eq!(export.matrices, expected.collect());
            assert_eq!((export.other_format, export.bytes), (other, out.metadata().unwrap().len()));
            let loaded = Model::load(out.to_str().unwrap()).unwrap();
            assert_eq!(loaded.config(), model.config());
            let (read, saved) = (loaded.student.as_ref().unwrap(), model.student.as_ref().unwrap());
            assert_eq!((&read.config, &read.recipe), (&saved.config, &saved.recipe));
            assert!(read.lora.is_none(), "updates are merged");
            assert_eq!(
                loaded.tokenizer.encode("a<|im_end|>", true).unwrap(),
                model.tokenizer.encode("a<|im_end|>", true).unwrap()
            );
            assert!(loaded.tokenizer.chat_template().is_some());
            errors.push(worst_matrix(&loaded, &model));
            if format == GgufFormat::Q8_0 {
                // Through two layers and a routing, small errors stay small.
                let error = relative_rms(&logits(&loaded), &logits(&model));
                assert!(error > 0.0 && error < 0.03, "{error}");
            }
            // Once rounded, values stay about where they are.
            let again = dir.path().join("again.gguf");
            export_gguf(&again, &loaded, format).unwrap();
            let moved = worst_matrix(&Model::load(again.to_str().unwrap()).unwrap(), &loaded);
            assert!(moved < errors.last().unwrap() / 2.0, "{format:?}: {moved}");
        }
        // Half a step of 1/127 of the largest of 32 values, and of 1/15 of their range.
        assert!(errors[0] > 0.002 && errors[0] < 0.008, "{errors:?}");
        assert!(errors[1..].iter().all(|error| (0.05..0.12).contains(error)), "{errors:?}");
    }
}

#[test]
fn a_quantized_delta_equals_the_quantized_full_student() {
    let dir = tempfile::tempdir().unwrap();
    let base = base_on_disk(&dir.path().join("base"), &random_model(wide_config(), 1).unwrap());
    let model = base.with_student(student(&base));
    let mut outputs = Vec::new();
    for (name, kind) in [("full", ExportKind::Full(DType::F32)), ("delta", ExportKind::Delta)] {
        let path = dir.path().join(name);
        save_student(&path, &model, kind).unwrap();
        let out = dir.path().join(format!("{name}.gguf"));
        let loaded = Model::load(path.to_str().unwrap()).unwrap();
        export_gguf(&out, &loaded, GgufFormat::Q8_0).unwrap();
        outputs.push(logits(&Model::load(out.to_str().unwrap()).unwrap()));
    }
    assert_eq!(outputs[0], outputs[1]);
}

#[test]
fn exports_that_cannot_be_are_refused_and_leave_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let base = random_model(tiny_config(), 1).unwrap();
    let model = base.with_student(student(&base));
    assert!(export_gguf(&dir.path().join("a.gguf"), &base, GgufFormat::Q8_0).is_err());
    let error = export_gguf(&dir.path().join("a.bin"), &model, GgufFormat::Q8_0).unwrap_err();
    assert!(error.to_string().contains("a.bin") && error.hint().is_some());
    assert!(export_gguf(&dir.path().join("no/a.gguf"), &model, GgufFormat::Q8_0).is_err());
    assert_eq!(dir.path().read_dir().unwrap().count(), 0);

    // A file without its configuration, and one that is cut off.
    let out = dir.path().join("a.gguf");
    export_gguf(&out, &model, GgufFormat::Q8_0).unwrap();
    let bytes = std::fs::read(&out).unwrap();
    let open = |bytes: &[u8]| {
        std::fs::write(&out, bytes).unwrap();
        let error = Model::load(out.to_str().unwrap()).unwrap_err();
        assert!(error.hint().is_some(), "{error}");
        error.to_string()
    };
    assert!(open(&bytes[..bytes.len() - 100]).contains("truncated"));
    let key = b"still.config";
    let at = bytes.windows(key.len()).position(|window| window == key).unwrap();
    let mut renamed = bytes.clone();
    renamed[at] = b'x';
    assert!(open(&renamed).contains("still.config"));
    let json = at + key.len() + 12;
    let mut broken = bytes.clone();
    broken[json] = b'x';
    assert!(open(&broken).contains("not JSON"));
    // Without its attention it is not to be taken for a dense model.
    let section = br#""still":"#;
    let at = bytes.windows(section.len()).position(|window| window == section).unwrap();
    let mut dense = bytes.clone();
    dense[at + 1] = b'x';
    assert!(open(&dense).contains("\"still\" is missing"));
}

#[test]
fn a_tokenizer_configuration_that_is_no_object_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    base_on_disk(dir.path(), &random_model(tiny_config(), 1).unwrap());
    std::fs::write(dir.path().join("tokenizer_config.json"), "[]").unwrap();
    std::fs::write(dir.path().join("chat_template.jinja"), "{{ messages }}").unwrap();
    let error = Model::load(dir.path().to_str().unwrap()).unwrap_err();
    assert!(error.to_string().contains("tokenizer_config.json") && error.hint().is_some());
}
