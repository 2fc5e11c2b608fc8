//! The table of what loads in docs/models.md: every name in it is tried.

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use common::{Entry, Gguf, array, f32, text, u32};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use still_model::random::{random_model, tiny_config, tiny_sliding_config};
use still_model::{Architecture, Model, ModelConfig, Result};

const PAGE: &str = include_str!("../../../docs/models.md");

/// A row: what it is about, names that load, names that are refused.
struct Row {
    about: String,
    loads: Vec<String>,
    refused: Vec<String>,
}

fn names(cell: &str) -> Vec<String> {
    cell.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// The rows under the heading of three columns that begins with "What".
fn table() -> Vec<Row> {
    let lines = PAGE.lines().skip_while(|line| !line.starts_with("| What |"));
    let rows = lines.skip(2).take_while(|line| line.starts_with('|'));
    rows.map(|line| {
        let cells: Vec<_> = line.trim_matches('|').split('|').collect();
        assert_eq!(cells.len(), 3, "{line}");
        Row {
            about: cells[0].trim().replace('`', ""),
            loads: names(cells[1]),
            refused: names(cells[2]),
        }
    })
    .collect()
}

fn load(bytes: &[u8]) -> Result<Model> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    Model::load(path.to_str().unwrap())
}

/// A directory with a tiny model whose configuration has these values too, and a matrix of 8 bits if one is given.
fn directory(changes: &Value, eight_bit: Option<Dtype>) -> Result<Model> {
    let dir = tempfile::tempdir().unwrap();
    let model = random_model(tiny_config(), 4).unwrap();
    let mut file: BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> = BTreeMap::new();
    let visited = model.decoder.visit_tensors(|name, tensor| {
        let values: Vec<f32> = tensor.flatten_all()?.to_vec1()?;
        let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        file.insert(name.to_owned(), (Dtype::F32, tensor.dims().to_vec(), bytes));
        Ok(())
    });
    visited.unwrap();
    if let Some(dtype) = eight_bit {
        let name = "model.layers.0.mlp.down_proj.weight";
        let (_, shape, bytes) = &file[name];
        let (shape, codes) = (shape.clone(), vec![1; bytes.len() / 4]);
        let scales = [1_f32.to_le_bytes()].concat().repeat(shape[0]);
        file.insert(format!("{name}_scale"), (Dtype::F32, vec![shape[0], 1], scales));
        file.insert(name.into(), (dtype, shape, codes));
    }
    let views = file.iter().map(|(name, (dtype, shape, bytes))| {
        (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    let bytes = safetensors::serialize(views, None).unwrap();
    std::fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
    model.tokenizer.save(dir.path()).unwrap();
    let mut config = model.config().to_hf_json();
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    Model::load(dir.path().to_str().unwrap())
}

fn family(name: &str) -> Result<()> {
    let mut json = match Architecture::from_model_type(name) {
        Ok(Architecture::Gemma3) => tiny_sliding_config().to_hf_json(),
        _ => tiny_config().to_hf_json(),
    };
    json["model_type"] = json!(name);
    // Each has an activation of its own.
    json.as_object_mut().unwrap().remove("hidden_act");
    if name != "gemma3_text" {
        json["sliding_window"] = Value::Null;
    }
    ModelConfig::from_hf_json(&json).map(drop)
}

fn rope(name: &str) -> Result<()> {
    let scaling = match name {
        "default" => json!({ "rope_type": name }),
        "llama3" => json!({
            "rope_type": name, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        }),
        "longrope" => json!({
            "rope_type": name, "short_factor": [1, 1, 1, 2], "long_factor": [1, 2, 3, 4],
            "original_max_position_embeddings": 128,
        }),
        _ => json!({ "rope_type": name, "factor": 8.0 }),
    };
    directory(&json!({ "rope_scaling": scaling }), None).map(drop)
}

fn quantization(name: &str) -> Result<()> {
    let (table, dtype) = match name {
        "compressed-tensors" => {
            let weights = json!({
                "num_bits": 8, "type": "int", "strategy": "channel", "symmetric": true,
            });
            let group = json!({ "targets": ["Linear"], "weights": weights });
            let groups = json!({ "group_0": group });
            let format = "int-quantized";
            (json!({ "quant_method": name, "format": format, "config_groups": groups }), Dtype::I8)
        }
        _ => (json!({ "quant_method": name }), Dtype::F8_E4M3),
    };
    directory(&json!({ "quantization_config": table }), Some(dtype)).map(drop)
}

/// GGUF's types: number, values of a block, bytes of a block.
const TYPES: [(&str, u32, u64, usize); 24] = [
    ("F32", 0, 1, 4),
    ("F16", 1, 1, 2),
    ("Q4_0", 2, 32, 18),
    ("Q4_1", 3, 32, 20),
    ("Q5_0", 6, 32, 22),
    ("Q5_1", 7, 32, 24),
    ("Q8_0", 8, 32, 34),
    ("Q8_1", 9, 32, 36),
    ("Q2_K", 10, 256, 84),
    ("Q3_K", 11, 256, 110),
    ("Q4_K", 12, 256, 144),
    ("Q5_K", 13, 256, 176),
    ("Q6_K", 14, 256, 210),
    ("Q8_K", 15, 256, 292),
    ("IQ2_XXS", 16, 256, 66),
    ("IQ2_XS", 17, 256, 74),
    ("IQ3_XXS", 18, 256, 98),
    ("IQ1_S", 19, 256, 50),
    ("IQ4_NL", 20, 32, 18),
    ("IQ3_S", 21, 256, 110),
    ("IQ2_S", 22, 256, 82),
    ("IQ4_XS", 23, 256, 136),
    ("BF16", 30, 1, 2),
    ("MXFP4", 39, 32, 17),
];

fn tensor_type(name: &str) -> Result<()> {
    let &(_, kind, values, bytes) =
        TYPES.iter().find(|(known, ..)| *known == name).unwrap_or_else(|| panic!("no type {name}"));
    let (hidden, wide) = (32, 256);
    let mut file = Gguf::tiny().with("llama.feed_forward_length", u32(wide as u32));
    for n in 0..2 {
        for part in ["ffn_gate", "ffn_up"] {
            let name = format!("blk.{n}.{part}.weight");
            file = file.tensor(&name, |entry| *entry = Entry::q8_0(&name, &[hidden, wide]));
        }
        let name = format!("blk.{n}.ffn_down.weight");
        let data = vec![0; (hidden * wide / values) as usize * bytes];
        let entry =
            Entry { name: name.clone(), dims: vec![wide, hidden], kind, data, offset: None };
        file = file.tensor(&name, |old| *old = entry);
    }
    load(&file.bytes()).map(drop)
}

/// `llama`, or `gpt2` with one of its ways to cut a text.
fn vocabulary(name: &str) -> Result<()> {
    let scores: Vec<_> = (0..64).map(|id| f32(-f64::from(id) as f32)).collect();
    let file = match name {
        "llama" | "bert" | "t5" | "rwkv" => Gguf::tiny()
            .without("tokenizer.ggml.merges")
            .with("tokenizer.ggml.model", text(name))
            .with("tokenizer.ggml.scores", array(6, &scores)),
        "gpt2" => Gguf::tiny(),
        pre => Gguf::tiny().with("tokenizer.ggml.pre", text(pre)),
    };
    load(&file.bytes()).map(drop)
}

#[test]
fn the_table_of_what_loads_is_true() {
    let rows = table();
    let abouts: Vec<_> = rows.iter().map(|row| row.about.as_str()).collect();
    assert_eq!(
        abouts,
        [
            "Families (model_type)",
            "RoPE (rope_type)",
            "8-bit checkpoints (quant_method)",
            "GGUF tensors",
            "GGUF vocabularies (tokenizer.ggml.model and .pre)",
        ]
    );
    let attempts: [fn(&str) -> Result<()>; 5] =
        [family, rope, quantization, tensor_type, vocabulary];
    for (row, attempt) in rows.iter().zip(attempts) {
        assert!(!row.loads.is_empty() && !row.refused.is_empty(), "{}", row.about);
        for name in &row.loads {
            if let Err(error) = attempt(name) {
                panic!("{}: {name} does not load: {error}", row.about);
            }
        }
        for name in &row.refused {
            let error = attempt(name).map(|()| format!("{name} loads")).unwrap_err().to_string();
            let said = error.to_lowercase();
            assert!(said.contains(&name.to_lowercase()), "{}: {name}: {error}", row.about);
        }
    }
    // Nothing that loads is left out.
    let families: Vec<_> =
        Architecture::ALL.iter().map(|family| family.model_type().to_owned()).collect();
    assert_eq!(rows[0].loads, families);
    for (name, ..) in TYPES {
        let named = |names: &[String]| names.iter().any(|other| other == name);
        assert!(named(&rows[3].loads) != named(&rows[3].refused), "{name}");
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/families");
    for family in families {
        assert!(path.join(&family).is_dir(), "{family} has no logits to be compared with");
    }
}
