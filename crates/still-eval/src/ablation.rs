//! Students with parts of their attention changed: what each part is worth, alone and together.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
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
    /// LoLA's exact cache of 64, 128, 256 or 512 tokens a head, in place of the student's router, budgets and cap: what the method
    /// makes of a trained LoLCATs student.
    RecallCache,
}

impl Ablation {
    /// All, in the order of a table.
    pub const ALL: [Self; 7] = [
        Self::Branches,
        Self::Router,
        Self::Budgets,
        Self::Cap,
        Self::FeatureMap,
        Self::LinearNorm,
        Self::RecallCache,
    ];

    /// `config` with this part at each of its settings, by name; the student's own is one of them, first if it is none of ours.
    fn settings(self, config: &StillConfig) -> Vec<(String, StillConfig)> {
        let set = |change: &dyn Fn(&mut StillConfig)| {
            let mut changed = config.clone();
            change(&mut changed);
            changed
        };
        let ours: Vec<StillConfig> = match self {
            Self::Branches => [
                (true, false, false),
                (true, true, false),
                (true, false, true),
                (false, false, true),
            ]
            .map(|(window, salient, linear)| Branches { window, salient, linear })
            .map(|branches| set(&|to| to.branches = branches))
            .into(),
            Self::Router => [
                Router::SelfSaliency,
                Router::ReceivedAttention,
                Router::Random { seed: 0 },
                Router::None,
            ]
            .map(|router| set(&|to| to.router = router))
            .into(),
            Self::Budgets => [0, 1, 2, 4, 8, 16, 32]
                .map(|share| share * config.chunk / 64)
                .map(|budget| set(&|to| to.budgets.iter_mut().flatten().for_each(|b| *b = budget)))
                .into(),
            Self::Cap => [Some(128), Some(256), Some(512), Some(1024), None]
                .map(|cap| set(&|to| to.cap = cap))
                .into(),
            Self::FeatureMap => {
                let np_map = match config.feature_map {
                    // With its reflection: without, it would be the same map.
                    map @ FeatureMap::NpMap { .. } => map,
                    _ => FeatureMap::NpMap { householder: false },
                };
                [np_map, FeatureMap::Softmax].map(|map| set(&|to| to.feature_map = map)).into()
            }
            Self::LinearNorm => [LinearNorm::Sum, LinearNorm::Mean]
                .map(|norm| set(&|to| to.linear_norm = norm))
                .into(),
            Self::RecallCache => {
                [64, 128, 256, 512].map(|cache| config.clone().with_recall_cache(cache)).into()
            }
        };
        let mut settings: Vec<StillConfig> = Vec::new();
        if !ours.contains(config) {
            settings.push(config.clone());
        }
        for setting in ours {
            if !settings.contains(&setting) {
                settings.push(setting);
            }
        }
        settings.into_iter().map(|setting| (self.name_in(&setting), setting)).collect()
    }

    /// What this part is set to.
    fn name_in(self, config: &StillConfig) -> String {
        match self {
            Self::Branches => {
                let Branches { window, salient, linear } = config.branches;
                let all = [(window, "window"), (salient, "salient"), (linear, "linear")];
                let on: Vec<&str> =
                    all.iter().filter(|(on, _)| *on).map(|(_, name)| *name).collect();
                on.join(" + ")
            }
            Self::Router => config.router.name().into(),
            Self::Budgets => {
                let mut all = config.budgets.iter().flatten();
                let first = all.next().copied().unwrap_or(0);
                if all.all(|&budget| budget == first) {
                    format!("{first} of {}", config.chunk)
                } else {
                    "by head".into()
                }
            }
            Self::Cap => config.cap.map_or("none".into(), |cap| cap.to_string()),
            Self::FeatureMap => config.feature_map.name().into(),
            Self::LinearNorm => match config.linear_norm {
                LinearNorm::Sum => "sum".into(),
                LinearNorm::Mean => "mean".into(),
            },
            Self::RecallCache => match (config.router, config.cap) {
                (Router::SelfRecall, Some(cache)) => cache.to_string(),
                _ => "none".into(),
            },
        }
    }

    /// Sets this part of `to` as `from` has it.
    fn take(self, from: &StillConfig, to: &mut StillConfig) {
        match self {
            Self::Branches => to.branches = from.branches,
            Self::Router => to.router = from.router,
            Self::Budgets => to.budgets.clone_from(&from.budgets),
            Self::Cap => to.cap = from.cap,
            Self::FeatureMap => to.feature_map = from.feature_map,
            Self::LinearNorm => to.linear_norm = from.linear_norm,
            Self::RecallCache if from.router == Router::SelfRecall => {
                to.router = from.router;
                to.budgets.clone_from(&from.budgets);
                to.cap = from.cap;
            }
            // No cache: what the other parts and the student itself have.
            Self::RecallCache => {}
        }
    }
}

/// One part, or several that are changed together in every combination of their settings: `router+budgets`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Factors(Vec<Ablation>);

/// What [`Factors::variants`] finds.
#[derive(Clone, Debug, Default)]
pub struct Variants {
    /// By name, `router: random, budgets: 8 of 64`. Each computes something else than the student and than the others.
    pub asked: Vec<(String, StillConfig)>,
    /// Combinations that are not asked, by name.
    pub skipped: Vec<(String, Skipped)>,
}

/// Why a combination is not asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Skipped {
    /// It computes what another does, or the student itself.
    SameAs(String),
    /// There is no such attention.
    Impossible(String),
}

/// The name of what has nothing changed, in [`Skipped::SameAs`].
pub const THE_STUDENT: &str = "the student itself";

impl fmt::Display for Skipped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SameAs(other) => write!(f, "the same as {other}"),
            Self::Impossible(why) => f.write_str(why),
        }
    }
}

impl Factors {
    /// Every combination of the parts' settings, of a student with `config`.
    pub fn variants(&self, config: &StillConfig) -> Variants {
        let mut combinations = vec![(Vec::new(), config.clone())];
        for &part in &self.0 {
            let settings = part.settings(config);
            let with = |(names, config): &(Vec<String>, StillConfig)| {
                let (names, config) = (names.clone(), config.clone());
                settings.iter().map(move |(name, setting)| {
                    let (mut names, mut config) = (names.clone(), config.clone());
                    names.push(format!("{part}: {name}"));
                    part.take(setting, &mut config);
                    (names, config)
                })
            };
            combinations = combinations.iter().flat_map(with).collect();
        }
        let mut known = vec![(THE_STUDENT.to_owned(), computed(config))];
        let mut variants = Variants::default();
        for (names, mut variant) in combinations {
            let name = names.join(", ");
            let recalls =
                self.0.contains(&Ablation::RecallCache) && variant.router == Router::SelfRecall;
            if recalls && !variant.branches.linear {
                let why = "without the linear branch there is no state to recall from";
                variants.skipped.push((name, Skipped::Impossible(why.into())));
                continue;
            }
            if variant != *config && !variant.branches.salient && variant.router != Router::None {
                // What is not kept must be in the state, where there is one: a dropped token would be a fourth branch.
                if recalls || self.0.contains(&Ablation::Router) {
                    let why =
                        "without the salient branch, what a router keeps would be in no branch";
                    variants.skipped.push((name, Skipped::Impossible(why.into())));
                    continue;
                }
                variant.router = Router::None;
            }
            let computed = computed(&variant);
            match known.iter().find(|(_, other)| *other == computed) {
                Some((same, _)) => variants.skipped.push((name, Skipped::SameAs(same.clone()))),
                None => {
                    known.push((name.clone(), computed));
                    variants.asked.push((name, variant));
                }
            }
        }
        variants
    }
}

/// `config` without what nothing reads: two students whose own are equal give the same outputs.
fn computed(config: &StillConfig) -> StillConfig {
    let mut read = config.clone();
    if read.router == Router::None || read.budgets.iter().flatten().all(|&budget| budget == 0) {
        read.router = Router::None;
        read.budgets.iter_mut().flatten().for_each(|budget| *budget = 0);
        read.cap = None;
        read.branches.salient = true;
    }
    if !read.branches.linear {
        read.feature_map = FeatureMap::default();
        read.linear_norm = LinearNorm::default();
        read.gate = false;
    }
    read
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
            Self::RecallCache => "recall_cache",
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

impl fmt::Display for Factors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<String> = self.0.iter().map(ToString::to_string).collect();
        f.write_str(&names.join("+"))
    }
}

impl FromStr for Factors {
    type Err = EvalError;

    /// Parts, joined by `+`.
    fn from_str(names: &str) -> Result<Self, EvalError> {
        let parts: Vec<Ablation> =
            names.split('+').map(|name| name.trim().parse()).collect::<Result<_, _>>()?;
        match parts.iter().enumerate().find(|(n, part)| parts[..*n].contains(part)) {
            Some((_, twice)) => Err(EvalError::Argument(format!(
                "{twice} stands twice in {names:?}: name each part once"
            ))),
            None => Ok(Self(parts)),
        }
    }
}

impl From<Ablation> for Factors {
    fn from(part: Ablation) -> Self {
        Self(vec![part])
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

    fn variants(factors: &str, config: &StillConfig) -> Variants {
        factors.parse::<Factors>().unwrap().variants(config)
    }

    fn names(of: &[(String, StillConfig)]) -> Vec<&str> {
        of.iter().map(|(name, _)| name.as_str()).collect()
    }

    #[test]
    fn variants_differ_from_the_student_and_from_each_other() {
        let config = config();
        for ablation in Ablation::ALL {
            assert_eq!(ablation.to_string().parse::<Ablation>().unwrap(), ablation);
            let Variants { asked, .. } = Factors::from(ablation).variants(&config);
            assert!(!asked.is_empty(), "{ablation}");
            for (n, (name, variant)) in asked.iter().enumerate() {
                assert!(name.starts_with(&ablation.to_string()), "{name}");
                assert_ne!(*variant, config, "{name}");
                assert!(asked[..n].iter().all(|(_, other)| other != variant), "{name}");
            }
        }
        let Variants { asked, skipped } = variants("budgets", &config);
        assert_eq!(asked.len(), 6, "4 of 64 is the student itself: {:?}", names(&asked));
        assert_eq!(skipped, [("budgets: 4 of 64".into(), Skipped::SameAs(THE_STUDENT.into()))]);
    }

    #[test]
    fn nothing_kept_means_all_in_the_state() {
        for (name, variant) in variants("branches", &config()).asked {
            let kept = variant.router != Router::None;
            assert_eq!(kept, variant.branches.salient, "{name}");
        }
    }

    #[test]
    fn every_combination_is_asked_or_has_its_reason() {
        let config = config();
        let Variants { asked, skipped } = variants("router+budgets", &config);
        // Three routers at six budgets that keep something less the student; what keeps nothing, once.
        assert_eq!(asked.len(), 3 * 6 - 1 + 1, "{:?}", names(&asked));
        assert_eq!(asked.len() + skipped.len(), 4 * 7);
        let at = |name: &str| {
            &asked.iter().find(|(known, _)| known == name).unwrap_or_else(|| panic!("no {name}")).1
        };
        let both = at("router: random, budgets: 8 of 64");
        assert_eq!(both.router, Router::Random { seed: 0 });
        assert!(both.budgets.iter().flatten().all(|&budget| budget == 8));
        assert_eq!(
            StillConfig { router: config.router, budgets: config.budgets.clone(), ..both.clone() },
            config
        );
        let why = |name: &str| {
            let found = skipped.iter().find(|(known, _)| known == name);
            found.unwrap_or_else(|| panic!("{name} is not skipped")).1.to_string()
        };
        let student = why("router: self_saliency, budgets: 4 of 64");
        assert_eq!(student, "the same as the student itself");
        let same = "the same as router: self_saliency, budgets: 0 of 64";
        assert_eq!(why("router: none, budgets: 8 of 64"), same);
        assert_eq!(why("router: random, budgets: 0 of 64"), same);
    }

    #[test]
    fn a_router_without_salient_tokens_is_impossible_in_either_order() {
        for factors in ["branches+router", "router+branches"] {
            let Variants { asked, skipped } = variants(factors, &config());
            assert_eq!(asked.len() + skipped.len(), 5 * 4, "{factors}");
            let impossible: Vec<&String> = skipped
                .iter()
                .filter(|(_, why)| matches!(why, Skipped::Impossible(_)))
                .map(|(name, _)| name)
                .collect();
            // Three settings without salient tokens, three routers that keep some.
            assert_eq!(impossible.len(), 9, "{skipped:?}");
            let linear = |name: &&&String| {
                name.contains("branches: linear") && name.contains("router: random")
            };
            assert_eq!(impossible.iter().filter(linear).count(), 1, "{impossible:?}");
            for (name, variant) in &asked {
                assert!(variant.branches.salient || variant.router == Router::None, "{name}");
            }
            // Window, window and linear, linear (without a router); the first two with salient tokens, by three routers each,
            // less the student.
            assert_eq!(asked.len(), 3 + 2 * 3 - 1, "{:?}", names(&asked));
        }
    }

    #[test]
    fn the_own_setting_is_among_them_even_if_it_is_none_of_ours() {
        let mut config = config();
        config.budgets[0][0] = 64;
        config.cap = Some(300);
        let Variants { asked, skipped } = variants("budgets+cap", &config);
        assert_eq!(asked.len() + skipped.len(), 8 * 6);
        assert_eq!(
            skipped[0],
            ("budgets: by head, cap: 300".into(), Skipped::SameAs(THE_STUDENT.into()))
        );
        let own = asked.iter().find(|(name, _)| name == "budgets: by head, cap: none").unwrap();
        assert_eq!((own.1.budgets[0][0], own.1.cap), (64, None));
    }

    #[test]
    fn a_recall_cache_takes_the_place_of_router_budgets_and_cap() {
        let lolcats = StillConfig { router: Router::None, ..config() };
        let Variants { asked, skipped } = variants("recall_cache", &lolcats);
        let expected = [64, 128, 256, 512].map(|cache| {
            (format!("recall_cache: {cache}"), lolcats.clone().with_recall_cache(cache))
        });
        assert_eq!(asked, expected);
        assert_eq!(skipped, [("recall_cache: none".into(), Skipped::SameAs(THE_STUDENT.into()))]);
        // A state and salient tokens are what it is made of.
        let Variants { asked, skipped } = variants("branches+recall_cache", &config());
        assert_eq!(asked.len() + skipped.len(), 5 * 5);
        let cached = asked.iter().filter(|(_, variant)| variant.router == Router::SelfRecall);
        assert_eq!(cached.count(), 4, "{:?}", names(&asked));
        let impossible = skipped.iter().filter(|(_, why)| matches!(why, Skipped::Impossible(_)));
        assert_eq!(impossible.count(), 4 * 4, "{skipped:?}");
    }

    #[test]
    fn a_setting_that_nothing_reads_is_no_variant() {
        let mut config = config();
        config.branches.linear = false;
        for factors in ["feature_map", "linear_norm", "feature_map+linear_norm"] {
            assert!(variants(factors, &config).asked.is_empty(), "{factors}");
        }
    }

    #[test]
    fn what_is_no_part_is_refused() {
        let error = |text: &str| text.parse::<Factors>().unwrap_err().to_string();
        assert!(error("rooter").contains("router"), "{}", error("rooter"));
        assert!(error("router+").contains("unknown ablation \"\""), "{}", error("router+"));
        assert!(
            error("cap+router+cap").contains("cap stands twice"),
            "{}",
            error("cap+router+cap")
        );
        assert_eq!("router+budgets".parse::<Factors>().unwrap().to_string(), "router+budgets");
    }
}
