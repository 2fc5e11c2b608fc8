//! What the operator's kernels on CUDA do not compute, as a table. `docs/cuda.md` has it in words.

use crate::hybrid::OP;
use crate::{AttentionError, HeadGeometry, HybridConfig, Mode, Result, Router};

/// Tokens of a chunk.
const CHUNK: usize = 64;
/// Head dimensions that have kernels.
const HEAD_DIMS: [usize; 4] = [64, 80, 96, 128];
/// The largest cap of the router `self_recall`.
const MAX_RECALL_CAP: usize = 8192;
/// Query heads that may share a selection head while decoding.
const MAX_DECODE_GROUP: usize = 16;

#[cfg(feature = "cuda")]
const _: () = {
    use still_kernels as kernels;
    assert!(CHUNK == kernels::CHUNK && MAX_RECALL_CAP == kernels::MAX_RECALL_CAP);
    assert!(MAX_DECODE_GROUP == kernels::MAX_DECODE_GROUP);
    let mut i = 0;
    while i < HEAD_DIMS.len() {
        assert!(
            HEAD_DIMS[i] == kernels::HEAD_DIMS[i] && HEAD_DIMS.len() == kernels::HEAD_DIMS.len()
        );
        i += 1;
    }
};

/// Where a limit holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Where {
    /// Training, evaluation and a state.
    Everywhere,
    /// A state: generation, chat, evaluation.
    State,
}

/// One limit of hybrid attention. Linear attention alone has none.
struct Limit {
    what: &'static str,
    expected: &'static str,
    holds_in: Where,
    holds: fn(HeadGeometry, &HybridConfig) -> bool,
    got: fn(HeadGeometry, &HybridConfig) -> String,
}

const LIMITS: [Limit; 6] = [
    Limit {
        what: "chunk",
        expected: "64 on CUDA",
        holds_in: Where::Everywhere,
        holds: |_, config| config.chunk == CHUNK,
        got: |_, config| config.chunk.to_string(),
    },
    Limit {
        what: "head_dim",
        expected: "64, 80, 96 or 128 on CUDA",
        holds_in: Where::Everywhere,
        holds: |geometry, _| HEAD_DIMS.contains(&geometry.head_dim),
        got: |geometry, _| geometry.head_dim.to_string(),
    },
    Limit {
        what: "feature_dim",
        expected: "head_dim on CUDA",
        holds_in: Where::Everywhere,
        holds: |geometry, config| config.feature_dim == geometry.head_dim,
        got: |_, config| config.feature_dim.to_string(),
    },
    Limit {
        what: "cap",
        expected: "at most 8192 with self_recall on CUDA",
        holds_in: Where::Everywhere,
        holds: |_, config| {
            config.router != Router::SelfRecall || config.cap.unwrap_or(0) <= MAX_RECALL_CAP
        },
        got: |_, config| config.cap.unwrap_or(0).to_string(),
    },
    Limit {
        what: "logit_scale",
        expected: "the root of 1 / head_dim on CUDA",
        holds_in: Where::Everywhere,
        holds: |geometry, config| is_usual(config.logit_scale, geometry.head_dim),
        got: |_, config| format!("{:?}", config.logit_scale),
    },
    Limit {
        what: "num_heads",
        expected: "at most 16 query heads a selection head on CUDA",
        holds_in: Where::State,
        holds: |geometry, config| group(geometry, config) <= MAX_DECODE_GROUP,
        got: |geometry, config| format!("{} of them", group(geometry, config)),
    },
];

/// Whether logits are scaled by `1/√D`, as kernels do.
pub(crate) fn is_usual(logit_scale: Option<f64>, head_dim: usize) -> bool {
    let root = (head_dim as f64).sqrt();
    logit_scale.is_none_or(|scale| (scale * root - 1.0).abs() <= 1e-6)
}

/// Query heads of a selection head.
fn group(geometry: HeadGeometry, config: &HybridConfig) -> usize {
    geometry.num_heads / geometry.selection_heads(config.selection_head)
}

/// Checks a configuration: for a state, or for whole sequences alone.
pub(crate) fn check(geometry: HeadGeometry, config: &HybridConfig, state: bool) -> Result<()> {
    let applies = |limit: &&Limit| {
        config.mode == Mode::Hybrid && (state || limit.holds_in == Where::Everywhere)
    };
    let broken = LIMITS.iter().filter(applies).find(|limit| !(limit.holds)(geometry, config));
    match broken {
        None => Ok(()),
        Some(Limit { what, expected, got, .. }) => Err(AttentionError::Unsupported {
            op: OP,
            tensor: what,
            expected,
            got: got(geometry, config),
        }),
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
                Where::Everywhere => "everywhere",
                Where::State => "in a state",
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
}
