//! What tests that run on every device share: sequences, tensors on a device, calls, and a report of all that is wrong.

use candle_core::{DType, Device, Tensor, Var};
use half::bf16;
use still_attention::{
    HeadGeometry, HybridConfig, HybridWeights, Routing, hybrid_attention, naive,
};

use super::{Tensors, flat, random_input, tensors};

/// Largest relative RMS error of outputs and of gradients, compared with float64. f32 kernels on a GPU multiply 16 of a value's
/// bits, and a gradient goes through more products than an output does.
pub fn limits(dtype: DType) -> (f64, f64) {
    match dtype {
        DType::BF16 => (5e-3, 1e-2),
        _ => (1e-5, 3e-5),
    }
}

/// Fills memory that a GPU is likely to allocate next with NaN, so that a value that a kernel does not write shows.
pub fn poison(device: &Device) {
    if device.is_cuda() {
        drop(Tensor::full(f32::NAN, 1 << 24, device).unwrap());
    }
}

/// A random sequence whose values `dtype` holds exactly, so that kernels and twin see the same numbers.
pub fn sequence(
    geometry: HeadGeometry,
    config: &HybridConfig,
    tokens: usize,
    seed: u64,
    dtype: DType,
) -> naive::Input {
    let mut input = random_input(geometry, config, tokens, seed);
    if dtype == DType::BF16 {
        for values in [
            &mut input.q,
            &mut input.k,
            &mut input.v,
            &mut input.feature_map_q,
            &mut input.feature_map_k,
        ] {
            round(values);
        }
        input.gate.iter_mut().for_each(|gate| round(gate));
    }
    input
}

pub fn round(values: &mut [f64]) {
    values.iter_mut().for_each(|x| *x = bf16::from_f64(*x).to_f64());
}

/// Rows in `dtype` and weights in f32, on `device`.
pub fn placed(
    input: &naive::Input,
    config: &HybridConfig,
    dtype: DType,
    device: &Device,
) -> Tensors {
    let x = tensors(input, config, |x| x as f32);
    let rows = |tensor: Tensor| tensor.to_device(device).unwrap().to_dtype(dtype).unwrap();
    let weight = |tensor: Tensor| tensor.to_device(device).unwrap();
    let w = x.weights;
    Tensors {
        q: rows(x.q),
        k: rows(x.k),
        v: rows(x.v),
        gate: x.gate.map(rows),
        weights: HybridWeights {
            feature_map_q: weight(w.feature_map_q),
            feature_map_k: weight(w.feature_map_k),
            householder_q: w.householder_q.map(weight),
            householder_k: w.householder_k.map(weight),
            log_lambda: w.log_lambda.map(weight),
            window_factor: w.window_factor.map(weight),
        },
    }
}

pub fn run(x: &Tensors, config: &HybridConfig, routing: Option<&Routing>) -> (Vec<f64>, Routing) {
    poison(x.q.device());
    let output =
        hybrid_attention(&x.q, &x.k, &x.v, &x.weights, x.gate.as_ref(), config, routing).unwrap();
    assert_eq!(output.out.dtype(), x.q.dtype());
    (flat(&output.out), output.routing)
}

/// Gradients of `Σ out ⊙ cotangent` by input.
pub fn gradients(
    x: &Tensors,
    config: &HybridConfig,
    routing: &Routing,
    cotangent: &[f64],
) -> Vec<(&'static str, Vec<f64>)> {
    let var = |tensor: &Tensor| Var::from_tensor(tensor).unwrap();
    let w = &x.weights;
    let named = [
        ("q", Some(&x.q)),
        ("k", Some(&x.k)),
        ("v", Some(&x.v)),
        ("feature_map_q", Some(&w.feature_map_q)),
        ("feature_map_k", Some(&w.feature_map_k)),
        ("householder_q", w.householder_q.as_ref()),
        ("householder_k", w.householder_k.as_ref()),
        ("log_lambda", w.log_lambda.as_ref()),
        ("window_factor", w.window_factor.as_ref()),
        ("gate", x.gate.as_ref()),
    ];
    let vars = named.map(|(name, tensor)| (name, tensor.map(var)));
    let at = |i: usize| vars[i].1.as_ref().map(|var| var.as_tensor().clone());
    let weights = HybridWeights {
        feature_map_q: at(3).unwrap(),
        feature_map_k: at(4).unwrap(),
        householder_q: at(5),
        householder_k: at(6),
        log_lambda: at(7),
        window_factor: at(8),
    };
    let [q, k, v] = [at(0).unwrap(), at(1).unwrap(), at(2).unwrap()];
    poison(x.q.device());
    let gate = at(9);
    let output = hybrid_attention(&q, &k, &v, &weights, gate.as_ref(), config, Some(routing));
    let out = output.unwrap().out;
    let cotangent = Tensor::from_slice(cotangent, out.shape(), out.device()).unwrap();
    let cotangent = cotangent.to_dtype(out.dtype()).unwrap();
    // The sum of a bf16 product is of no use but for its gradient.
    let grads = (out * cotangent).unwrap().sum_all().unwrap().backward().unwrap();
    vars.iter()
        .filter_map(|(name, var)| Some((*name, flat(grads.get(var.as_ref()?).unwrap()))))
        .collect()
}

/// What is wrong, all of it: one case must not hide the others.
#[derive(Default)]
pub struct Report(Vec<String>);

impl Report {
    pub fn add(&mut self, what: String, error: f64, limit: f64) {
        println!("{error:.1e} {what}");
        if error.is_nan() || error > limit {
            self.0.push(format!("{what}: {error:e}, at most {limit:e}"));
        }
    }

    pub fn finish(self) {
        assert!(self.0.is_empty(), "{}", self.0.join("\n"));
    }
}
