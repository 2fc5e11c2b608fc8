//! Rows that a state has saved as codes, by their definition.

use candle_core::{Device, Tensor};
use still_attention::{RowDtype, SavedState, naive};

use super::flat;

/// Channels that 4-bit codes share a scale over.
const GROUP: usize = 32;

/// `H x` of each whole group, as keys are rotated before they are coded in 4 bits; `H` is its own inverse.
fn rotated(row: &[f64]) -> Vec<f64> {
    let sign = |i: usize, j: usize| if (i & j).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
    let group = |x: &[f64]| match x.len() {
        GROUP => {
            let sum = |i| (0..GROUP).map(|j| sign(i, j) * x[j]).sum::<f64>() / 32.0_f64.sqrt();
            (0..GROUP).map(sum).collect()
        }
        _ => x.to_vec(),
    };
    row.chunks(GROUP).flat_map(group).collect()
}

/// The rows `[tokens, D]` of one part that a dense cache has saved under `name`, and the step between two codes of each value.
/// Keys in 4 bits are still rotated.
fn decoded(saved: &SavedState, part: usize, name: &str, rows: RowDtype) -> [Vec<Vec<f64>>; 2] {
    let tensors = saved.clone().into_tensors();
    let tensor = |what: &str| flat(&tensors[&format!("{part}.{name}{what}")]);
    let codes = &tensors[&format!("{part}.{name}")];
    let width = codes.dim(1).unwrap();
    let (codes, scales) = (flat(codes), tensor("_scale"));
    let codes = codes.chunks_exact(width).enumerate();
    let both = |values: fn(f64, f64, f64) -> f64| {
        let row = |(n, row): (usize, &[f64])| -> Vec<f64> {
            if rows == RowDtype::Int8 {
                // Two's complement.
                let code = |x: f64| if x > 127.0 { x - 256.0 } else { x };
                return row.iter().map(|&x| values(code(x), scales[n], 0.0)).collect();
            }
            let (offsets, groups) = (tensor("_offset"), (2 * width).div_ceil(GROUP));
            let pairs = row.iter().flat_map(|&pair| [pair % 16.0, (pair / 16.0).floor()]);
            let at = |i: usize| n * groups + i / GROUP;
            pairs.enumerate().map(|(i, x)| values(x, scales[at(i)], offsets[at(i)])).collect()
        };
        codes.clone().map(row).collect()
    };
    [both(|code, scale, offset| code * scale + offset), both(|_, scale, _| scale)]
}

/// What a saved dense cache gives back of its keys and values, `[B, K, tokens, D]` each in f64 and cut to `tokens`, held against
/// what the format makes of the rows `k` and `v` `[B, K, tokens, D]` that were fed: a code is the same, or the next where a value
/// lies between two.
pub fn kept(
    saved: &SavedState,
    [k, v]: [&Tensor; 2],
    lengths: &[usize],
    rows: RowDtype,
) -> [Tensor; 2] {
    let (_, heads, tokens, d) = k.dims4().unwrap();
    let (mut others, mut all) = (0, 0);
    let mut side = |x: &Tensor, name: &str| {
        let is_rotated = name == "k" && rows == RowDtype::Int4;
        let mut kept = Vec::new();
        for (sequence, &length) in lengths.iter().enumerate() {
            for head in 0..heads {
                let fed = flat(&x.get(sequence).unwrap().get(head).unwrap());
                let [values, steps] = decoded(saved, sequence * heads + head, name, rows);
                assert_eq!(values.len(), length);
                for (n, fed) in fed.chunks_exact(d).enumerate() {
                    if n >= length {
                        kept.extend(vec![f64::NAN; d]);
                        continue;
                    }
                    let expected = match is_rotated {
                        true => rotated(&naive::kept_key(fed, rows, None)),
                        false => naive::kept_value(fed, rows),
                    };
                    for ((got, expected), step) in values[n].iter().zip(expected).zip(&steps[n]) {
                        let off = (got - expected).abs() / step;
                        assert!(
                            off <= 1.1,
                            "{name} of token {n}: {got} of {expected}, step {step}"
                        );
                        others += usize::from(off > 0.5);
                        all += 1;
                    }
                    kept.extend(if is_rotated { rotated(&values[n]) } else { values[n].clone() });
                }
            }
        }
        Tensor::from_vec(kept, (lengths.len(), heads, tokens, d), &Device::Cpu).unwrap()
    };
    let both = [side(k, "k"), side(v, "v")];
    assert!(others * 1000 <= all, "{others} of {all} codes are others");
    both
}
