//! Route by a score of your own: give the operator a selection in place of its router's.
//!
//! `cargo run --release -p still-attention --example own_router`
//!
//! This tries a router on whole sequences. To have it in models, files and decoding, CONTRIBUTING.md lists the files to edit.

use candle_core::{D, DType, Device, Tensor};
use still_attention::{
    HeadGeometry, HybridConfig, HybridWeights, Result, Routing, Selection, StillConfig,
    dense_attention, hybrid_attention,
};

const TOKENS: usize = 256;
const HEAD_DIM: usize = 16;
const GEOMETRY: HeadGeometry =
    HeadGeometry { num_heads: 4, num_key_value_heads: 2, head_dim: HEAD_DIM };

/// Compares the error of STILL's router with that of the largest keys, and of no router at all.
pub fn main() -> Result<()> {
    let config = StillConfig::uniform(1, GEOMETRY, 16, 2).layer(0)?;
    let weights = identity(&config)?;
    let random = |heads| Tensor::randn(0_f32, 1.0, (1, heads, TOKENS, HEAD_DIM), &Device::Cpu);
    let (q, k, v) = (random(4)?, random(2)?, random(2)?);
    let softmax = dense_attention(&q, &k, &v, None)?;
    let error = |routing: Option<&Routing>| -> Result<(f32, Routing)> {
        let hybrid = hybrid_attention(&q, &k, &v, &weights, None, &config, routing)?;
        let square = (hybrid.out - &softmax)?.sqr()?.mean_all()?;
        Ok((square.to_scalar::<f32>()?.sqrt(), hybrid.routing))
    };

    let (own, routing) = error(None)?;
    // The same scores give the same selection.
    let scores = routing.scores()?;
    assert_eq!(select(&config, &scores), *routing.selection()?);

    // A router: the larger a token's key, the more salient it is. `[B, K, N]`, a row a selection head.
    let sizes = k.sqr()?.sum(D::Minus1)?.flatten_all()?.to_vec1::<f32>()?;
    let (largest, _) = error(Some(&select(&config, &sizes).into()))?;
    let nothing = HybridConfig { budgets: vec![0, 0], ..config.clone() };
    let (none, _) = error(Some(&select(&nothing, &sizes).into()))?;
    println!("root mean square error of the output, compared with softmax attention");
    println!("self_saliency {own:.4}\nlargest keys  {largest:.4}\nnothing kept  {none:.4}");
    Ok(())
}

/// Keeps the tokens of the highest scores, `[selection head][token]`, of each chunk: as many as the head's budget.
fn select(config: &HybridConfig, scores: &[f32]) -> Selection {
    let mut absorbed_at = vec![Selection::NEVER; scores.len()];
    for (head, budget) in config.budgets.iter().enumerate() {
        // A chunk retires when the second one after it begins.
        for chunk in 2..TOKENS.div_ceil(config.chunk) {
            let first = head * TOKENS + (chunk - 2) * config.chunk;
            let mut tokens: Vec<usize> = (first..first + config.chunk).collect();
            tokens.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
            tokens[*budget..].iter().for_each(|&token| absorbed_at[token] = chunk as u32);
        }
    }
    let heads = config.budgets.len();
    Selection { chunk: config.chunk, batch: 1, heads, tokens: TOKENS, absorbed_at }
}

/// Feature maps as they start.
fn identity(config: &HybridConfig) -> Result<HybridWeights> {
    let eye = |heads: usize| {
        Tensor::eye(HEAD_DIM, DType::F32, &Device::Cpu)?
            .broadcast_as((heads, HEAD_DIM, HEAD_DIM))?
            .contiguous()
    };
    Ok(HybridWeights {
        feature_map_q: eye(GEOMETRY.num_heads)?,
        feature_map_k: eye(config.budgets.len())?,
        householder_q: None,
        householder_k: None,
        log_lambda: Some(Tensor::full(8_f32.ln(), GEOMETRY.num_heads, &Device::Cpu)?),
        window_factor: None,
    })
}
