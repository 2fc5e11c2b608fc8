//! Against the CPU's fused forms, gradients included.

use candle_core::{DType, Result, Tensor, Var};
use still_testing::{assert_max_error, random_f32 as random};

use super::super::{self as fused, Dropout, Rotation};
use crate::config::Activation;
use crate::decoder::{Linear, Lora, Weight};

/// Value and gradients at `inputs` of `Σ f(inputs) ⊙ weight`.
fn graded(
    inputs: &[Tensor],
    f: impl Fn(&[Tensor]) -> Result<Tensor>,
) -> (Tensor, Vec<Option<Tensor>>) {
    let vars: Vec<Var> = inputs.iter().map(|x| Var::from_tensor(x).unwrap()).collect();
    let tensors: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
    let y = f(&tensors).unwrap();
    let weight = random(y.dims(), 99);
    let grads = (&y * weight).unwrap().sum_all().unwrap().backward().unwrap();
    (y.detach(), vars.iter().map(|var| grads.get(var).cloned()).collect())
}

fn assert_close(got: &Tensor, expected: &Tensor, what: &str) {
    assert_max_error(what, got, expected, 2e-5);
}

fn same(
    what: &str,
    inputs: &[Tensor],
    device: impl Fn(&[Tensor]) -> Result<Tensor>,
    fused: impl Fn(&[Tensor]) -> Result<Tensor>,
) {
    let ((y, dx), (expected, expected_dx)) = (graded(inputs, device), graded(inputs, fused));
    assert_close(&y, &expected, what);
    for (n, (got, expected)) in dx.iter().zip(&expected_dx).enumerate() {
        let (Some(got), Some(expected)) = (got, expected) else {
            panic!("{what}: no gradient of input {n}");
        };
        assert_close(got, expected, &format!("{what}, gradient of input {n}"));
    }
}

/// Where the CPU has no kernels of its own, products are made of the tensor library's ops, as on other devices.
fn f64(x: &Tensor) -> Result<Tensor> {
    x.to_dtype(DType::F64)
}

fn f32(y: Result<Tensor>) -> Result<Tensor> {
    y?.to_dtype(DType::F32)
}

#[test]
fn ops_of_devices_are_the_fused_ops() {
    let x = [random(&[2, 3, 8], 1)];
    let norm = random(&[8], 2);
    same(
        "rms_norm",
        &x,
        |x| super::rms_norm(&x[0], &norm, 1e-5),
        |x| fused::rms_norm(&x[0], &norm, 1e-5),
    );
    let weight = Weight::Dense(random(&[6, 8], 3));
    let composed_weight = Weight::Dense(f64(&weight.to_tensor().unwrap()).unwrap());
    same(
        "frozen_linear",
        &x,
        |x| f32(fused::frozen_linear(&f64(&x[0])?, &composed_weight, None)),
        |x| fused::frozen_linear(&x[0], &weight, None),
    );
    // Of every channel of a head, and of a half of them.
    for (runs, pairs) in [(1, 2), (2, 2), (1, 1), (2, 1)] {
        let angles: Vec<f64> = (0..runs * 3 * pairs).map(|i| 0.3 * i as f64).collect();
        let rotation = Rotation::partial(&angles, (runs, 3), 4, 1.1).unwrap();
        for rotation in [None, Some(&rotation)] {
            same(
                "split_heads",
                &x,
                |x| super::split_heads(&x[0], 4, rotation)?.contiguous(),
                |x| fused::split_heads(&x[0], 4, rotation),
            );
        }
    }
    for biased in [false, true] {
        let linear = |out: usize, inner: usize, seed| Linear {
            weight: random(&[out, inner], seed).into(),
            bias: biased.then(|| random(&[out], seed + 10)),
        };
        let (gate, up) = (linear(7, 8, 4), linear(7, 8, 5));
        let composed = [&gate, &up].map(|linear| Linear {
            weight: f64(&linear.weight.to_tensor().unwrap()).unwrap().into(),
            bias: linear.bias.as_ref().map(|bias| f64(bias).unwrap()),
        });
        for activation in [Activation::Silu, Activation::GeluTanh] {
            same(
                "gated",
                &x,
                |x| f32(fused::gated(&f64(&x[0])?, &composed[0], &composed[1], activation)),
                |x| fused::gated(&x[0], &gate, &up, activation),
            );
        }
    }
    for dropout in [None, Some(Dropout { rate: 0.5, seed: 1, stream: 2 })] {
        let inputs = [x[0].clone(), random(&[2, 8], 7), random(&[6, 2], 8)];
        let lora = |a: Tensor, b: Tensor| Lora { a, b, scale: 2.0, dropout };
        same(
            "low_rank_linear",
            &inputs,
            |x| {
                let lora = lora(f64(&x[1])?, f64(&x[2])?);
                f32(fused::low_rank_linear(&f64(&x[0])?, &composed_weight, &lora))
            },
            |x| {
                let lora = lora(x[1].clone(), x[2].clone());
                fused::low_rank_linear(&x[0], &weight, &lora)
            },
        );
    }
}

#[test]
fn without_a_gradient_to_come_there_is_no_graph() {
    let (x, norm) = (random(&[2, 8], 1), random(&[8], 2));
    assert!(!super::rms_norm(&x, &norm, 1e-5).unwrap().track_op());
}
