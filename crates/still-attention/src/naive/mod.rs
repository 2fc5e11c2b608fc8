//! The operator as a slow loop in float64, token by token: the twin that every kernel is tested against.
//!
//! Nothing here is shared with a kernel but the configuration and the random router's hash: the score is computed by its
//! definition, chunks retire one token at a time, and no product is blocked.
//!
//! A file states one part of `docs/method.md` again:
//!
//! | file | states |
//! |---|---|
//! | `router` | which score a router gives, and its mean over a group |
//! | `self_saliency`, `received_attention`, `self_recall` | one router each |
//! | `retirement` | delayed selection: budget, cap, demotion |
//! | `kept_rows` | what a state gives back of the rows that it keeps |
//! | `feature_map` | NP-Map, LoLCATs' map, the Householder reflection |
//! | `linear_state` | `S`, `z` and `n` |
//! | `exact_terms` | branch switches and the window factor: the first terms of numerator and denominator |
//! | `output` | their sum with the linear terms: linear norm and gate |
//! | `linear_only` | Hedgehog |
//! | `delta_rule` | a state that overwrites, which no kernel has |
//! | `dense` | the teacher's attention |
//! | `sliding` | attention that a layer keeps |
//! | `head`, `sums` | nothing: the rows of a selection head, and sums over a row |

mod delta_rule;
mod dense;
mod exact_terms;
mod feature_map;
mod head;
mod kept_rows;
mod linear_only;
mod linear_state;
mod output;
mod received_attention;
mod retirement;
mod router;
mod self_recall;
mod self_saliency;
mod sliding;
mod sums;

pub use delta_rule::DeltaState;
pub use dense::dense_attention;
pub use feature_map::feature_row;
pub use kept_rows::{kept_key, kept_keys_by_channel, kept_value};
pub use received_attention::received_attention;
pub use self_recall::recall_error;
pub use self_saliency::self_saliency;
pub use sliding::sliding_attention;

use crate::config::{HeadGeometry, HybridConfig, Mode, RowDtype, SelectionHead};
use crate::selection::Selection;
use head::Head;
use linear_state::LinearState;
use retirement::Memory;

/// One sequence and the layer's weights, row-major float64.
#[derive(Clone, Debug)]
pub struct Input {
    /// Head counts.
    pub geometry: HeadGeometry,
    /// Tokens `N`.
    pub tokens: usize,
    /// `[H, N, D]` after RoPE.
    pub q: Vec<f64>,
    /// `[K, N, D]` after RoPE.
    pub k: Vec<f64>,
    /// `[K, N, D]`
    pub v: Vec<f64>,
    /// `[H, D, F]`
    pub feature_map_q: Vec<f64>,
    /// `[S, D, F]`
    pub feature_map_k: Vec<f64>,
    /// `[H, D]`
    pub householder_q: Option<Vec<f64>>,
    /// `[S, D]`
    pub householder_k: Option<Vec<f64>>,
    /// `γ`, `[H, N, D]`
    pub gate: Option<Vec<f64>>,
    /// `ℓ`, `[H]`
    pub log_lambda: Option<Vec<f64>>,
    /// `w`, `[H]`
    pub window_factor: Option<Vec<f64>>,
}

/// What the operator gives and leaves behind.
#[derive(Clone, Debug)]
pub struct Output {
    /// `[H, N, D]`
    pub out: Vec<f64>,
    /// Router scores, `[S, N]`.
    pub score: Vec<f64>,
    /// Which tokens were salient, and until when.
    pub selection: Selection,
    /// `S`, `[S, 2F, D]`
    pub state_s: Vec<f64>,
    /// `z`, `[S, 2F]`
    pub state_z: Vec<f64>,
    /// `n`, `[S]`
    pub state_count: Vec<usize>,
}

impl Output {
    /// Outputs are NaN until they are written. Selection heads append the rest, one after the other.
    fn new(input: &Input, config: &HybridConfig) -> Self {
        Self {
            out: vec![f64::NAN; input.geometry.num_heads * input.tokens * input.geometry.head_dim],
            score: Vec::new(),
            selection: Selection {
                chunk: config.chunk,
                batch: 1,
                heads: input.geometry.selection_heads(config.selection_head),
                tokens: input.tokens,
                absorbed_at: Vec::new(),
            },
            state_s: Vec::new(),
            state_z: Vec::new(),
            state_count: Vec::new(),
        }
    }

    /// Writes `o_t` of query head `h`.
    fn set_row(&mut self, input: &Input, h: usize, t: usize, row: &[f64]) {
        let d = input.geometry.head_dim;
        self.out[(h * input.tokens + t) * d..][..d].copy_from_slice(row);
    }

    /// Appends what a selection head leaves behind.
    fn push_head(&mut self, score: Vec<f64>, absorbed_at: Vec<u32>, state: LinearState) {
        self.score.extend(score);
        self.selection.absorbed_at.extend(absorbed_at);
        self.state_s.extend(state.s);
        self.state_z.extend(state.z);
        self.state_count.push(state.count);
    }
}

/// Runs the operator over one sequence; `selection` (of one sequence) replaces the router if given.
pub fn hybrid_attention(
    input: &Input,
    config: &HybridConfig,
    selection: Option<&Selection>,
) -> Output {
    attention(input, input, config, selection)
}

/// The same where a state stores the rows of salient tokens as `rows`. The window's are seen as they come.
pub fn hybrid_attention_of_rows(
    input: &Input,
    config: &HybridConfig,
    selection: Option<&Selection>,
    rows: RowDtype,
) -> Output {
    let d = input.geometry.head_dim;
    let kept_keys = |(head, k): (usize, &[f64])| -> Vec<f64> {
        let exponents = config.key_exponents.get(head);
        match config.codes_keys_by_channel(d, head, rows) {
            true => kept_keys_by_channel(k, d, exponents),
            false => k.chunks(d).flat_map(|k| kept_key(k, rows, exponents)).collect(),
        }
    };
    let k = input.k.chunks(input.tokens * d).enumerate().flat_map(kept_keys).collect();
    let v = input.v.chunks(d).flat_map(|v| kept_value(v, rows)).collect();
    let kept = Input { k, v, ..input.clone() };
    attention(input, &kept, config, selection)
}

fn attention(
    input: &Input,
    kept: &Input,
    config: &HybridConfig,
    selection: Option<&Selection>,
) -> Output {
    if config.mode == Mode::LinearOnly {
        return linear_only::attention(input, config);
    }
    let mut output = Output::new(input, config);
    for head in Head::all(input, kept, config) {
        debug_assert!(
            config.selection_head == SelectionHead::KvHead || head.query_heads().len() == 1
        );
        let given = selection.map(|selection| selection.row(0, head.index));
        let mut absorbed_at = vec![Selection::NEVER; input.tokens];
        let mut memory = Memory::new(&head);
        for t in 0..input.tokens {
            let chunk = t / config.chunk;
            if t % config.chunk == 0 && chunk >= 2 {
                for j in memory.retire(&head, chunk, given) {
                    absorbed_at[j] = chunk as u32;
                }
            }
            for h in head.query_heads() {
                output.set_row(input, h, t, &output::row(&head, h, t, &memory));
            }
        }
        output.push_head(memory.score_at_retirement, absorbed_at, memory.state);
    }
    output
}
