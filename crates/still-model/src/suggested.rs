//! Sampling options that a model's files suggest.

use crate::config::Table;
use crate::error::Result;
use crate::generate::GenerateOptions;
use crate::model::Model;

/// Sampling options of a model's `generation_config.json`, or of a GGUF file's `general.sampling.*`. Options that the file leaves
/// out are off.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SuggestedSampling {
    /// 1 if the file leaves it out.
    pub temperature: f64,
    /// 0 is off.
    pub top_k: usize,
    /// 1 is off.
    pub top_p: f64,
    /// 0 is off.
    pub min_p: f64,
    /// 1 is off.
    pub repetition_penalty: f64,
}

impl Model {
    /// The suggested options. `None` if the files suggest the likeliest token (`do_sample` is not true), or nothing.
    ///
    /// # Errors
    /// A value of another type, or out of range.
    pub fn suggested_sampling(&self) -> Result<Option<SuggestedSampling>> {
        let Some(json) = &self.base.generation_config else { return Ok(None) };
        let table = Table::root(json)?;
        if table.flag("do_sample")? != Some(true) {
            return Ok(None);
        }
        let off = GenerateOptions::default();
        // transformers writes 0 for a nucleus that is off, and so do people.
        let top_p = table.number("top_p", 0.0..=1.0)?.filter(|&share| share > 0.0);
        Ok(Some(SuggestedSampling {
            temperature: table.number("temperature", 0.0..=1e6)?.unwrap_or(1.0),
            top_k: table.size("top_k", 0..=u32::MAX as usize)?.unwrap_or(off.top_k),
            top_p: top_p.unwrap_or(off.top_p),
            min_p: table.number("min_p", 0.0..=1.0)?.unwrap_or(off.min_p),
            repetition_penalty: table
                .number("repetition_penalty", 0.01..=100.0)?
                .unwrap_or(off.repetition_penalty),
        }))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::random::{random_model, tiny_config};

    fn of(config: Option<Value>) -> Result<Option<SuggestedSampling>> {
        let mut model = random_model(tiny_config(), 1).unwrap();
        model.base.generation_config = config;
        model.suggested_sampling()
    }

    #[test]
    fn what_is_suggested_is_read_and_the_rest_is_off() {
        assert_eq!(of(None).unwrap(), None);
        assert_eq!(of(Some(json!({ "temperature": 0.6 }))).unwrap(), None);
        assert_eq!(of(Some(json!({ "do_sample": false, "top_k": 20 }))).unwrap(), None);
        let qwen = json!({
            "do_sample": true, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05
        });
        let expected = SuggestedSampling {
            temperature: 0.7,
            top_k: 20,
            top_p: 0.8,
            min_p: 0.0,
            repetition_penalty: 1.05,
        };
        assert_eq!(of(Some(qwen)).unwrap(), Some(expected));
        let gemma = of(Some(json!({ "do_sample": true, "top_k": 64, "top_p": 0.95 })));
        assert_eq!(gemma.unwrap().unwrap().temperature, 1.0);
    }

    #[test]
    fn a_value_of_another_kind_is_named() {
        for (key, value) in
            [("top_p", json!(7)), ("top_k", json!(-1)), ("temperature", json!("hot"))]
        {
            let error = of(Some(json!({ "do_sample": true, key: value }))).unwrap_err();
            assert!(error.to_string().contains(key), "{error}");
        }
    }
}
