//! Fused, differentiable ops of the decoder.
//!
//! candle's own fused RMSNorm and RoPE have no gradient, and its matrix product computes the gradients of
//! both operands even where one is frozen. These have exactly the gradients that linearization needs. On the CPU they
//! are loops of `still-compute`; `device` has them for other devices.
//!
//! | file | content |
//! |---|---|
//! | `linear` | products with frozen matrices, and with low-rank updates |
//! | `gated` | the gated half of an MLP |
//! | `rms_norm`, `residual` | norms and sums |
//! | `heads`, `rope` | rows to heads and back; rotation |
//! | `dropout` | masks that can be drawn again |
//! | `plain` | the same without a graph, forward and backward |
//! | `composed` | a value that `plain` gave, in the graph, with a gradient of its own |
//! | `device` | norms, activations and heads on other devices than the CPU |

mod composed;
pub(super) mod device;
mod dropout;
mod gated;
mod heads;
pub(super) mod linear;
pub(super) mod plain;
mod residual;
mod rms_norm;
mod rope;

pub use dropout::Dropout;
pub use gated::{MlpWeights, gated};
pub use heads::{merge_heads, split_heads};
pub(super) use linear::wide_product;
pub use linear::{frozen_linear, low_rank_linear, wide_linear};
pub use residual::residual;
pub use rms_norm::{rms_norm, rms_norm_heads};
pub use rope::Rotation;
#[cfg(feature = "cuda")]
pub(super) use rope::SHARED;

use candle_core::{DType, Result, Tensor};
pub(crate) use still_compute::tensor::borrow as with_values;
use still_compute::tensor::slice;

/// An error unless there are kernels for the dtype of `x`.
fn check_dtype(op: &'static str, x: &Tensor) -> Result<()> {
    match x.dtype() {
        DType::F32 | DType::F64 => Ok(()),
        _ if !x.device().is_cpu() => Ok(()),
        other => candle_core::bail!("{op}: no kernel for {other:?}, expected f32 or f64"),
    }
}

/// The shape of `x` with rows of another width.
fn of_width(x: &Tensor, width: usize) -> Vec<usize> {
    let mut shape = x.dims().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = width;
    }
    shape
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};
    use still_quant::{Format, PackedMatrix};
    use still_testing::{assert_max_error, random};

    use super::*;
    use crate::config::Activation;
    use crate::decoder::{Linear, Lora, Weight};

    const ACTIVATIONS: [Activation; 2] = [Activation::Silu, Activation::GeluTanh];

    fn flat(tensor: &Tensor) -> Vec<f64> {
        tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    /// The gradient of `Σ f(x) ⊙ weight` against central differences, in float64.
    fn check(x: &Tensor, f: impl Fn(&Tensor) -> Result<Tensor>) {
        let x = Var::from_tensor(x).unwrap();
        let y = f(&x).unwrap();
        let weight = random(y.dims(), 99);
        let objective = |x: &Tensor| -> f64 {
            (f(x).unwrap() * &weight).unwrap().sum_all().unwrap().to_scalar().unwrap()
        };
        let grads = (y * &weight).unwrap().sum_all().unwrap().backward().unwrap();
        let got = flat(grads.get(&x).unwrap());
        let base = flat(&x);
        for (i, got) in got.iter().enumerate() {
            let at = |delta: f64| {
                let mut moved = base.clone();
                moved[i] += delta;
                objective(&Tensor::from_vec(moved, x.shape(), &Device::Cpu).unwrap())
            };
            let numeric = (at(1e-5) - at(-1e-5)) / 2e-5;
            assert!((got - numeric).abs() < 1e-7, "value {i}: {got} vs {numeric}");
        }
    }

    #[test]
    fn gradients_match_finite_differences() {
        let weight = random(&[6], 1);
        check(&random(&[2, 3, 6], 2), |x| rms_norm(x, &weight, 1e-5));
        check(&random(&[2, 3, 12], 2), |x| rms_norm_heads(x, &weight, 1e-5));
        let rotation = Rotation::from_angles(&[0.0, 0.3, 1.0, 2.0, -0.5, 4.0], 1, 3).unwrap();
        check(&random(&[2, 3, 8], 5), |x| split_heads(x, 4, Some(&rotation)));
        check(&random(&[2, 3, 8], 5), |x| split_heads(x, 4, None));
        // A part of each head, and scaled.
        let partial = Rotation::partial(&[0.3, 1.0, -0.5], (1, 3), 4, 1.2).unwrap();
        check(&random(&[2, 3, 8], 5), |x| split_heads(x, 4, Some(&partial)));
        check(&random(&[2, 2, 3, 4], 5), merge_heads);
        let other = random(&[2, 3, 6], 3);
        check(&random(&[2, 3, 6], 4), |x| residual(x, &(x * 2.0)?));
        check(&random(&[2, 3, 6], 4), |x| residual(&other, x));
        let (w, b) = (random(&[5, 6], 6), random(&[5], 7));
        let w = Weight::Dense(w);
        check(&random(&[2, 3, 6], 8), |x| frozen_linear(x, &w, Some(&b)));
        for biased in [false, true] {
            let MlpWeights { gate, up, .. } = mlp_weights(biased);
            for activation in ACTIVATIONS {
                check(&random(&[2, 3, 6], 9), |x| gated(x, &gate, &up, activation));
            }
        }
    }

    fn lora() -> Lora {
        Lora { a: random(&[2, 6], 10), b: random(&[5, 2], 11), scale: 2.0, dropout: None }
    }

    /// A prompt is read in longer pieces when nobody else is served.
    #[test]
    fn a_row_of_an_update_does_not_depend_on_how_many_there_are() {
        let (width, out) = (1088, 80);
        let narrow = |shape: &[usize], seed| random(shape, seed).to_dtype(DType::F32).unwrap();
        let w = Weight::Dense(narrow(&[out, width], 6));
        let (a, b) = (narrow(&[8, width], 10), narrow(&[out, 8], 11));
        let lora = Lora { a, b, scale: 2.0, dropout: None };
        let x = narrow(&[1, 192, width], 8);
        let rows = |x: &Tensor| {
            let y = low_rank_linear(x, &w, &lora).unwrap();
            y.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        let parts = [(0, 128), (128, 64)].map(|(start, n)| rows(&x.narrow(1, start, n).unwrap()));
        assert_eq!(rows(&x), parts.concat());
    }

    #[test]
    fn a_low_rank_update_has_all_three_gradients() {
        let w = Weight::Dense(random(&[5, 6], 6));
        let (x, lora) = (random(&[2, 3, 6], 8), lora());
        check(&x, |x| low_rank_linear(x, &w, &lora));
        check(&lora.a, |a| low_rank_linear(&x, &w, &Lora { a: a.clone(), ..lora.clone() }));
        check(&lora.b, |b| low_rank_linear(&x, &w, &Lora { b: b.clone(), ..lora.clone() }));
    }

    #[test]
    fn a_low_rank_update_with_dropout_has_them_too() {
        let w = Weight::Dense(random(&[5, 6], 6));
        let dropout = Some(Dropout { rate: 0.5, seed: 1, stream: 2 });
        let (x, lora) = (random(&[2, 3, 6], 8), Lora { dropout, ..lora() });
        check(&x, |x| low_rank_linear(x, &w, &lora));
        check(&lora.a, |a| low_rank_linear(&x, &w, &Lora { a: a.clone(), ..lora.clone() }));
        check(&lora.b, |b| low_rank_linear(&x, &w, &Lora { b: b.clone(), ..lora.clone() }));
        // Only the update's input is dropped, never the projection's.
        let silent = Lora { b: lora.b.zeros_like().unwrap(), ..lora.clone() };
        assert_close(
            &low_rank_linear(&x, &w, &silent).unwrap(),
            &frozen_linear(&x, &w, None).unwrap(),
        );
    }

    #[test]
    fn values_match_composed_ops() {
        let x = random(&[2, 3, 6], 2);
        let weight = random(&[6], 1);
        let norm = (x.sqr().unwrap().mean_keepdim(2).unwrap() + 1e-5).unwrap().sqrt().unwrap();
        let expected = x.broadcast_div(&norm).unwrap().broadcast_mul(&weight).unwrap();
        assert_close(&rms_norm(&x, &weight, 1e-5).unwrap(), &expected);
        let heads = Tensor::cat(&[&x, &random(&[2, 3, 6], 12)], 2).unwrap();
        let normed = rms_norm_heads(&heads, &weight, 1e-5).unwrap();
        assert_close(&normed.narrow(2, 0, 6).unwrap(), &expected);
        assert!(rms_norm_heads(&heads, &random(&[5], 1), 1e-5).is_err());
        let other = random(&[2, 3, 6], 3);
        assert_close(&residual(&x, &other).unwrap(), &(&x + &other).unwrap());
        assert!(residual(&x, &random(&[6], 1)).is_err());
        let (w, b) = (random(&[5, 6], 6), random(&[5], 7));
        let expected = x.broadcast_matmul(&w.t().unwrap()).unwrap().broadcast_add(&b).unwrap();
        assert_close(&frozen_linear(&x, &w.clone().into(), Some(&b)).unwrap(), &expected);
        let lora = lora();
        let rows = x.reshape((6, 6)).unwrap();
        let update = rows.matmul(&lora.a.t().unwrap()).unwrap().matmul(&lora.b.t().unwrap());
        let update = (update.unwrap() * lora.scale).unwrap().reshape((2, 3, 5)).unwrap();
        let expected = (x.broadcast_matmul(&w.t().unwrap()).unwrap() + update).unwrap();
        assert_close(&low_rank_linear(&x, &w.clone().into(), &lora).unwrap(), &expected);
        // Half rotation: channel i pairs with channel i + D/2.
        let x = Tensor::new(&[[[1.0_f64, 2.0, 3.0, 4.0]]], &Device::Cpu).unwrap();
        let rotation = Rotation::from_angles(&[std::f64::consts::FRAC_PI_2, 0.0], 1, 1).unwrap();
        let got = flat(&split_heads(&x, 4, Some(&rotation)).unwrap());
        for (got, expected) in got.iter().zip([-3.0, 2.0, 1.0, 4.0]) {
            assert!((got - expected).abs() < 1e-6, "{got} vs {expected}");
        }
    }

    #[test]
    fn heads_are_transposed_and_merging_undoes_splitting() {
        let x = random(&[2, 37, 12], 3);
        let split = split_heads(&x, 4, None).unwrap();
        let expected = x.reshape((2, 37, 3, 4)).unwrap().transpose(1, 2).unwrap();
        assert_close(&split, &expected.contiguous().unwrap());
        assert_close(&merge_heads(&split).unwrap(), &x);
        let rotation = Rotation::from_angles(&[0.5; 74], 1, 37).unwrap();
        assert!(split_heads(&x, 5, None).is_err());
        assert!(split_heads(&x, 6, Some(&rotation)).is_err());
    }

    fn mlp_weights(biased: bool) -> MlpWeights {
        let linear = |out: usize, inner: usize, seed| Linear {
            weight: random(&[out, inner], seed).into(),
            bias: biased.then(|| random(&[out], seed + 20)),
        };
        MlpWeights {
            norm: random(&[6], 1).into(),
            gate: linear(5, 6, 2),
            up: linear(5, 6, 3),
            down: linear(6, 5, 4),
            activation: Activation::Silu,
            post_norm: None,
        }
    }

    #[test]
    fn the_fused_gated_half_is_its_parts() {
        let x = random(&[2, 3, 6], 9);
        for biased in [false, true] {
            let MlpWeights { gate, up, .. } = mlp_weights(biased);
            let linear = |w: &Linear| w.forward(&x, None).unwrap();
            for activation in ACTIVATIONS {
                let activated = match activation {
                    Activation::Silu => linear(&gate).silu(),
                    // The tensor library's is the form with tanh.
                    Activation::GeluTanh => linear(&gate).gelu(),
                };
                let expected = activated.unwrap() * linear(&up);
                let got = gated(&x, &gate, &up, activation).unwrap();
                assert_close(&got, &expected.unwrap());
            }
        }
        let mut other = mlp_weights(true);
        other.up.bias = Some(random(&[6], 5));
        assert!(gated(&x, &other.gate, &other.up, Activation::Silu).is_err());
    }

    /// With a gradient each step is an op of its own; without one, a kernel does them all.
    #[test]
    fn fused_products_are_their_steps() {
        let (rows, width, out) = (70, 64, 48);
        let narrow = |shape: &[usize], seed| random(shape, seed).to_dtype(DType::F32).unwrap();
        // 16-bit values are widened on every CPU.
        let packed = |seed| {
            let values = flat(&random(&[out, width], seed));
            let bytes: Vec<u8> = values
                .iter()
                .flat_map(|&x| ((x as f32).to_bits() >> 16).to_le_bytes()[..2].to_vec())
                .collect();
            Weight::Packed(PackedMatrix::new(Format::Bf16, out, width, &bytes).unwrap())
        };
        let (x, onto) = (narrow(&[1, rows, width], 1), narrow(&[1, rows, out], 2));
        let tracked = Var::from_tensor(&x).unwrap();
        let (w, up) = (packed(3), packed(4));
        let (a, b) = (narrow(&[3, width], 5), narrow(&[out, 3], 6));
        let lora = Lora { a, b, scale: 2.0, dropout: None };
        let close = |got: &Tensor, expected: &Tensor| {
            assert_max_error("fused", got, &expected.detach(), 2e-5);
        };

        let updated = low_rank_linear(&tracked, &w, &lora).unwrap();
        close(&low_rank_linear(&x, &w, &lora).unwrap(), &updated);
        assert!(
            plain::fused_linear(&linear::rows(&x).unwrap(), &w, Some(&lora), None)
                .unwrap()
                .is_some()
        );
        for (lora, product) in
            [(Some(&lora), &updated), (None, &frozen_linear(&tracked, &w, None).unwrap())]
        {
            let sum = linear::linear_onto(&onto, &x, &w, lora).unwrap();
            close(&sum.expect("values are widened"), &residual(&onto, product).unwrap());
            assert!(linear::linear_onto(&onto, &tracked, &w, lora).unwrap().is_none());
        }
        let few = x.narrow(1, 0, 63).unwrap();
        let few_onto = onto.narrow(1, 0, 63).unwrap();
        assert!(linear::linear_onto(&few_onto, &few, &w, None).unwrap().is_none());

        let linear = |weight: Weight| Linear { weight, bias: None };
        let (gate, up) = (linear(w), linear(up));
        for activation in ACTIVATIONS {
            let steps = gated(&tracked, &gate, &up, activation).unwrap();
            close(&gated(&x, &gate, &up, activation).unwrap(), &steps);
        }
    }

    fn assert_close(got: &Tensor, expected: &Tensor) {
        assert_max_error("op", got, expected, 1e-12);
    }
}
