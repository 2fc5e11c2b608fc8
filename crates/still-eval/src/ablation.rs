//! Students with one thing changed: what each part of the attention is worth.

use std::fmt;
use std::str::FromStr;

use still_attention::{Branches, FeatureMap, LinearNorm, Router, StillConfig};

use crate::error::EvalError;

/// A part of the attention that can be varied without training.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ablation {
    /// Window; window and salient tokens; window and linear state; linear state alone (with the token itself).
    Branches,
    /// Every router, at the student's budgets.
    Router,
    /// The same budget everywhere: 0, 1, 2, 4, 8, 16 and 32 of 64 (as shares of the chunk).
    Budgets,
    /// At most 128, 256, 512 or 1,024 salient tokens a head.
    Cap,
    /// NP-Map and plain softmax, over the same matrices.
    FeatureMap,
    /// Summed and mean-normalised linear branch.
    LinearNorm,
}

impl Ablation {
    /// All, in the order of a table.
    pub const ALL: [Self; 6] = [
        Self::Branches,
        Self::Router,
        Self::Budgets,
        Self::Cap,
        Self::FeatureMap,
        Self::LinearNorm,
    ];

    /// The variants of `config`, by name; `config` itself is not among them.
    pub fn variants(self, config: &StillConfig) -> Vec<(String, StillConfig)> {
        let vary = |name: String, change: &dyn Fn(&mut StillConfig)| {
            let mut variant = config.clone();
            change(&mut variant);
            (format!("{self}: {name}"), variant)
        };
        let all: Vec<(String, StillConfig)> = match self {
            Self::Branches => [
                ("window", true, false, false),
                ("window + salient", true, true, false),
                ("window + linear", true, false, true),
                ("linear", false, false, true),
            ]
            .map(|(name, window, salient, linear)| {
                vary(name.into(), &|variant| {
                    // What is not kept must be in the state, where there is one: a dropped token would be a fourth branch.
                    if !salient {
                        variant.router = Router::None;
                    }
                    variant.branches = Branches { window, salient, linear };
                })
            })
            .into(),
            Self::Router => [
                Router::SelfSaliency,
                Router::ReceivedAttention,
                Router::Random { seed: 0 },
                Router::None,
            ]
            .map(|router| vary(router_name(router).into(), &|variant| variant.router = router))
            .into(),
            Self::Budgets => [0, 1, 2, 4, 8, 16, 32]
                .map(|share| share * config.chunk / 64)
                .map(|budget| {
                    vary(format!("{budget} of {}", config.chunk), &|variant| {
                        variant.budgets.iter_mut().flatten().for_each(|b| *b = budget);
                    })
                })
                .into(),
            Self::Cap => [Some(128), Some(256), Some(512), Some(1024), None]
                .map(|cap| {
                    let name = cap.map_or("none".into(), |cap: usize| cap.to_string());
                    vary(name, &|variant| variant.cap = cap)
                })
                .into(),
            Self::FeatureMap => [
                (
                    "np_map",
                    match config.feature_map {
                        // With its reflection: without, it would be the same map.
                        map @ FeatureMap::NpMap { .. } => map,
                        FeatureMap::Softmax => FeatureMap::NpMap { householder: false },
                    },
                ),
                ("softmax", FeatureMap::Softmax),
            ]
            .map(|(name, map)| vary(name.into(), &|variant| variant.feature_map = map))
            .into(),
            Self::LinearNorm => [("sum", LinearNorm::Sum), ("mean", LinearNorm::Mean)]
                .map(|(name, norm)| vary(name.into(), &|variant| variant.linear_norm = norm))
                .into(),
        };
        let mut variants: Vec<(String, StillConfig)> = Vec::new();
        for (name, variant) in all {
            let known = |(_, other): &(String, StillConfig)| *other == variant;
            if variant != *config && !variants.iter().any(known) {
                variants.push((name, variant));
            }
        }
        variants
    }
}

fn router_name(router: Router) -> &'static str {
    match router {
        Router::SelfSaliency => "self_saliency",
        Router::ReceivedAttention => "received_attention",
        Router::Random { .. } => "random",
        Router::FirstTokens => "first_tokens",
        Router::SelfRecall => "self_recall",
        Router::None => "none",
    }
}

impl fmt::Display for Ablation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Branches => "branches",
            Self::Router => "router",
            Self::Budgets => "budgets",
            Self::Cap => "cap",
            Self::FeatureMap => "feature_map",
            Self::LinearNorm => "linear_norm",
        })
    }
}

impl FromStr for Ablation {
    type Err = EvalError;

    fn from_str(name: &str) -> Result<Self, EvalError> {
        let all = Self::ALL;
        all.into_iter().find(|ablation| ablation.to_string() == name).ok_or_else(|| {
            let names = all.map(|ablation| ablation.to_string()).join(", ");
            EvalError::Argument(format!("unknown ablation {name:?}: use one of {names}"))
        })
    }
}

#[cfg(test)]
mod tests {
    use still_attention::HeadGeometry;

    use super::*;

    fn config() -> StillConfig {
        let geometry = HeadGeometry { num_heads: 4, num_key_value_heads: 2, head_dim: 8 };
        StillConfig::uniform(2, geometry, 64, 4)
    }

    #[test]
    fn variants_differ_from_the_student_and_from_each_other() {
        let config = config();
        for ablation in Ablation::ALL {
            assert_eq!(ablation.to_string().parse::<Ablation>().unwrap(), ablation);
            let variants = ablation.variants(&config);
            assert!(!variants.is_empty(), "{ablation}");
            for (n, (name, variant)) in variants.iter().enumerate() {
                assert!(name.starts_with(&ablation.to_string()), "{name}");
                assert_ne!(*variant, config, "{name}");
                assert!(variants[..n].iter().all(|(_, other)| other != variant), "{name}");
            }
        }
        let names: Vec<String> =
            Ablation::Budgets.variants(&config).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names.len(), 6, "4 of 64 is the student itself: {names:?}");
        assert!("rooter".parse::<Ablation>().unwrap_err().to_string().contains("router"));
    }

    #[test]
    fn nothing_kept_means_all_in_the_state() {
        for (name, variant) in Ablation::Branches.variants(&config()) {
            let kept = variant.router != Router::None;
            assert_eq!(kept, variant.branches.salient, "{name}");
        }
    }
}
