//! Estimate of a student's cache before training.

use serde::Serialize;
use still_attention::{HeadSize, Mode, RowDtype, StillConfig};
use still_model::ModelConfig;

use crate::recipe::CalibrationRecipe;

/// A student's attention cache compared with its teacher's, of one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct CachePlan {
    /// Tokens of the sequence.
    pub at_length: usize,
    /// Bytes of the student's cache.
    pub bytes: usize,
    /// Whether `bytes` is a limit that calibration will keep.
    pub at_most: bool,
    /// Bytes of the teacher's cache, in bf16.
    pub dense_bytes: usize,
}

impl CachePlan {
    /// The cache of a student with the attention `still`, at the length of the recipe's calibration.
    pub fn of(still: &StillConfig, model: &ModelConfig, calibration: &CalibrationRecipe) -> Self {
        let at_length = calibration.at_length;
        let dense = model.dense_cache_bytes(at_length, RowDtype::Bf16);
        let dense_bytes = usize::try_from(dense).unwrap_or(usize::MAX);
        let (bytes, at_most) = match calibration.cache_fraction {
            Some(share) => ((share * dense_bytes as f64) as usize, true),
            None => (bytes(still, model, at_length), false),
        };
        Self { at_length, bytes, at_most, dense_bytes }
    }
}

/// Bytes of a student's cache after `tokens` tokens. Exact rows are bf16 unless the student says otherwise.
fn bytes(still: &StillConfig, model: &ModelConfig, tokens: usize) -> usize {
    let size = |rows| HeadSize {
        chunk: still.chunk,
        head_dim: model.head_dim,
        feature_dim: if still.branches.linear { still.feature_dim } else { 0 },
        cap: still.cap,
        rows,
    };
    let rows = still.rows.unwrap_or(RowDtype::Bf16);
    let layer = |(layer, budgets): (usize, &Vec<usize>)| -> usize {
        let size = size(still.stored_rows(layer, rows));
        let head = |&budget: &usize| match still.mode {
            Mode::Hybrid => size.bytes(budget, tokens),
            // No row stays.
            Mode::LinearOnly => size.bytes_by_part(0, tokens.max(4 * still.chunk)).linear_states,
        };
        budgets.iter().map(head).sum()
    };
    let hybrid = still.budgets.iter().enumerate().map(layer).sum::<usize>();
    let windows = (0..model.num_hidden_layers).filter_map(|layer| model.sliding_window(layer));
    let sliding = |window| model.num_key_value_heads * size(rows).sliding_bytes(window, tokens);
    hybrid + windows.map(sliding).sum::<usize>()
}

#[cfg(test)]
mod tests {
    use still_attention::KeyExponents;
    use still_model::random::{random_model, tiny_config, tiny_sliding_config};
    use still_model::{FeatureInit, Student};

    use super::*;

    #[test]
    fn the_plan_is_what_a_cache_takes() {
        const TOKENS: usize = 200;
        let tiny = tiny_config();
        let uniform = StillConfig::uniform(2, tiny.geometry(), 16, 3);
        let capped = StillConfig { cap: Some(20), ..uniform.clone() };
        let int8 = StillConfig { rows: Some(RowDtype::Int8), ..uniform.clone() };
        // Layers with wide keys keep 8 bits in place of 4.
        let wide = vec![KeyExponents::new(vec![0, 4, 0, 0, 0, 0, 0, 0]).unwrap(); 2];
        let int4 = StillConfig {
            rows: Some(RowDtype::Int4),
            key_exponents: vec![wide, Vec::new()],
            ..uniform.clone()
        };
        let window = StillConfig::window_only(2, tiny.geometry(), 16);
        let linear = StillConfig::linear_only(2, tiny.geometry(), 16);
        let sliding = tiny_sliding_config();
        let layers = sliding.num_hidden_layers;
        let own = sliding.fit_still(StillConfig::uniform(layers, sliding.geometry(), 16, 3));
        let all = [uniform, capped, int8, int4, window, linear].map(|still| (&tiny, still));
        for (config, still) in all.into_iter().chain([(&sliding, own)]) {
            let student = Student::init(still.clone(), config, FeatureInit::Identity, 1).unwrap();
            let model = random_model(config.clone(), 1).unwrap().with_student(student);
            let mut cache = model.new_cache(1, model.cache_rows(RowDtype::Bf16)).unwrap();
            let ids: Vec<u32> = (0..TOKENS as u32).map(|n| n * 7 % 250).collect();
            model.prefill(&ids, &mut cache).unwrap();
            let calibration = CalibrationRecipe { at_length: TOKENS, ..Default::default() };
            let plan = CachePlan::of(&still, config, &calibration);
            assert_eq!((plan.bytes, plan.at_most), (cache.size_bytes(), false), "{still:?}");
            let mut dense = model.teacher().new_cache(1, RowDtype::Bf16).unwrap();
            model.teacher().prefill(&ids, &mut dense).unwrap();
            assert!(plan.dense_bytes <= dense.size_bytes(), "{still:?}");
        }
    }

    #[test]
    fn calibration_has_a_limit() {
        let config = tiny_config();
        let still = StillConfig::uniform(2, config.geometry(), 16, 3);
        let calibration = CalibrationRecipe { cache_fraction: Some(0.25), ..Default::default() };
        let plan = CachePlan::of(&still, &config, &calibration);
        // 2 layers, 2 heads of 8 channels, K and V, 2 bytes each.
        assert_eq!((plan.at_length, plan.dense_bytes), (8192, 8192 * 2 * 2 * 8 * 2 * 2));
        assert_eq!((plan.bytes, plan.at_most), (plan.dense_bytes / 4, true));
    }
}
