//! Cases of the float64 oracle (`tests/data/reference.py`).

use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};
use still_attention::{
    Branches, FeatureMap, HeadGeometry, HybridConfig, LinearNorm, Mode, Router, Selection,
    SelectionHead, naive,
};

/// A case of the float64 oracle.
pub struct Case {
    pub input: naive::Input,
    pub config: HybridConfig,
    pub out: Vec<f64>,
    pub score: Vec<f64>,
    pub selection: Selection,
    pub state_s: Vec<f64>,
    pub state_z: Vec<f64>,
    pub state_count: Vec<usize>,
}

/// Where the cases lie: in the checkout that the test was built in or, on a machine without it, in `data` beside the test.
pub fn directory() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    match here.is_dir() {
        true => here,
        false => std::env::current_exe().unwrap().with_file_name("data"),
    }
}

pub fn load(name: &str) -> Case {
    let path = directory().join(format!("{name}.safetensors"));
    let bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let meta = metadata.metadata().clone().unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let optional = |name: &str| -> Option<Vec<f64>> {
        let view = file.tensor(name).ok()?;
        Some(match view.dtype() {
            Dtype::F32 => view
                .data()
                .chunks(4)
                .map(|b| f32::from_le_bytes(b.try_into().unwrap()).into())
                .collect(),
            Dtype::F64 => {
                view.data().chunks(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect()
            }
            Dtype::U8 => view.data().iter().map(|&b| b.into()).collect(),
            other => panic!("unexpected dtype {other:?}"),
        })
    };
    let get = |name: &str| optional(name).unwrap_or_else(|| panic!("{name} is missing"));
    let shape = |name: &str| file.tensor(name).unwrap().shape().to_vec();

    let [num_heads, tokens, head_dim] = shape("q")[..] else { panic!() };
    let geometry = HeadGeometry { num_heads, num_key_value_heads: shape("k")[0], head_dim };
    let chunk: usize = meta["chunk"].parse().unwrap();
    let config = HybridConfig {
        layer: 0,
        mode: Mode::Hybrid,
        chunk,
        router: Router::SelfSaliency,
        selection_head: match meta["granularity"].as_str() {
            "kv_head" => SelectionHead::KvHead,
            _ => SelectionHead::QueryHead,
        },
        budgets: serde_json::from_str(&meta["budgets"]).unwrap(),
        cap: serde_json::from_str(&meta["cap"]).unwrap(),
        feature_map: FeatureMap::NpMap { householder: optional("u_q").is_some() },
        feature_dim: shape("w_q")[2],
        linear_norm: match optional("mean_scale") {
            Some(_) => LinearNorm::Mean,
            None => LinearNorm::Sum,
        },
        gate: optional("gate").is_some(),
        window_factor: false,
        logit_scale: None,
        branches: Branches::default(),
        key_exponents: Vec::new(),
    };

    let visible = get("visible");
    let [heads, chunks, _] = shape("visible")[..] else { panic!() };
    let mut absorbed_at = vec![Selection::NEVER; heads * tokens];
    for head in 0..heads {
        for token in 0..tokens {
            absorbed_at[head * tokens + token] = (token / chunk + 2..chunks)
                .find(|c| visible[(head * chunks + c) * tokens + token] == 0.0)
                .map_or(Selection::NEVER, |c| c as u32);
        }
    }
    Case {
        input: naive::Input {
            geometry,
            tokens,
            q: get("q"),
            k: get("k"),
            v: get("v"),
            feature_map_q: get("w_q"),
            feature_map_k: get("w_k"),
            householder_q: optional("u_q"),
            householder_k: optional("u_k"),
            gate: optional("gate"),
            log_lambda: optional("mean_scale").map(|x| x.into_iter().map(f64::ln).collect()),
            window_factor: None,
        },
        config,
        out: get("out"),
        score: get("score"),
        selection: Selection { chunk, batch: 1, heads, tokens, absorbed_at },
        state_s: get("state_s"),
        state_z: get("state_z"),
        state_count: get("state_count").into_iter().map(|n| n as usize).collect(),
    }
}
