//! Chunk-wise backward pass of one selection head; everything but the selection is recomputed.

use rayon::prelude::*;

use super::feature_map::map_rows_backward;
use super::gradients::{RowGrads, Wanted, WeightGrads, add, parts};
use super::head_input::HeadInput;
use super::linear_only_backward;
use super::query_rows_backward::{ChunkRows, Linear, Salient, Stack};
use super::rows::Rows;
use crate::config::{Mode, Router};
use still_compute::Real;
use still_compute::matmul::{Mat, matmul};

/// Gradients of [`super::forward::advance`] over a whole sequence of `tokens` tokens that started at position 0.
///
/// `absorbed_at` is the selection that the forward pass used; `outs` are the output and its gradient, `[query heads, tokens, D]`.
pub(crate) fn backward<T: Real>(
    input: &HeadInput<'_, T>,
    absorbed_at: &[u32],
    tokens: usize,
    outs: (&[T], &[T]),
    wanted: Wanted,
    mut grads: RowGrads<'_, T>,
) -> WeightGrads<T> {
    if input.mode == Mode::LinearOnly {
        return linear_only_backward::backward(input, tokens, outs, wanted, grads);
    }
    let (chunk, d) = (input.chunk, input.head_dim);
    let chunks = tokens.div_ceil(chunk);
    let features = input.features.width();
    let group = input.q.len();
    // The score has no gradient: leave it out of the recomputation.
    let input = &HeadInput { router: Router::None, ..input.clone() };
    let arrivals = arrivals(absorbed_at, chunks);
    let states = if input.branches.linear { prefix_states(input, &arrivals) } else { Vec::new() };

    let heads = if input.split_heads { 1 } else { group.max(1) };
    let mut stacks: Vec<Stack<T>> = (0..group)
        .step_by(heads)
        .map(|first| Stack::new(first..(first + heads).min(group), input))
        .collect();
    let mut d_s = vec![T::zero(); features * d];
    let mut d_z = vec![T::zero(); features];
    let mut map_k = vec![T::zero(); input.features.k.len()];
    for now in (0..chunks).rev() {
        let start = now * chunk;
        let rows = ChunkRows {
            start,
            length: chunk.min(tokens - start),
            local_start: now.saturating_sub(1) * chunk,
        };
        let salient = salient_rows(input, absorbed_at, now);
        let linear = states.get(now).and_then(Option::as_ref);

        let answer = |(stack, to): (&mut Stack<T>, (&mut [T], &mut [T]))| {
            T::vectorize(
                #[inline(always)]
                || stack.chunk(input, rows, &salient, linear, outs, wanted, to),
            );
        };
        let of_stacks = stacks.len();
        let to = parts(grads.q, of_stacks).into_iter().zip(parts(grads.gate, of_stacks));
        let work = stacks.iter_mut().zip(to);
        if input.split_heads {
            work.collect::<Vec<_>>().into_par_iter().for_each(answer);
        } else {
            work.for_each(answer);
        }

        for stack in &stacks {
            if wanted.qkv {
                add_rows(stack, rows.local_start, &salient.positions, d, &mut grads);
            }
            if linear.is_some() {
                add(&mut d_s, &stack.d_s);
                add(&mut d_z, &stack.d_z);
            }
        }

        // d_s and d_z now hold every query that sees what chunk `now` absorbed.
        if input.branches.linear && !arrivals[now].is_empty() {
            let state = (d_s.as_slice(), d_z.as_slice());
            absorbed_backward(input, &arrivals[now], state, wanted, &mut map_k, &mut grads);
        }
    }
    WeightGrads {
        map_q: stacks.iter().flat_map(|stack| stack.d_map_q.iter().copied()).collect(),
        map_k,
        log_scale: stacks.iter().flat_map(|stack| stack.d_log_scale.iter().copied()).collect(),
    }
}

/// The tokens that enter the linear state, by the chunk from which on they are in it.
fn arrivals(absorbed_at: &[u32], chunks: usize) -> Vec<Vec<usize>> {
    let mut arrivals = vec![Vec::new(); chunks];
    for (token, &at) in absorbed_at.iter().enumerate() {
        if let Some(list) = arrivals.get_mut(at as usize) {
            list.push(token);
        }
    }
    arrivals
}

/// Adds what a stack's chunk asks of the keys and values that it sees exactly.
fn add_rows<T: Real>(
    stack: &Stack<T>,
    local_start: usize,
    salient: &[usize],
    d: usize,
    to: &mut RowGrads<'_, T>,
) {
    let scatter = |to: &mut [T], token: usize, row: &[T]| {
        add(&mut to[token * d..(token + 1) * d], row);
    };
    for (i, row) in stack.d_k_local.chunks_exact(d).enumerate() {
        scatter(to.k, local_start + i, row);
    }
    for (i, row) in stack.d_v_local.chunks_exact(d).enumerate() {
        scatter(to.v, local_start + i, row);
    }
    for (&token, row) in salient.iter().zip(stack.d_k_salient.chunks_exact(d)) {
        scatter(to.k, token, row);
    }
    for (&token, row) in salient.iter().zip(stack.d_v_salient.chunks_exact(d)) {
        scatter(to.v, token, row);
    }
}

/// Gradients of `S += φ(k) vᵀ`, `z += φ(k)` for the tokens that entered the state together.
fn absorbed_backward<T: Real>(
    input: &HeadInput<'_, T>,
    tokens: &[usize],
    (d_s, d_z): (&[T], &[T]),
    wanted: Wanted,
    map_k: &mut [T],
    to: &mut RowGrads<'_, T>,
) {
    let (rows, d) = (tokens.len(), input.head_dim);
    let features = input.features.width();
    let (k, v) = (gather(input.k, tokens, d), gather(input.v, tokens, d));
    let phi = input.features.of_keys(&k, d);
    let d_s = Mat::rows(d_s, d);
    let mut d_phi: Vec<T> = (0..rows).flat_map(|_| d_z.iter().copied()).collect();
    matmul((rows, features, d), &mut d_phi, features, true, Mat::rows(&v, d), d_s.t());
    let mut d_k = vec![T::zero(); if wanted.qkv { rows * d } else { 0 }];
    let maps = &input.features;
    let d_k_rows = wanted.qkv.then_some(d_k.as_mut_slice());
    let k = Mat::rows(&k, d);
    map_rows_backward(maps.map, k, maps.k, maps.feature_dim, &phi, &d_phi, d_k_rows, map_k);
    if wanted.qkv {
        let mut d_v = vec![T::nan(); rows * d];
        matmul((rows, d, features), &mut d_v, d, false, Mat::rows(&phi, features), d_s);
        for (i, &token) in tokens.iter().enumerate() {
            let row = token * d..(token + 1) * d;
            add(&mut to.k[row.clone()], &d_k[i * d..(i + 1) * d]);
            add(&mut to.v[row], &d_v[i * d..(i + 1) * d]);
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
                let phi = input.features.of_keys(&gather(input.k, tokens, d), d);
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
