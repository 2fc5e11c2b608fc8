//! The operator on memory that a caller lends, without a tensor of each operand.

use still_compute::Real;

use super::learned::Learned;
use super::operator::{Operator, Routed};
use crate::arguments::expect_dims;
use crate::output::OP;
use crate::saved_attention::check;
use crate::{HybridConfig, HybridWeights, Result, Routing};

/// Rows in memory of the host, one after the other.
#[derive(Clone, Copy, Debug)]
pub struct HostRows<'a, T> {
    /// As many as `shape` says.
    pub values: &'a [T],
    /// `[B, heads, N, D]`
    pub shape: &'a [usize],
}

/// The forward pass of [`hybrid_attention`](crate::hybrid_attention) in f32 or f64, into `out` `[B, H, N, D]`, of which every value is
/// written. `sums` gets the linear states that the sequences leave: `S` `[2F, D]` and then `z` `[2F]` of each selection head, zeros
/// where nothing was absorbed.
///
/// # Errors
/// As [`hybrid_attention`](crate::hybrid_attention); values that are not of their shape.
pub fn attention_into<T: Real>(
    rows: [HostRows<'_, T>; 3],
    gate: Option<HostRows<'_, T>>,
    weights: &HybridWeights,
    config: &HybridConfig,
    out: &mut [T],
    sums: &mut [T],
) -> Result<Routing> {
    let shapes = rows.map(|rows| rows.shape);
    let geometry = check(shapes, gate.map(|gate| gate.shape), weights, config)?;
    let lent = ["q", "k", "v", "gate"].into_iter().zip(rows.into_iter().chain(gate));
    for (name, HostRows { values, shape }) in lent {
        expect_dims(OP, name, &[values.len()], &[shape.iter().product()])?;
    }
    expect_dims(OP, "out", &[out.len()], &[rows[0].values.len()])?;
    let heads = geometry.selection_heads(config.selection_head);
    let expected = shapes[0][0] * heads * 2 * config.feature_dim * (geometry.head_dim + 1);
    expect_dims(OP, "sums", &[sums.len()], &[expected])?;
    sums.fill(T::zero());
    let (batch, tokens) = (shapes[0][0], shapes[0][2]);
    let operator = Operator { geometry, config, batch, tokens };
    let learned = Learned::of::<T>(weights)?;
    let rows = rows.map(|rows| rows.values);
    let Routed { selection, scores } =
        learned.with_operands(rows, gate.map(|gate| gate.values), |operands| {
            operator.forward_into(&operands, None, out, Some(sums))
        })?;
    Ok(Routing::on_host(selection, scores))
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::*;
    use crate::{HeadGeometry, StillConfig, attention_forward};

    const GEOMETRY: HeadGeometry =
        HeadGeometry { num_heads: 4, num_key_value_heads: 2, head_dim: 16 };
    const TOKENS: usize = 150;

    fn values(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * 7919 + seed) as f32 * 0.618).sin()).collect()
    }

    fn tensor(shape: &[usize], seed: usize) -> Tensor {
        let values = values(shape.iter().product(), seed);
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    /// A head that keeps every token and one that keeps 2 of 16.
    fn config() -> HybridConfig {
        let mut config = StillConfig::uniform(1, GEOMETRY, 16, 2).layer(0).unwrap();
        config.budgets = vec![16, 2];
        config
    }

    fn weights() -> HybridWeights {
        HybridWeights {
            feature_map_q: tensor(&[4, 16, 16], 4),
            feature_map_k: tensor(&[2, 16, 16], 5),
            householder_q: None,
            householder_k: None,
            log_lambda: Some(tensor(&[4], 6)),
            window_factor: None,
        }
    }

    #[test]
    fn lent_memory_gives_what_tensors_give() {
        let shapes = [[2, 4, TOKENS, 16], [2, 2, TOKENS, 16], [2, 2, TOKENS, 16]];
        let data = [1, 2, 3].map(|i| values(shapes[i - 1].iter().product(), i));
        let rows = [0, 1, 2].map(|i| HostRows { values: &data[i], shape: &shapes[i] });
        let (config, weights) = (config(), weights());
        let (mut out, mut sums) = (vec![f32::NAN; data[0].len()], vec![7.0; 2 * 2 * 32 * 17]);
        let routing = attention_into(rows, None, &weights, &config, &mut out, &mut sums).unwrap();

        let tensors = [1, 2, 3].map(|i| tensor(&shapes[i - 1], i));
        let (expected, _) =
            attention_forward(tensors.each_ref(), None, &weights, &config, None, false).unwrap();
        assert_eq!(out, expected.out.flatten_all().unwrap().to_vec1::<f32>().unwrap());
        assert_eq!(routing.selection().unwrap(), expected.routing.selection().unwrap());
        assert_eq!(routing.scores().unwrap(), expected.routing.scores().unwrap());

        // Each absorbed token adds 1 to each half of z; a head that keeps all absorbs none.
        let selection = routing.selection().unwrap();
        for (index, sums) in sums.chunks_exact(32 * 17).enumerate() {
            let row = selection.row(index / 2, index % 2);
            let absorbed = row.iter().filter(|&&at| at != crate::Selection::NEVER).count();
            assert_eq!(absorbed, if index % 2 == 0 { 0 } else { 14 * (TOKENS / 16 - 1) });
            for half in sums[32 * 16..].chunks_exact(16) {
                assert!((half.iter().sum::<f32>() - absorbed as f32).abs() < 1e-3);
            }
            assert_eq!(sums[..32 * 16].iter().any(|&x| x != 0.0), absorbed > 0);
        }
    }

    #[test]
    fn sizes_that_do_not_fit_are_named() {
        let shapes = [[1, 4, 3, 16], [1, 2, 3, 16], [1, 2, 3, 16]];
        let data = [1, 2, 3].map(|i| values(shapes[i - 1].iter().product(), i));
        let rows = [0, 1, 2].map(|i| HostRows { values: &data[i], shape: &shapes[i] });
        let (config, weights) = (config(), weights());
        let refused = |rows, out: usize, sums: usize| {
            let (mut out, mut sums) = (vec![0.0; out], vec![0.0; sums]);
            attention_into(rows, None, &weights, &config, &mut out, &mut sums)
                .unwrap_err()
                .to_string()
        };
        let (all, linear) = (data[0].len(), 2 * 32 * 17);
        assert!(refused(rows, all - 1, linear).contains("out"));
        assert!(refused(rows, all, linear + 1).contains("sums"));
        let short = [HostRows { values: &data[0][1..], ..rows[0] }, rows[1], rows[2]];
        assert!(refused(short, all, linear).contains("q"));
        let flat = [HostRows { values: &data[0], shape: &[all] }, rows[1], rows[2]];
        assert!(refused(flat, all, linear).contains("[batch, heads, tokens, head_dim]"));
    }
}
