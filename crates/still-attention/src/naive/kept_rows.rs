//! What a state gives back of a row that it keeps, by the format that it is stored in:
//!
//! ```text
//! int8    s · round(x / s)                       s = max |x| / 127
//! int4    s · clamp(round((x − o) / s)) + o      of each 32 values: o = min x, s = (max x − min x) / 15, both rounded to f16;
//!                                                codes are clamped to 0 … 15
//!         of keys, H of that of H x              of each whole 32 values: H_ij = (−1)^popcount(i & j) / √32
//!         of keys of a head that keeps all       of each 32 tokens of a channel in place of 32 channels of a token, without H
//! ```
//!
//! The other formats round each value. With exponents `e` a key is coded as `x_c · 2^−e_c`, and what comes back is times `2^e_c`.

use half::{bf16, f16};

use crate::config::RowDtype;
use crate::key_exponents::KeyExponents;

/// A key `[D]` as the format gives it back, its channels scaled by `exponents` if the format codes them.
pub fn kept_key(row: &[f64], rows: RowDtype, exponents: Option<&KeyExponents>) -> Vec<f64> {
    let exponents = exponents.filter(|_| rows.is_coded());
    let scaled = |row: &[f64], sign: i32| -> Vec<f64> {
        let power = |c: usize| exponents.map_or(0, |e| sign * i32::from(e.values()[c]));
        row.iter().enumerate().map(|(c, &x)| x * 2.0_f64.powi(power(c))).collect()
    };
    scaled(&unscaled_key(&scaled(row, -1), rows), 1)
}

fn unscaled_key(row: &[f64], rows: RowDtype) -> Vec<f64> {
    match rows {
        RowDtype::Int4 => row.chunks(32).flat_map(|x| rotated(&four_bits(&rotated(x)))).collect(),
        _ => kept_value(row, rows),
    }
}

/// The keys `[N, D]` of a head that keeps every token, as `int4` gives them back. The last tokens, fewer than 32, are never kept.
pub fn kept_keys_by_channel(keys: &[f64], d: usize, exponents: Option<&KeyExponents>) -> Vec<f64> {
    let mut kept = keys.to_vec();
    for group in kept.chunks_exact_mut(32 * d) {
        for channel in 0..d {
            let power = 2.0_f64.powi(exponents.map_or(0, |e| e.values()[channel].into()));
            let values: Vec<f64> = (0..32).map(|t| group[t * d + channel] / power).collect();
            for (t, value) in four_bits(&values).into_iter().enumerate() {
                group[t * d + channel] = value * power;
            }
        }
    }
    kept
}

/// A value `[D]` as the format gives it back.
pub fn kept_value(row: &[f64], rows: RowDtype) -> Vec<f64> {
    match rows {
        RowDtype::F32 => row.iter().map(|&x| f64::from(x as f32)).collect(),
        RowDtype::Bf16 => row.iter().map(|&x| bf16::from_f64(x).to_f64()).collect(),
        RowDtype::F16 => row.iter().map(|&x| f16::from_f64(x).to_f64()).collect(),
        RowDtype::Int8 => eight_bits(row),
        RowDtype::Int4 => row.chunks(32).flat_map(four_bits).collect(),
    }
}

/// Codes are found in f32, so that a tie between two goes the same way everywhere.
fn eight_bits(row: &[f64]) -> Vec<f64> {
    let largest = row.iter().fold(0.0, |a: f32, &x| a.max((x as f32).abs()));
    let code = |x: f64| if largest > 0.0 { (x as f32 * (127.0 / largest)).round() } else { 0.0 };
    row.iter().map(|&x| f64::from(largest / 127.0) * f64::from(code(x))).collect()
}

/// The same of a group.
fn four_bits(group: &[f64]) -> Vec<f64> {
    let low = group.iter().fold(f32::INFINITY, |a, &x| a.min(x as f32));
    let high = group.iter().fold(f32::NEG_INFINITY, |a, &x| a.max(x as f32));
    let (offset, scale) =
        (f16::from_f32(low).to_f32(), f16::from_f32((high - low) / 15.0).to_f32());
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    let code = |x: f64| ((x as f32 - offset) * inverse).round().clamp(0.0, 15.0);
    let value = |&x: &f64| f64::from(scale) * f64::from(code(x)) + f64::from(offset);
    group.iter().map(value).collect()
}

/// `H x`, or `x` where it is not whole.
fn rotated(x: &[f64]) -> Vec<f64> {
    if x.len() < 32 {
        return x.to_vec();
    }
    let sign = |i: usize, j: usize| if (i & j).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
    let entry = |i: usize| (0..32).map(|j| sign(i, j) * x[j]).sum::<f64>() / 32.0_f64.sqrt();
    (0..32).map(entry).collect()
}
