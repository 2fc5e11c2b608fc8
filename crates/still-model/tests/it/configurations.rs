//! What a Hugging Face configuration may say: values by type and range, RoPE as transformers 5 reads it, keys that change
//! arithmetic. Nothing here needs weights.

use serde_json::{Value, json};
use still_model::{Checkpoint, ModelConfig, ModelError, RopeScaling};

fn base(model_type: &str) -> Value {
    json!({
        "model_type": model_type, "hidden_act": "silu", "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "vocab_size": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 2048,
        "tie_word_embeddings": true, "bos_token_id": 0, "eos_token_id": 1, "sliding_window": null,
        "torch_dtype": "float32", "dtype": "float32", "architectures": ["LlamaForCausalLM"],
        "transformers_version": "5.24.0", "attention_dropout": 0.0, "pretraining_tp": 2, "use_cache": true,
    })
}

fn with(model_type: &str, changes: &Value) -> still_model::Result<ModelConfig> {
    let mut json = base(model_type);
    for (key, value) in changes.as_object().unwrap() {
        json[key] = value.clone();
    }
    ModelConfig::from_hf_json(&json)
}

fn without(key: &str, changes: &Value) -> still_model::Result<ModelConfig> {
    let mut json = base("llama");
    json.as_object_mut().unwrap().remove(key).unwrap();
    for (key, value) in changes.as_object().unwrap() {
        json[key] = value.clone();
    }
    ModelConfig::from_hf_json(&json)
}

/// An error that names a key and begins with it.
fn refused(model_type: &str, changes: &Value, key: &str) -> ModelError {
    let error = with(model_type, changes).expect_err(&changes.to_string());
    assert!(
        matches!(error, ModelError::Invalid(_) | ModelError::Unsupported { .. }),
        "{changes}: {error:?}"
    );
    assert!(error.to_string().contains(key), "{changes}: {error} does not name {key}");
    error
}

#[test]
fn a_value_of_the_wrong_type_or_range_is_never_the_default() {
    for (key, values) in [
        ("rope_theta", json!(["500000", 0, -1.0, true, [], 1e300])),
        ("rope_scaling", json!(["linear", 4.0, [], true])),
        ("rope_parameters", json!(["linear", 4.0, []])),
        ("head_dim", json!([-1, 0, "16", 16.0, 15, 1_000_000_000, 9_223_372_036_854_775_808_u64])),
        ("hidden_act", json!([3, true, "gelu", "relu2"])),
        ("hidden_activation", json!([3, "gelu_pytorch_tanh"])),
        ("attention_bias", json!(["yes", 1, "true"])),
        ("mlp_bias", json!(["no", 0])),
        (
            "eos_token_id",
            json!(["2", -1, 4_294_967_296_u64, 1.5, [1, "2"], [1, -1], [[1]], { "id": 1 }]),
        ),
        ("bos_token_id", json!(["1", -1, 4_294_967_296_u64, [1]])),
        ("max_position_embeddings", json!([1e4, -1, 0, "2048", 4_294_967_296_u64])),
        ("rms_norm_eps", json!([1e308, 0, -1e-5, "1e-5", true, 2.0])),
        ("hidden_size", json!([0, -64, 64.0, "64", 1e18, 18_446_744_073_709_551_615_u64])),
        ("intermediate_size", json!([0, null, [128], 1_000_000_000_000_u64])),
        ("num_hidden_layers", json!([0, 1_000_000, "2"])),
        ("num_attention_heads", json!([0, 5, 1_000_000, "4"])),
        ("num_key_value_heads", json!([0, 3, "2", -2, false])),
        ("vocab_size", json!([0, null, 1_000_000_000, "512"])),
        ("tie_word_embeddings", json!(["true", 1, []])),
        ("sliding_window", json!(["4096", -1, true])),
        ("use_sliding_window", json!(["false", 0])),
        ("max_window_layers", json!(["28", -1])),
        ("layer_types", json!(["full_attention", [1, 2], ["full_attention"]])),
        ("partial_rotary_factor", json!(["1", 2.0, -1])),
        ("original_max_position_embeddings", json!(["8192", 0, 8192.0])),
        ("model_type", json!([3, null])),
    ] {
        for value in values.as_array().unwrap() {
            refused("llama", &json!({ key: value }), key);
        }
    }
    for json in [json!([]), json!("llama"), json!(null), json!(3)] {
        assert!(ModelConfig::from_hf_json(&json).unwrap_err().to_string().contains("JSON object"));
    }
    // What was found and what is expected.
    let error = refused("llama", &json!({ "rope_theta": "500000" }), "rope_theta");
    assert!(error.to_string().contains("is \"500000\", expected a number from 1 to"), "{error}");
}

#[test]
fn what_is_left_out_is_as_in_transformers() {
    let lean = |model_type: &str| {
        ModelConfig::from_hf_json(&json!({
            "model_type": model_type, "hidden_size": 2048, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 32, "vocab_size": 512, "sliding_window": null,
        }))
        .unwrap()
    };
    for (model_type, kv_heads, head_dim, context) in [
        ("llama", 32, 64, 2048),
        ("mistral", 8, 64, 131_072),
        ("qwen2", 32, 64, 32_768),
        ("qwen3", 32, 128, 32_768),
    ] {
        let config = lean(model_type);
        assert_eq!(
            (config.num_key_value_heads, config.head_dim),
            (kv_heads, head_dim),
            "{model_type}"
        );
        assert_eq!(config.max_position_embeddings, context, "{model_type}");
        assert_eq!((config.rms_norm_eps, config.rope_theta), (1e-6, 1e4), "{model_type}");
        assert!(!config.tie_word_embeddings && config.eos_token_ids.is_empty());
    }
    // Null is a value in one place: as many KV heads as query heads.
    let config = with("mistral", &json!({ "num_key_value_heads": null })).unwrap();
    assert_eq!(config.num_key_value_heads, 4);
    let error = with("llama", &json!({ "head_dim": null, "hidden_size": 66 })).unwrap_err();
    assert!(error.to_string().contains("hidden_size 66"), "{error}");
    // "swish" is SiLU, integers are numbers.
    with("llama", &json!({ "hidden_act": "swish", "rope_theta": 500_000 })).unwrap();
}

#[test]
fn rope_is_read_as_transformers_reads_it() {
    let theta = |changes: &Value| with("llama", changes).unwrap().rope_theta;
    // The table precedes the key outside; without either, 10000.
    let default = json!({ "rope_type": "default", "rope_theta": 500_000.0 });
    assert_eq!(theta(&json!({ "rope_parameters": default })), 500_000.0);
    assert_eq!(theta(&json!({ "rope_scaling": default })), 500_000.0);
    assert_eq!(
        without("rope_theta", &json!({ "rope_scaling": default })).unwrap().rope_theta,
        500_000.0
    );
    assert_eq!(theta(&json!({ "rope_parameters": { "rope_type": "default" } })), 10_000.0);
    assert_eq!(without("rope_theta", &json!({})).unwrap().rope_theta, 10_000.0);
    assert_eq!(
        theta(&json!({ "rope_theta": 7.0, "rope_scaling": {}, "rope_parameters": null })),
        7.0
    );

    let scaling = |changes: &Value| with("llama", changes).unwrap().rope_scaling;
    let linear = Some(RopeScaling::Linear { factor: 4.0 });
    assert_eq!(scaling(&json!({ "rope_scaling": { "type": "linear", "factor": 4 } })), linear);
    let both = json!({ "type": "linear", "rope_type": "linear", "factor": 4.0, "finetuned": true });
    assert_eq!(scaling(&json!({ "rope_scaling": both })), linear);
    let five = json!({ "rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0 });
    assert_eq!(scaling(&json!({ "rope_scaling": null, "rope_parameters": five })), linear);
    // Said twice is fine if it is the same.
    let twice =
        json!({ "rope_scaling": { "type": "linear", "factor": 4.0 }, "rope_parameters": five });
    assert_eq!(scaling(&twice), linear);
    assert_eq!(
        scaling(&json!({ "rope_scaling": { "rope_type": "default", "factor": 1.0 } })),
        None
    );

    let llama3 = |original: Value| {
        json!({ "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": original })
    };
    let original = |changes: &Value| match scaling(changes) {
        Some(RopeScaling::Llama3 { original_max_position_embeddings, .. }) => {
            original_max_position_embeddings
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(original(&json!({ "rope_scaling": llama3(64.into()) })), 64);
    assert_eq!(original(&json!({ "rope_scaling": llama3(Value::Null) })), 2048);
    let outside =
        json!({ "rope_scaling": llama3(Value::Null), "original_max_position_embeddings": 96 });
    assert_eq!(original(&outside), 96);
}

#[test]
fn rotations_that_contradict_themselves_or_are_not_computed_are_refused() {
    let scaled = |table: Value, key: &str| {
        refused("llama", &json!({ "rope_scaling": table }), key);
        refused("llama", &json!({ "rope_parameters": table }), key);
    };
    for kind in ["yarn", "longrope", "dynamic", "su", "mrope", "ntk", "proportional"] {
        scaled(json!({ "rope_type": kind, "factor": 4.0 }), kind);
        scaled(json!({ "type": kind, "factor": 4.0 }), kind);
    }
    scaled(json!({ "factor": 4.0 }), "factor");
    scaled(json!({ "rope_type": "default", "factor": 4.0 }), "factor");
    scaled(json!({ "rope_type": "linear", "type": "default", "factor": 4.0 }), "rope_type");
    scaled(json!({ "rope_type": "linear" }), "factor");
    scaled(json!({ "rope_type": "linear", "factor": "4" }), "factor");
    scaled(json!({ "rope_type": "linear", "factor": 0 }), "factor");
    scaled(json!({ "rope_type": 3 }), "rope_type");
    scaled(json!({ "rope_type": "default", "rope_theta": "5" }), "rope_theta");
    scaled(
        json!({ "rope_type": "default", "partial_rotary_factor": 0.5 }),
        "partial_rotary_factor",
    );
    scaled(json!({ "rope_type": "default", "mrope_section": [1, 2] }), "mrope_section");
    scaled(json!({ "rope_type": "default", "attention_factor": 0.9 }), "attention_factor");
    let llama3 = json!({ "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0 });
    scaled(llama3.clone(), "low_freq_factor");
    let missing = json!({ "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0 });
    scaled(missing, "high_freq_factor");
    let differ = json!({
        "rope_scaling": { "rope_type": "linear", "factor": 2.0 },
        "rope_parameters": { "rope_type": "linear", "factor": 4.0 },
    });
    refused("llama", &differ, "rope_parameters");
    for key in ["partial_rotary_factor", "rotary_pct"] {
        refused("llama", &json!({ key: 0.5 }), key);
        with("llama", &json!({ key: 1.0 })).unwrap();
    }
}

#[test]
fn tables_by_kind_of_layer_must_agree() {
    let theta = |theta: f64| json!({ "rope_type": "default", "rope_theta": theta });
    let types = json!(["full_attention", "full_attention"]);
    let tables = |full: f64, sliding: f64| {
        json!({
            "rope_parameters": { "full_attention": theta(full), "sliding_attention": theta(sliding) },
            "layer_types": types,
        })
    };
    assert_eq!(with("qwen3", &tables(5e5, 5e5)).unwrap().rope_theta, 5e5);
    assert_eq!(with("llama", &tables(5e5, 5e5)).unwrap().rope_theta, 5e5);
    refused("qwen3", &tables(5e5, 1e4), "rope_parameters");
    let one = json!({ "rope_parameters": { "full_attention": theta(5e5) } });
    assert_eq!(with("qwen2", &one).unwrap().rope_theta, 5e5);
    // transformers takes the default here.
    refused("llama", &one, "rope_parameters.full_attention");
    let beside = json!({ "rope_parameters": { "full_attention": theta(5e5), "rope_theta": 1e4 } });
    refused("qwen2", &beside, "rope_theta");
    let broken = json!({ "rope_parameters": { "full_attention": { "rope_theta": "5" } } });
    refused("qwen2", &broken, "rope_parameters.full_attention.rope_theta");
}

#[test]
fn keys_that_change_arithmetic_are_refused_unless_neutral() {
    for (key, neutral, values) in [
        ("residual_multiplier", json!([1.0, 1]), json!([0.22, "1"])),
        ("embedding_multiplier", json!([1]), json!([12.0])),
        ("logits_scaling", json!([1.0]), json!([8.0])),
        ("logit_scale", json!([1.0]), json!([0.0625])),
        ("attention_multiplier", json!([0.25]), json!([1.0, 0.015625])),
        ("query_pre_attn_scalar", json!([16]), json!([224])),
        ("final_logit_softcapping", json!([null]), json!([30.0])),
        ("attn_logit_softcapping", json!([null, 0]), json!([50.0])),
        ("clip_qkv", json!([null]), json!([8])),
        ("num_local_experts", json!([0]), json!([8])),
        ("num_experts", json!([0, null]), json!([128])),
        ("n_routed_experts", json!([null]), json!([64])),
        (
            "no_rope_layers",
            json!([null, [], [1, 1], [1, 1, 0]]),
            json!([[1, 0], [0, 0], "all", [2]]),
        ),
        ("no_rope_layer_interval", json!([3, null]), json!([1, 2, "4"])),
        ("qk_norm", json!([false, null]), json!([true, "yes"])),
        ("use_qk_norm", json!([false]), json!([true])),
        ("rope_interleaved", json!([false]), json!([true])),
        ("attention_chunk_size", json!([null]), json!([8192])),
        (
            "layer_types",
            json!([["full_attention", "full_attention"]]),
            json!([
                ["full_attention", "sliding_attention"],
                ["chunked_attention", "full_attention"],
                ["linear_attention", "linear_attention"]
            ]),
        ),
        ("text_config", json!([null]), json!([{ "model_type": "llama" }, {}])),
        ("vision_config", json!([null]), json!([{}])),
        ("is_encoder_decoder", json!([false]), json!([true])),
        ("scale_depth", json!([null]), json!([1.4])),
    ] {
        for value in neutral.as_array().unwrap() {
            with("llama", &json!({ key: value })).unwrap_or_else(|e| panic!("{key}: {value}: {e}"));
        }
        for value in values.as_array().unwrap() {
            for model_type in ["llama", "mistral", "qwen2"] {
                // A window of Qwen2's own is refused where it is shorter than the context.
                let changes = json!({ key: value, "sliding_window": null });
                if model_type == "qwen2" && value[1] == "sliding_attention" {
                    continue;
                }
                let error = refused(model_type, &changes, key);
                assert!(
                    !value.is_number() || error.to_string().contains(&value.to_string()),
                    "{error}"
                );
            }
        }
    }
    // What Qwen3 is, it may say.
    with("qwen3", &json!({ "qk_norm": true })).unwrap();
    refused("qwen3", &json!({ "use_qk_norm": false }), "use_qk_norm");
}

#[test]
fn what_is_read_is_what_was_written() {
    let config =
        with("llama", &json!({ "rope_scaling": { "type": "linear", "factor": 2.0 } })).unwrap();
    assert_eq!(ModelConfig::from_hf_json(&config.to_hf_json()).unwrap(), config);
}

#[test]
fn errors_name_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let open = |config: &str, generation: Option<&str>| {
        std::fs::write(dir.path().join("config.json"), config).unwrap();
        let path = dir.path().join("generation_config.json");
        let _ = std::fs::remove_file(&path);
        if let Some(text) = generation {
            std::fs::write(path, text).unwrap();
        }
        let error = Checkpoint::open(dir.path().to_str().unwrap()).unwrap_err();
        assert!(error.hint().is_some(), "{error}");
        error.to_string()
    };
    let mut json = base("llama");
    let fine = json.to_string();
    json["head_dim"] = (-1).into();
    let error = open(&json.to_string(), None);
    assert!(error.contains("/config.json") && error.contains("\"head_dim\" is -1"), "{error}");
    let mut yarn = base("llama");
    yarn["rope_scaling"] = json!({ "rope_type": "yarn" });
    let error = open(&yarn.to_string(), None);
    assert!(error.contains("/config.json") && error.contains("yarn"), "{error}");
    for (text, named) in [
        (r#"{ "eos_token_id": "2" }"#, "\"eos_token_id\" is \"2\""),
        (r#"{ "eos_token_id": [1, 4294967296] }"#, "4294967296"),
        ("[]", "JSON object"),
        ("{", "JSON"),
    ] {
        let error = open(&fine, Some(text));
        assert!(error.contains("generation_config.json") && error.contains(named), "{error}");
    }
    for text in ["[]", "3", "{\"x\": Infinity}", "", "\u{feff}{}", &"[".repeat(100_000)] {
        assert!(open(text, None).contains("/config.json"));
    }
}
