//! `--ablate`: the variants of a student.

use serde::Serialize;
use still_eval::compress::Compression;
use still_eval::{Factors, Skipped};
use still_model::Model;

use crate::errors::user;

/// A combination that is not asked: `{"ablation", "same_as"}` or `{"ablation", "impossible"}`.
#[derive(Debug, Serialize)]
pub struct LeftOut {
    /// Its name.
    pub ablation: String,
    /// Why.
    #[serde(flatten)]
    pub why: Skipped,
}

/// What is asked.
pub struct Subject {
    /// As results name it.
    pub name: String,
    /// What was changed, of a variant of a student.
    pub ablation: Option<String>,
    /// How its cache is compressed, of a dense model.
    pub compression: Option<Compression>,
    pub model: Model,
}

impl Subject {
    /// A model as it was loaded.
    pub fn unchanged(name: &str, model: Model) -> Self {
        Self { name: name.to_owned(), ablation: None, compression: None, model }
    }
}

/// Every variant that can be asked, and those that cannot.
///
/// # Errors
/// A teacher, which has nothing to change.
pub fn ablated(
    name: &str,
    model: &Model,
    factors: &[Factors],
) -> anyhow::Result<(Vec<Subject>, Vec<LeftOut>)> {
    let (mut asked, mut skipped) = (Vec::new(), Vec::new());
    if factors.is_empty() {
        return Ok((asked, skipped));
    }
    let Some(student) = &model.student else {
        return Err(user(
            format!("{name} is a teacher: --ablate changes parts of a student"),
            "name a student for --model",
        ));
    };
    for factors in factors {
        let variants = factors.variants(&student.config);
        let mut skip = |ablation, why| skipped.push(LeftOut { ablation, why });
        variants.skipped.into_iter().for_each(|(variant, why)| skip(variant, why));
        for (variant, config) in variants.asked {
            match student.with_config(config, model.config()) {
                Ok(student) => {
                    let model = model.with_student(student.to_device(model.device())?);
                    let name = format!("{name} [{variant}]");
                    let ablation = Some(variant);
                    asked.push(Subject { name, ablation, compression: None, model });
                }
                // A configuration that the operator or the learned tensors do not have.
                Err(error) => skip(variant, Skipped::Impossible(error.to_string())),
            }
        }
    }
    Ok((asked, skipped))
}
