//! What the operator's kernels on CUDA do not compute, as a table. `docs/cuda.md` has it in words.

use candle_core::DType;

use crate::output::OP;
use crate::{AttentionError, HeadGeometry, HybridConfig, Mode, Result, Router};

/// Tokens of a chunk.
const CHUNK: usize = 64;
/// Head dimensions that have kernels.
const HEAD_DIMS: [usize; 4] = [64, 80, 96, 128];
/// The one that has some of them: a tile of it in f32, or a square, fills a multiprocessor's shared memory.
const WIDE_HEAD_DIM: usize = 256;
/// The largest cap of the router `self_recall`.
const MAX_RECALL_CAP: usize = 8192;
/// Query heads that may share a selection head while decoding.
const MAX_DECODE_GROUP: usize = 16;

#[cfg(feature = "cuda")]
const _: () = {
    use still_kernels as kernels;
    assert!(CHUNK == kernels::CHUNK && MAX_RECALL_CAP == kernels::MAX_RECALL_CAP);
    assert!(MAX_DECODE_GROUP == kernels::MAX_DECODE_GROUP);
    assert!(WIDE_HEAD_DIM == kernels::WIDE_HEAD_DIM);
    let mut i = 0;
    while i < HEAD_DIMS.len() {
        assert!(
            HEAD_DIMS[i] == kernels::HEAD_DIMS[i] && HEAD_DIMS.len() == kernels::HEAD_DIMS.len()
        );
        i += 1;
    }
};

/// What a call is for, and where a limit holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    /// Whole sequences. Its limits hold everywhere.
    Forward,
    /// Whole sequences with gradients.
    Training,
    /// A state: generation, chat, evaluation.
    State,
}

/// What is asked of the kernels.
#[derive(Clone, Copy)]
pub(crate) struct Asked<'a> {
    pub geometry: HeadGeometry,
    pub config: &'a HybridConfig,
    /// Of queries, keys and values.
    pub dtype: DType,
    pub used_in: Use,
}

/// One limit of hybrid attention. Linear attention alone has none.
struct Limit {
    what: &'static str,
    expected: &'static str,
    holds_in: Use,
    holds: fn(Asked<'_>) -> bool,
    got: fn(Asked<'_>) -> String,
}

const LIMITS: [Limit; 8] = [
    Limit {
        what: "chunk",
        expected: "64 on CUDA",
        holds_in: Use::Forward,
        holds: |asked| asked.config.chunk == CHUNK,
        got: |asked| asked.config.chunk.to_string(),
    },
    Limit {
        what: "head_dim",
        expected: "64, 80, 96, 128 or 256 on CUDA",
        holds_in: Use::Forward,
        holds: |asked| {
            let head_dim = asked.geometry.head_dim;
            HEAD_DIMS.contains(&head_dim) || head_dim == WIDE_HEAD_DIM
        },
        got: |asked| asked.geometry.head_dim.to_string(),
    },
    Limit {
        what: "head_dim",
        expected: "at most 128 in f32 and with self_recall on CUDA",
        holds_in: Use::Forward,
        holds: |asked| {
            let recalls = asked.config.router == Router::SelfRecall;
            !is_wide(asked) || !(recalls || asked.dtype == DType::F32)
        },
        got: |asked| {
            let (router, dtype) = (asked.config.router, asked.dtype.as_str());
            format!("{} in {dtype} with {router:?}", asked.geometry.head_dim)
        },
    },
    Limit {
        what: "head_dim",
        expected: "at most 128 with gradients on CUDA",
        holds_in: Use::Training,
        holds: |asked| !is_wide(asked),
        got: |asked| asked.geometry.head_dim.to_string(),
    },
    Limit {
        what: "feature_dim",
        expected: "head_dim on CUDA",
        holds_in: Use::Forward,
        holds: |asked| asked.config.feature_dim == asked.geometry.head_dim,
        got: |asked| asked.config.feature_dim.to_string(),
    },
    Limit {
        what: "cap",
        expected: "at most 8192 with self_recall on CUDA",
        holds_in: Use::Forward,
        holds: |Asked { config, .. }| {
            config.router != Router::SelfRecall || config.cap.unwrap_or(0) <= MAX_RECALL_CAP
        },
        got: |asked| asked.config.cap.unwrap_or(0).to_string(),
    },
    Limit {
        what: "logit_scale",
        expected: "the root of 1 / head_dim on CUDA",
        holds_in: Use::Forward,
        holds: |asked| is_usual(asked.config.logit_scale, asked.geometry.head_dim),
        got: |asked| format!("{:?}", asked.config.logit_scale),
    },
    Limit {
        what: "num_heads",
        expected: "at most 16 query heads a selection head on CUDA",
        holds_in: Use::State,
        holds: |asked| group(asked.geometry, asked.config) <= MAX_DECODE_GROUP,
        got: |asked| format!("{} of them", group(asked.geometry, asked.config)),
    },
];

fn is_wide(asked: Asked<'_>) -> bool {
    asked.geometry.head_dim == WIDE_HEAD_DIM
}

/// Whether logits are scaled by `1/√D`, as kernels do.
pub(crate) fn is_usual(logit_scale: Option<f64>, head_dim: usize) -> bool {
    let root = (head_dim as f64).sqrt();
    logit_scale.is_none_or(|scale| (scale * root - 1.0).abs() <= 1e-6)
}

/// Query heads of a selection head.
fn group(geometry: HeadGeometry, config: &HybridConfig) -> usize {
    geometry.num_heads / geometry.selection_heads(config.selection_head)
}

/// Checks that there are kernels for what is asked.
pub(crate) fn check(asked: Asked<'_>) -> Result<()> {
    let applies = |limit: &&Limit| {
        let holds_here = [Use::Forward, asked.used_in].contains(&limit.holds_in);
        asked.config.mode == Mode::Hybrid && holds_here
    };
    let broken = LIMITS.iter().filter(applies).find(|limit| !(limit.holds)(asked));
    match broken {
        None => Ok(()),
        Some(Limit { what, expected, got, .. }) => {
            Err(AttentionError::Unsupported { op: OP, tensor: what, expected, got: got(asked) })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::StillConfig;

    const GEOMETRY: HeadGeometry =
        HeadGeometry { num_heads: 8, num_key_value_heads: 2, head_dim: 64 };

    #[test]
    fn the_page_has_the_table() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/cuda.md");
        let page = std::fs::read_to_string(path).unwrap();
        let table = page.split("### What a GPU refuses").nth(1).unwrap();
        let rows = table.lines().skip_while(|line| !line.starts_with("|---")).skip(1);
        let rows: Vec<&str> = rows.take_while(|line| line.starts_with('|')).collect();
        let expected = LIMITS.map(|limit| {
            let held = match limit.holds_in {
                Use::Forward => "everywhere",
                Use::Training => "in training",
                Use::State => "in a state",
            };
            let must_be =
                limit.expected.trim_end_matches(" on CUDA").replace("head_dim", "`head_dim`");
            format!("| `{}` | {must_be} | {held} |", limit.what)
        });
        assert_eq!(rows, expected);
    }

    #[test]
    fn each_limit_is_named() {
        let config = StillConfig::uniform(1, GEOMETRY, 64, 4).layer(0).unwrap();
        let check = |geometry, config: &HybridConfig, state| {
            let used_in = if state { Use::State } else { Use::Forward };
            check(Asked { geometry, config, dtype: DType::BF16, used_in })
        };
        check(GEOMETRY, &config, true).unwrap();
        let named = |geometry, config: &HybridConfig, word: &str| {
            let error = check(geometry, config, true).unwrap_err().to_string();
            assert!(error.contains(word) && error.contains("on CUDA"), "{word}: {error}");
        };
        named(GEOMETRY, &HybridConfig { chunk: 32, ..config.clone() }, "chunk");
        named(GEOMETRY, &HybridConfig { feature_dim: 32, ..config.clone() }, "feature_dim");
        let large = HybridConfig { cap: Some(9000), ..config.clone() };
        check(GEOMETRY, &large, true).unwrap();
        named(GEOMETRY, &HybridConfig { router: Router::SelfRecall, ..large }, "cap");
        named(HeadGeometry { head_dim: 72, ..GEOMETRY }, &config, "head_dim");
        named(GEOMETRY, &HybridConfig { logit_scale: Some(0.1), ..config.clone() }, "logit_scale");
        let wide = HeadGeometry { num_heads: 34, ..GEOMETRY };
        named(wide, &config, "num_heads");
        check(wide, &config, false).unwrap();
        let alone = HybridConfig { mode: Mode::LinearOnly, chunk: 32, ..config };
        check(wide, &alone, true).unwrap();
    }

    #[test]
    fn heads_of_256_channels_have_some_kernels() {
        let geometry = HeadGeometry { head_dim: 256, ..GEOMETRY };
        let config = StillConfig::uniform(1, geometry, 64, 4).layer(0).unwrap();
        let asked = Asked { geometry, config: &config, dtype: DType::BF16, used_in: Use::State };
        check(asked).unwrap();
        check(Asked { used_in: Use::Forward, ..asked }).unwrap();
        let recalls = HybridConfig { router: Router::SelfRecall, ..config.clone() };
        for refused in [
            Asked { dtype: DType::F32, ..asked },
            Asked { config: &recalls, ..asked },
            Asked { used_in: Use::Training, ..asked },
        ] {
            let error = check(refused).unwrap_err().to_string();
            assert!(error.contains("head_dim") && error.contains("at most 128"), "{error}");
        }
    }
}
