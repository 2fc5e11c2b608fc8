//! The feature map of the linear branch:
//!
//! ```text
//! φ(x) = [ softmax(u) ; softmax(−u) ]
//! u    = ‖x‖ · f(x) / ‖f(x)‖           np_map
//! u    = f(x)                          softmax (LoLCATs, Hedgehog)
//! f(x) = H_û(x) W                      H_û(x) = x − 2(x·û)û
//! ```

use super::sums::{dot, softmax};
use crate::config::FeatureMap;

/// `φ(x)` of one row `x` `[D]` under `w` `[D, F]` and an optional Householder vector: `[2F]`.
pub fn feature_row(map: FeatureMap, x: &[f64], w: &[f64], householder: Option<&[f64]>) -> Vec<f64> {
    let features = w.len() / x.len();
    let y = householder.map_or_else(|| x.to_vec(), |u| reflect(x, u));
    let mut u: Vec<f64> =
        (0..features).map(|j| (0..x.len()).map(|i| y[i] * w[i * features + j]).sum()).collect();
    match map {
        FeatureMap::NpMap { .. } => {
            let scale = dot(x, x).sqrt() / dot(&u, &u).sqrt().max(1e-12);
            u.iter_mut().for_each(|u| *u *= scale);
        }
        FeatureMap::Softmax => {}
    }
    let minus: Vec<f64> = u.iter().map(|u| -u).collect();
    [softmax(&u), softmax(&minus)].concat()
}

/// `H_û(x)`, `û = u / ‖u‖`.
fn reflect(x: &[f64], u: &[f64]) -> Vec<f64> {
    let length = dot(u, u).sqrt();
    let along = dot(x, u) / length;
    x.iter().zip(u).map(|(x, u)| x - 2.0 * along * u / length).collect()
}
