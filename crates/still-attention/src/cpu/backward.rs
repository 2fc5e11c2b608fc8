//! Chunk-wise backward pass of one selection head; everything but the selection is recomputed.

use rayon::prelude::*;

use super::forward::{Features, HeadInput};
use super::linalg::{Mat, matmul};
use super::query_rows::RowWeights;
use super::rows::Rows;
use crate::config::Router;
use crate::real::Real;
use crate::vector;

/// Which gradients are wanted beside those of the feature maps, the gate and `ℓ`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// Of q, k and v: not in attention transfer.
    pub qkv: bool,
}

/// Column offsets of the packed gradient rows of one selection head.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Packing {
    /// Values of a query-side row: `[q | φ_q | γ]`.
    pub query_width: usize,
    /// Values of a key-side row: `[k | v | φ_k of each selection head that shares the KV head]`.
    pub key_width: usize,
    /// Where this selection head's `φ_k` starts in a key-side row.
    pub phi_k: usize,
}

/// Where the gradients of one selection head go; key-side rows are added to.
pub(crate) struct HeadGrads<'a, T> {
    /// `[query heads, N, query_width]`
    pub query: &'a mut [T],
    /// `[N, key_width]`
    pub key: &'a mut [T],
    /// `∂/∂ℓ` by query head.
    pub log_lambda: &'a mut [T],
    pub packing: Packing,
}

/// The salient rows seen by one chunk's queries.
struct Salient<T> {
    positions: Vec<usize>,
    k: Vec<T>,
    v: Vec<T>,
}

/// The linear state seen by one chunk's queries.
struct Linear<T> {
    s: Vec<T>,
    z: Vec<T>,
    count: usize,
}

/// What one query head contributes in one chunk.
struct Part<T> {
    query: Vec<T>,
    k_local: Vec<T>,
    v_local: Vec<T>,
    k_salient: Vec<T>,
    v_salient: Vec<T>,
    s: Vec<T>,
    z: Vec<T>,
    log_lambda: T,
}

/// Gradients of [`super::forward::advance`] over a whole sequence of `tokens` tokens that started at position 0.
///
/// `absorbed_at` is the selection that the forward pass used; `out` and `d_out` are `[query heads, tokens, D]`.
pub(crate) fn backward<T: Real>(
    input: &HeadInput<'_, T>,
    absorbed_at: &[u32],
    tokens: usize,
    out: &[T],
    d_out: &[T],
    wanted: Wanted,
    grads: &mut HeadGrads<'_, T>,
) {
    let (chunk, d) = (input.chunk, input.head_dim);
    let chunks = tokens.div_ceil(chunk);
    let features = input.features.width();
    // The score has no gradient: leave it out of the recomputation.
    let input = &HeadInput { router: Router::None, ..input.clone() };
    let mut arrivals: Vec<Vec<usize>> = vec![Vec::new(); chunks];
    for (token, &at) in absorbed_at.iter().enumerate() {
        if let Some(list) = arrivals.get_mut(at as usize) {
            list.push(token);
        }
    }
    let states = if input.branches.linear { prefix_states(input, &arrivals) } else { Vec::new() };

    let mut d_s = vec![T::zero(); features * d];
    let mut d_z = vec![T::zero(); features];
    let Packing { query_width, key_width, phi_k } = grads.packing;
    for now in (0..chunks).rev() {
        let start = now * chunk;
        let length = chunk.min(tokens - start);
        let local_start = now.saturating_sub(1) * chunk;
        let salient = salient_rows(input, absorbed_at, now);
        let linear = states.get(now).and_then(Option::as_ref);

        let parts: Vec<Part<T>> = (0..input.q.len())
            .into_par_iter()
            .map(|head| {
                let span = (head * tokens + start) * d..(head * tokens + start + length) * d;
                let rows = ChunkRows { head, start, length, local_start };
                let (out, d_out) = (&out[span.clone()], &d_out[span]);
                vector::vectorize(
                    #[inline(always)]
                    || query_head(input, rows, &salient, linear, out, d_out, wanted, query_width),
                )
            })
            .collect();

        for (head, part) in parts.into_iter().enumerate() {
            let to = (head * tokens + start) * query_width;
            grads.query[to..to + length * query_width].copy_from_slice(&part.query);
            grads.log_lambda[head] += part.log_lambda;
            let mut scatter = |token: usize, column: usize, row: &[T]| {
                let to = token * key_width + column;
                add(&mut grads.key[to..to + d], row);
            };
            for (i, row) in part.k_local.chunks_exact(d).enumerate() {
                scatter(local_start + i, 0, row);
            }
            for (i, row) in part.v_local.chunks_exact(d).enumerate() {
                scatter(local_start + i, d, row);
            }
            for (&token, row) in salient.positions.iter().zip(part.k_salient.chunks_exact(d)) {
                scatter(token, 0, row);
            }
            for (&token, row) in salient.positions.iter().zip(part.v_salient.chunks_exact(d)) {
                scatter(token, d, row);
            }
            add(&mut d_s, &part.s);
            add(&mut d_z, &part.z);
        }

        // d_s and d_z now hold every query that sees what chunk `now` absorbed.
        if input.branches.linear && !arrivals[now].is_empty() {
            let rows = arrivals[now].len();
            let positions: Vec<u32> = arrivals[now].iter().map(|&t| t as u32).collect();
            let phi = input.features.of_keys(&positions, &[]);
            let v = gather(input.v, &arrivals[now], d);
            let mut d_phi = vec![T::nan(); rows * features];
            let d_s_mat = Mat::rows(&d_s, d);
            matmul((rows, features, d), &mut d_phi, features, false, Mat::rows(&v, d), d_s_mat.t());
            let mut d_v = vec![T::nan(); rows * d];
            matmul((rows, d, features), &mut d_v, d, false, Mat::rows(&phi, features), d_s_mat);
            for (i, &token) in arrivals[now].iter().enumerate() {
                let row = &mut grads.key[token * key_width..(token + 1) * key_width];
                if wanted.qkv {
                    add(&mut row[d..2 * d], &d_v[i * d..(i + 1) * d]);
                }
                let row = &mut row[phi_k..phi_k + features];
                add(row, &d_phi[i * features..(i + 1) * features]);
                add(row, &d_z);
            }
        }
    }
}

/// The linear state seen by each chunk (`None` while nothing was absorbed).
fn prefix_states<T: Real>(
    input: &HeadInput<'_, T>,
    arrivals: &[Vec<usize>],
) -> Vec<Option<Linear<T>>> {
    let (d, features) = (input.head_dim, input.features.width());
    let mut s = vec![T::zero(); features * d];
    let mut z = vec![T::zero(); features];
    let mut count = 0;
    arrivals
        .iter()
        .map(|tokens| {
            if !tokens.is_empty() {
                let positions: Vec<u32> = tokens.iter().map(|&t| t as u32).collect();
                let phi = input.features.of_keys(&positions, &[]);
                let v = gather(input.v, tokens, d);
                let phi_t = Mat::rows(&phi, features).t();
                matmul((features, d, tokens.len()), &mut s, d, true, phi_t, Mat::rows(&v, d));
                phi.chunks_exact(features).for_each(|phi| add(&mut z, phi));
                count += tokens.len();
            }
            (count > 0).then(|| Linear { s: s.clone(), z: z.clone(), count })
        })
        .collect()
}

fn salient_rows<T: Real>(input: &HeadInput<'_, T>, absorbed_at: &[u32], now: usize) -> Salient<T> {
    let retired = if input.branches.salient { now.saturating_sub(1) * input.chunk } else { 0 };
    let positions: Vec<usize> =
        (0..retired).filter(|&token| absorbed_at[token] as usize > now).collect();
    let k = gather(input.k, &positions, input.head_dim);
    let v = gather(input.v, &positions, input.head_dim);
    Salient { positions, k, v }
}

fn gather<T: Real>(rows: Rows<'_, T>, tokens: &[usize], width: usize) -> Vec<T> {
    let mut out = Vec::with_capacity(tokens.len() * width);
    tokens.iter().for_each(|&token| out.extend_from_slice(rows.row(token)));
    out
}

fn add<T: Real>(to: &mut [T], from: &[T]) {
    for (to, &from) in to.iter_mut().zip(from) {
        *to += from;
    }
}

/// Which rows one query head answers in one chunk, and where its window starts.
#[derive(Clone, Copy)]
struct ChunkRows {
    head: usize,
    start: usize,
    length: usize,
    local_start: usize,
}

#[inline(always)]
fn query_head<T: Real>(
    input: &HeadInput<'_, T>,
    rows: ChunkRows,
    salient: &Salient<T>,
    linear: Option<&Linear<T>>,
    out: &[T],
    d_out: &[T],
    wanted: Wanted,
    query_width: usize,
) -> Part<T> {
    let ChunkRows { head, start, length, local_start } = rows;
    let d = input.head_dim;
    let q = input.q[head].mat(start);
    let (k, v) = (input.k.mat(local_start), input.v.mat(local_start));
    let width = start + length - local_start;
    let kept = salient.positions.len();
    let features = input.features.width();
    let Features::Given { q: phi_rows, .. } = &input.features else {
        unreachable!("gradients are taken with given features");
    };

    // Recompute the weights e^{s − m}.
    let scale = input.logit_scale();
    let scaled_q: Vec<T> = (start..start + length)
        .flat_map(|t| input.q[head].row(t).iter().map(move |&x| x * scale))
        .collect();
    let scaled_q = Mat::rows(&scaled_q, d);
    let mut local = vec![T::nan(); length * width];
    matmul((length, width, d), &mut local, width, false, scaled_q, k.t());
    let mut exact = vec![T::nan(); length * kept];
    matmul(
        (length, kept, d),
        &mut exact,
        kept.max(1),
        false,
        scaled_q,
        Mat::rows(&salient.k, d).t(),
    );
    let mut denominator = vec![T::zero(); length];
    for i in 0..length {
        let visible = start - local_start + i + 1;
        let row = &mut local[i * width..(i + 1) * width];
        row[visible..].fill(T::zero());
        let exact = &mut exact[i * kept..(i + 1) * kept];
        denominator[i] = RowWeights::new(&mut row[..visible], exact, input).denominator;
    }

    let mut part = Part {
        query: vec![T::zero(); length * query_width],
        k_local: Vec::new(),
        v_local: Vec::new(),
        k_salient: Vec::new(),
        v_salient: Vec::new(),
        s: Vec::new(),
        z: Vec::new(),
        log_lambda: T::zero(),
    };

    // The linear branch's share of the denominator, and its numerator for the gate and λ.
    let mut value = Vec::new();
    let mut normaliser = vec![T::zero(); length];
    let linear_scale = input.linear_scale(head, linear.map_or(0, |linear| linear.count));
    if let Some(linear) = linear {
        let phi = phi_rows[head].mat(start);
        value = vec![T::nan(); length * d];
        matmul((length, d, features), &mut value, d, false, phi, Mat::rows(&linear.s, d));
        for i in 0..length {
            normaliser[i] = vector::dot(phi_rows[head].row(start + i), &linear.z);
            denominator[i] += linear_scale * normaliser[i];
        }
    }

    // o = num / den: d_num = d_o / den, d_den = −(d_o · o) / den.
    let mut d_num = d_out.to_vec();
    let mut d_den = vec![T::zero(); length];
    for i in 0..length {
        let inverse = T::one() / denominator[i];
        let span = i * d..(i + 1) * d;
        d_den[i] = -vector::dot(&d_out[span.clone()], &out[span.clone()]) * inverse;
        d_num[span].iter_mut().for_each(|x| *x *= inverse);
    }
    let d_num_mat = Mat::rows(&d_num, d);

    if let Some(linear) = linear {
        // d_value = λ γ ⊙ d_num, in place of `value` once γ and λ have had their gradients.
        for i in 0..length {
            let row = &mut part.query[i * query_width..(i + 1) * query_width];
            let value = &mut value[i * d..(i + 1) * d];
            let d_num = &d_num[i * d..(i + 1) * d];
            let mut d_scale = d_den[i] * normaliser[i];
            for c in 0..d {
                let gate = input.gate.as_ref().map_or(T::one(), |g| g[head].row(start + i)[c]);
                if input.gate.is_some() {
                    row[d + features + c] = linear_scale * value[c] * d_num[c];
                }
                d_scale += gate * value[c] * d_num[c];
                value[c] = linear_scale * gate * d_num[c];
            }
            if input.lambda.is_some() {
                part.log_lambda += d_scale * linear_scale;
            }
            // d_φ_q = S d_value + λ d_den z, the second term here.
            vector::axpy(&mut row[d..d + features], linear_scale * d_den[i], &linear.z);
        }
        let d_value = Mat::rows(&value, d);
        let s_t = Mat::rows(&linear.s, d).t();
        matmul((length, features, d), &mut part.query[d..], query_width, true, d_value, s_t);
        let phi = phi_rows[head].mat(start);
        part.s = vec![T::zero(); features * d];
        matmul((features, d, length), &mut part.s, d, false, phi.t(), d_value);
        part.z = vec![T::zero(); features];
        for i in 0..length {
            let weight = linear_scale * d_den[i];
            vector::axpy(&mut part.z, weight, phi_rows[head].row(start + i));
        }
    }
    if !wanted.qkv {
        return part;
    }

    part.v_local = vec![T::nan(); width * d];
    matmul(
        (width, d, length),
        &mut part.v_local,
        d,
        false,
        Mat::rows(&local, width).t(),
        d_num_mat,
    );
    part.v_salient = vec![T::nan(); kept * d];
    let exact_t = Mat::rows(&exact, kept).t();
    matmul((kept, d, length), &mut part.v_salient, d, false, exact_t, d_num_mat);

    // d_s = e ⊙ (d_num · v + d_den), then −Σ d_s at the arg-max key (m's own gradient).
    let mut d_local = vec![T::nan(); length * width];
    matmul((length, width, d), &mut d_local, width, false, d_num_mat, v.t());
    let mut d_exact = vec![T::nan(); length * kept];
    matmul(
        (length, kept, d),
        &mut d_exact,
        kept.max(1),
        false,
        d_num_mat,
        Mat::rows(&salient.v, d).t(),
    );
    for i in 0..length {
        let (e, de) =
            (&local[i * width..(i + 1) * width], &mut d_local[i * width..(i + 1) * width]);
        let (x, dx) = (&exact[i * kept..(i + 1) * kept], &mut d_exact[i * kept..(i + 1) * kept]);
        let mut total = T::zero();
        for (e, de) in e.iter().zip(de.iter_mut()).chain(x.iter().zip(dx.iter_mut())) {
            *de = *e * (*de + d_den[i]);
            total += *de;
        }
        // e^{s − m} is exactly 1 at the arg-max (nowhere, if the logits were not finite).
        let arg_max = |weights: &[T]| weights.iter().position(|&w| w >= T::one());
        if let Some(at) = arg_max(e) {
            de[at] -= total;
        } else if let Some(at) = arg_max(x) {
            dx[at] -= total;
        }
        de.iter_mut().chain(dx.iter_mut()).for_each(|g| *g *= scale);
    }

    let d_local_mat = Mat::rows(&d_local, width);
    matmul((length, d, width), &mut part.query, query_width, true, d_local_mat, k);
    part.k_local = vec![T::nan(); width * d];
    matmul((width, d, length), &mut part.k_local, d, false, d_local_mat.t(), q);
    let d_exact_mat = Mat::rows(&d_exact, kept);
    let salient_k = Mat::rows(&salient.k, d);
    matmul((length, d, kept), &mut part.query, query_width, true, d_exact_mat, salient_k);
    part.k_salient = vec![T::nan(); kept * d];
    matmul((kept, d, length), &mut part.k_salient, d, false, d_exact_mat.t(), q);
    part
}
