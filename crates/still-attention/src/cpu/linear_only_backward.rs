//! Gradients of [`super::linear_only`] over a whole sequence; everything but `φ(k)` and the states is recomputed.

use super::feature_map::{map_rows, map_rows_backward};
use super::gradients::{RowGrads, Wanted, WeightGrads, add};
use super::head_input::HeadInput;
use super::linear_only::{absorb, at_least, block_weights};
use crate::config::MIN_DENOMINATOR;
use still_compute::Real;
use still_compute::matmul::{Mat, matmul};
use still_compute::vector;

/// As [`super::backward::backward`].
pub(crate) fn backward<T: Real>(
    input: &HeadInput<'_, T>,
    tokens: usize,
    outs: (&[T], &[T]),
    wanted: Wanted,
    mut grads: RowGrads<'_, T>,
) -> WeightGrads<T> {
    let (d, features, maps) = (input.head_dim, input.features.width(), &input.features);
    let mut weights = WeightGrads {
        map_q: vec![T::zero(); maps.q.iter().map(|w| w.len()).sum()],
        map_k: vec![T::zero(); maps.k.len()],
        log_scale: vec![T::zero(); input.q.len()],
    };
    if tokens == 0 {
        return weights;
    }
    let phi_k = map_rows(maps.map, input.k.mat(0), tokens, maps.k, maps.feature_dim);
    // The state that each block finds.
    let mut found = vec![(vec![T::zero(); features * d], vec![T::zero(); features])];
    for (block, phi_k) in phi_k.chunks(input.chunk * features).enumerate() {
        let (mut s, mut z) = found[block].clone();
        absorb((&mut s, &mut z), phi_k, input.v.mat(block * input.chunk), (features, d));
        found.push((s, z));
    }
    // What later blocks ask of the state.
    let mut d_s = vec![T::zero(); features * d];
    let mut d_z = vec![T::zero(); features];
    for (n, phi_k) in phi_k.chunks(input.chunk * features).enumerate().rev() {
        let (s, z) = &found[n];
        let block = Block { start: n * input.chunk, tokens, phi_k, s, z };
        T::vectorize(
            #[inline(always)]
            || block.backward(input, outs, wanted, (&mut d_s, &mut d_z), &mut grads, &mut weights),
        );
    }
    weights
}

/// A block of tokens and the state that it finds.
struct Block<'a, T> {
    start: usize,
    /// Of the whole sequence.
    tokens: usize,
    /// `[length, 2F]`
    phi_k: &'a [T],
    s: &'a [T],
    z: &'a [T],
}

impl<T: Real> Block<'_, T> {
    /// Adds to `grads` and `weights`, and to `(d_s, d_z)` what this block's queries ask of the state it finds.
    #[inline(always)]
    fn backward(
        &self,
        input: &HeadInput<'_, T>,
        outs: (&[T], &[T]),
        wanted: Wanted,
        (d_s, d_z): (&mut [T], &mut [T]),
        grads: &mut RowGrads<'_, T>,
        weights: &mut WeightGrads<T>,
    ) {
        let Self { start, phi_k, z, .. } = *self;
        let (d, features, maps) = (input.head_dim, z.len(), &input.features);
        let length = phi_k.len() / features;
        let v = input.v.mat(start);
        let keys = Mat::rows(phi_k, features);

        // Through the state that the block leaves: d_φk = S_d v + z_d, d_v = S_dᵀ φk.
        let mut d_phi_k = d_z.repeat(length);
        matmul((length, features, d), &mut d_phi_k, features, true, v, Mat::rows(d_s, d).t());
        let mut d_v = vec![T::nan(); length * d];
        matmul((length, d, features), &mut d_v, d, false, keys, Mat::rows(d_s, d));

        let state = (&mut *d_s, &mut *d_z);
        let keys_and_values = (d_phi_k.as_mut_slice(), d_v.as_mut_slice());
        self.query_heads(input, outs, wanted, state, keys_and_values, grads, weights);

        let mut d_k = vec![T::zero(); if wanted.qkv { length * d } else { 0 }];
        let d_x = wanted.qkv.then_some(d_k.as_mut_slice());
        let k = input.k.mat(start);
        let (map, dim) = (maps.map, maps.feature_dim);
        map_rows_backward(map, k, maps.k, dim, phi_k, &d_phi_k, d_x, &mut weights.map_k);
        for (i, (d_k, d_v)) in d_k.chunks_exact(d).zip(d_v.chunks_exact(d)).enumerate() {
            let row = (start + i) * d..(start + i + 1) * d;
            add(&mut grads.k[row.clone()], d_k);
            add(&mut grads.v[row], d_v);
        }
    }

    /// The block's queries: what they ask of the state, of the block's own features of keys and values, and of themselves.
    #[inline(always)]
    fn query_heads(
        &self,
        input: &HeadInput<'_, T>,
        (out, d_out): (&[T], &[T]),
        wanted: Wanted,
        (d_s, d_z): (&mut [T], &mut [T]),
        (d_phi_k, d_v): (&mut [T], &mut [T]),
        grads: &mut RowGrads<'_, T>,
        weights: &mut WeightGrads<T>,
    ) {
        let Self { start, tokens, phi_k, s, z } = *self;
        let (d, features, maps) = (input.head_dim, z.len(), &input.features);
        let (length, size) = (phi_k.len() / features, maps.feature_dim * d);
        let (v, keys) = (input.v.mat(start), Mat::rows(phi_k, features));
        for head in 0..input.q.len() {
            let q = input.q[head].mat(start);
            let phi = map_rows(maps.map, q, length, maps.q[head], maps.feature_dim);
            let mut products = vec![T::nan(); length * length];
            let mut denominator = vec![T::nan(); length];
            block_weights(&phi, phi_k, z, &mut products, &mut denominator);

            // o = num / den: d_num = d_o / den, d_den = −(d_o · o) / den, 0 where den is bounded.
            let span = (head * tokens + start) * d..(head * tokens + start + length) * d;
            let mut d_num = d_out[span.clone()].to_vec();
            let mut d_den = vec![T::zero(); length];
            for (i, (d_num, out)) in
                d_num.chunks_exact_mut(d).zip(out[span].chunks_exact(d)).enumerate()
            {
                let inverse = at_least(denominator[i]).recip();
                d_num.iter_mut().for_each(|x| *x *= inverse);
                if denominator[i] >= T::of(MIN_DENOMINATOR) {
                    d_den[i] = -vector::dot(d_num, out);
                }
            }

            // d_(φqᵀφk) = d_num · v + d_den, where the key is not in the future.
            let d_num_mat = Mat::rows(&d_num, d);
            let mut d_products = vec![T::nan(); length * length];
            matmul((length, length, d), &mut d_products, length, false, d_num_mat, v.t());
            for (i, row) in d_products.chunks_exact_mut(length).enumerate() {
                row[..=i].iter_mut().for_each(|x| *x += d_den[i]);
                row[i + 1..].fill(T::zero());
            }
            let d_products = Mat::rows(&d_products, length);
            let queries = Mat::rows(&phi, features);
            let mut d_phi: Vec<T> =
                d_den.iter().flat_map(|&w| z.iter().map(move |&z| w * z)).collect();
            matmul(
                (length, features, d),
                &mut d_phi,
                features,
                true,
                d_num_mat,
                Mat::rows(s, d).t(),
            );
            matmul((length, features, length), &mut d_phi, features, true, d_products, keys);
            matmul((length, features, length), d_phi_k, features, true, d_products.t(), queries);
            let products = Mat::rows(&products, length);
            matmul((length, d, length), d_v, d, true, products.t(), d_num_mat);
            matmul((features, d, length), d_s, d, true, queries.t(), d_num_mat);
            for (phi, &d_den) in phi.chunks_exact(features).zip(&d_den) {
                vector::axpy(d_z, d_den, phi);
            }

            let mut d_q = vec![T::zero(); if wanted.qkv { length * d } else { 0 }];
            let d_x = wanted.qkv.then_some(d_q.as_mut_slice());
            let d_w = &mut weights.map_q[head * size..(head + 1) * size];
            map_rows_backward(maps.map, q, maps.q[head], maps.feature_dim, &phi, &d_phi, d_x, d_w);
            for (i, d_q) in d_q.chunks_exact(d).enumerate() {
                let at = (head * tokens + start + i) * d;
                add(&mut grads.q[at..at + d], d_q);
            }
        }
    }
}
