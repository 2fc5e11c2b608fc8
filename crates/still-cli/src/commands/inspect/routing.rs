//! One pass over the layers that records scores and selections.

use still_attention::{
    AttentionState, HybridConfig, HybridState, PreparedWeights, RowDtype, Selection, StateBytes,
    StillConfig, hybrid_attention,
};
use still_model::{FeatureInit, Model, Student};

use crate::commands::CHUNK;
use crate::errors::user;

/// What a text did to every layer and selection head.
#[derive(Debug)]
pub struct Routing {
    /// The text, token by token, as it is displayed.
    pub tokens: Vec<String>,
    /// Tokens of a chunk.
    pub chunk: usize,
    /// What ranked the tokens, in words.
    pub router: String,
    /// Whether the model was routed as if it were a student.
    pub hypothetical: bool,
    /// One entry per layer.
    pub layers: Vec<LayerRouting>,
}

/// Routing of one layer.
#[derive(Debug)]
pub struct LayerRouting {
    /// One entry per selection head; none of a layer that keeps its attention to a sliding window.
    pub heads: Vec<HeadRouting>,
    /// Bytes of this layer's state after the text, 16-bit rows.
    pub cache: StateBytes,
    /// Bytes that a dense 16-bit cache would take.
    pub dense_bytes: usize,
}

/// Routing of one selection head.
#[derive(Debug)]
pub struct HeadRouting {
    /// Tokens kept of each retired chunk.
    pub budget: usize,
    /// Router scores, one per token.
    pub scores: Vec<f32>,
    /// Where each token is after the whole text.
    pub places: Vec<Place>,
}

/// Where a token is when the text has been read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Summarized in the linear state (or dropped, where there is no linear branch).
    Absorbed,
    /// The same, after it was salient for a while: the cap on salient tokens took its place away.
    Demoted,
    /// Kept exactly because it was salient.
    Salient,
    /// Still in the window.
    Window,
}

impl Routing {
    /// Bytes of all layers' states.
    pub fn cache(&self) -> StateBytes {
        self.layers.iter().map(|layer| layer.cache).sum()
    }

    /// Bytes of a dense 16-bit cache.
    pub fn dense_bytes(&self) -> usize {
        self.layers.iter().map(|layer| layer.dense_bytes).sum()
    }

    /// For each token, the share of all heads that keep it as salient.
    pub fn kept_share(&self) -> Vec<f64> {
        let heads: Vec<&HeadRouting> = self.layers.iter().flat_map(|layer| &layer.heads).collect();
        let kept =
            |token: usize| heads.iter().filter(|head| head.places[token] == Place::Salient).count();
        (0..self.tokens.len()).map(|token| kept(token) as f64 / heads.len() as f64).collect()
    }
}

/// Reads `ids`. A student's hidden states are its own; a plain model's stay those of softmax attention, and each
/// layer is routed with `budget` as a student's would be before training.
pub fn route(
    model: &Model,
    ids: &[u32],
    budget: usize,
    progress: &mut dyn FnMut(usize),
) -> anyhow::Result<Routing> {
    let decoder = &model.decoder;
    let config = &decoder.config;
    let hypothetical = model.student.is_none();
    let untrained = match &model.student {
        Some(_) => None,
        None => Some(untrained_student(model, budget)?),
    };
    let Some(student) = model.student.as_ref().or(untrained.as_ref()) else {
        anyhow::bail!("neither a student nor an untrained one");
    };
    let rotation = decoder.rotation(0, ids.len())?;
    let mut layers = Vec::with_capacity(decoder.layers.len());
    let own = (!hypothetical).then_some(student);
    decoder.visit_layers(decoder.embed(ids)?, &rotation, own, |n, layer, inputs| {
        let kv_values = 2 * config.num_key_value_heads * config.head_dim;
        let Some(weights) = student.layer(n) else {
            let rows = ids.len().min(layer.sliding_window.unwrap_or(usize::MAX));
            let bytes = rows * RowDtype::Bf16.row_bytes(kv_values);
            let cache = StateBytes { window_rows: bytes, ..StateBytes::default() };
            layers.push(LayerRouting { heads: Vec::new(), cache, dense_bytes: bytes });
            progress(1);
            return Ok(layer.softmax_attention(inputs)?);
        };
        let (q, k, v) = (&inputs.q, &inputs.k, &inputs.v);
        let gate = &inputs.gate;
        let hybrid =
            hybrid_attention(q, k, v, &weights.attention, gate.as_ref(), &weights.config, None)?;
        let prepared =
            PreparedWeights::new(config.geometry(), &weights.config, &weights.attention)?;
        let rows = weights.config.stored_rows(model.cache_rows(RowDtype::Bf16));
        let mut state = HybridState::new(prepared, 1, rows);
        state.advance(q, k, v, gate.as_ref(), None)?;
        let (selection, scores) = (hybrid.routing.selection()?, hybrid.routing.scores()?);
        let attention = match hypothetical {
            true => layer.softmax_attention(inputs)?,
            false => hybrid.out,
        };
        layers.push(LayerRouting {
            heads: heads(&weights.config, &selection, &scores),
            cache: state.bytes_by_part().unwrap_or_default(),
            dense_bytes: ids.len() * RowDtype::Bf16.row_bytes(kv_values),
        });
        progress(1);
        Ok::<_, anyhow::Error>(attention)
    })?;
    Ok(Routing {
        tokens: ids.iter().map(|&id| model.tokenizer.token_text(id)).collect(),
        chunk: student.config.chunk,
        router: student.config.router.in_words(),
        hypothetical,
        layers,
    })
}

fn untrained_student(model: &Model, budget: usize) -> anyhow::Result<Student> {
    let config = &model.decoder.config;
    let (layers, geometry) = (config.num_hidden_layers, config.geometry());
    let still = config.fit_still(StillConfig::uniform(layers, geometry, CHUNK, budget));
    if budget > still.chunk {
        return Err(user(
            format!("--budget {budget} is more than a chunk of {} tokens", still.chunk),
            format!("use 0 to {}", still.chunk),
        ));
    }
    Ok(Student::init(still, config, FeatureInit::Identity, 0)?)
}

fn heads(config: &HybridConfig, selection: &Selection, scores: &[f32]) -> Vec<HeadRouting> {
    let tokens = selection.tokens;
    let current = tokens.saturating_sub(1) / config.chunk;
    let place = |row: &[u32], token: usize| {
        let absorbed_at = row[token] as usize;
        if absorbed_at <= current {
            // Without a place among the salient, a token leaves the window two chunks after its own.
            let demoted = absorbed_at > token / config.chunk + 2;
            if demoted { Place::Demoted } else { Place::Absorbed }
        } else if token / config.chunk + 2 > current {
            Place::Window
        } else {
            Place::Salient
        }
    };
    (0..selection.heads)
        .map(|head| {
            let row = selection.row(0, head);
            HeadRouting {
                budget: config.budgets[head],
                scores: scores[head * tokens..(head + 1) * tokens].to_vec(),
                places: (0..tokens).map(|token| place(row, token)).collect(),
            }
        })
        .collect()
}
