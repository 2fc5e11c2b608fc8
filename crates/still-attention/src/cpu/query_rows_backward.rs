//! Gradients of the queries of one chunk, of what they attend to, and of the maps and scales of their heads.

use std::ops::Range;

use super::feature_map::{map_into, map_rows_backward};
use super::gradients::Wanted;
use super::head_input::HeadInput;
use super::query_rows::take;
use super::row_weights::RowWeights;
use still_compute::Real;
use still_compute::matmul::{Mat, matmul};
use still_compute::vector;

/// The salient rows seen by one chunk's queries.
#[derive(Debug)]
pub(crate) struct Salient<T> {
    pub positions: Vec<usize>,
    pub k: Vec<T>,
    pub v: Vec<T>,
}

/// The linear state seen by one chunk's queries.
#[derive(Debug)]
pub(crate) struct Linear<T> {
    pub s: Vec<T>,
    pub z: Vec<T>,
    pub count: usize,
}

/// Which tokens one chunk's queries are, and where their window starts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ChunkRows {
    pub start: usize,
    pub length: usize,
    pub local_start: usize,
}

impl ChunkRows {
    /// Query head and token of a row, with one head after the other.
    fn place(self, heads: &Range<usize>, row: usize) -> (usize, usize) {
        (heads.start + row / self.length, self.start + row % self.length)
    }

    /// Keys of the window.
    fn width(self) -> usize {
        self.start + self.length - self.local_start
    }
}

/// Query heads whose rows share each matrix product, with the memory that their chunks are worked in.
#[derive(Debug)]
pub(crate) struct Stack<T> {
    heads: Range<usize>,
    /// Gradients summed over chunks: `[heads, D, F]` and by head.
    pub d_map_q: Vec<T>,
    pub d_log_scale: Vec<T>,
    /// Gradients of the last chunk: window rows, salient rows, the linear state.
    pub d_k_local: Vec<T>,
    pub d_v_local: Vec<T>,
    pub d_k_salient: Vec<T>,
    pub d_v_salient: Vec<T>,
    pub d_s: Vec<T>,
    pub d_z: Vec<T>,
    buffers: Buffers<T>,
}

/// Every buffer is written before it is read, so that what a chunk left may stay.
#[derive(Debug)]
struct Buffers<T> {
    /// Scaled queries, then the gradient of the unscaled ones.
    q: Vec<T>,
    d_q: Vec<T>,
    local: Vec<T>,
    exact: Vec<T>,
    d_local: Vec<T>,
    d_exact: Vec<T>,
    denominator: Vec<T>,
    normaliser: Vec<T>,
    d_den: Vec<T>,
    d_num: Vec<T>,
    phi: Vec<T>,
    d_phi: Vec<T>,
    value: Vec<T>,
}

impl<T: Real> Stack<T> {
    /// Of the query heads `heads` of the selection head that `input` is of.
    pub fn new(heads: Range<usize>, input: &HeadInput<'_, T>) -> Self {
        let maps = heads.clone().map(|head| input.features.q.get(head).map_or(0, |w| w.len()));
        let new = Vec::new;
        Self {
            d_map_q: vec![T::zero(); maps.sum()],
            d_log_scale: vec![T::zero(); heads.len()],
            heads,
            d_k_local: new(),
            d_v_local: new(),
            d_k_salient: new(),
            d_v_salient: new(),
            d_s: new(),
            d_z: new(),
            buffers: Buffers {
                q: new(),
                d_q: new(),
                local: new(),
                exact: new(),
                d_local: new(),
                d_exact: new(),
                denominator: new(),
                normaliser: new(),
                d_den: new(),
                d_num: new(),
                phi: new(),
                d_phi: new(),
                value: new(),
            },
        }
    }

    /// One chunk: its rows of `to_q` and `to_gate`, `[heads, N, D]` or empty if there are none, and this stack's public fields.
    ///
    /// `outs`: the output and its gradient, `[query heads, N, D]`. For callers that are within [`vector::vectorize`].
    #[inline(always)]
    pub fn chunk(
        &mut self,
        input: &HeadInput<'_, T>,
        chunk: ChunkRows,
        salient: &Salient<T>,
        linear: Option<&Linear<T>>,
        (out, d_out): (&[T], &[T]),
        wanted: Wanted,
        (to_q, to_gate): (&mut [T], &mut [T]),
    ) {
        let d = input.head_dim;
        let tokens = out.len() / (input.q.len() * d);
        self.weigh_exact(input, chunk, salient);
        if let Some(linear) = linear {
            self.weigh_linear(input, chunk, linear);
        }
        self.divide(input, chunk, tokens, (out, d_out));
        let rows = self.rows(chunk);
        take(&mut self.buffers.d_q, rows * d).fill(T::zero());
        if let Some(linear) = linear {
            self.linear_gradients(input, chunk, tokens, linear, to_gate);
            self.map_gradients(input, chunk, wanted);
        }
        if wanted.qkv {
            self.exact_gradients(input, chunk, salient);
            self.query_gradients(input, chunk, tokens, salient, to_q);
        }
    }

    /// Query rows of a chunk, one head after the other.
    fn rows(&self, chunk: ChunkRows) -> usize {
        self.heads.len() * chunk.length
    }

    /// Recomputes the exact weights `e^{s − m}` and their sums.
    #[inline(always)]
    fn weigh_exact(&mut self, input: &HeadInput<'_, T>, chunk: ChunkRows, salient: &Salient<T>) {
        let (rows, heads, buffers) = (self.rows(chunk), &self.heads, &mut self.buffers);
        let ChunkRows { start, length, local_start } = chunk;
        let d = input.head_dim;
        let scale = input.logit_scale;
        let q = take(&mut buffers.q, rows * d);
        for (row, q) in q.chunks_exact_mut(d).enumerate() {
            let (head, token) = chunk.place(heads, row);
            for (q, &x) in q.iter_mut().zip(input.q[head].row(token)) {
                *q = x * scale;
            }
        }
        let q = Mat::rows(q, d);
        let (width, kept) = (chunk.width(), salient.positions.len());
        let local = take(&mut buffers.local, rows * width);
        matmul((rows, width, d), local, width, false, q, input.k.mat(local_start).t());
        let exact = take(&mut buffers.exact, rows * kept);
        matmul((rows, kept, d), exact, kept, false, q, Mat::rows(&salient.k, d).t());
        let denominator = take(&mut buffers.denominator, rows);
        for row in 0..rows {
            let visible = start - local_start + row % length + 1;
            let (visible, future) = local[row * width..(row + 1) * width].split_at_mut(visible);
            future.fill(T::zero());
            let exact = &mut exact[row * kept..(row + 1) * kept];
            denominator[row] = RowWeights::new(visible, exact, input, &mut []).denominator;
        }
    }

    /// Adds the linear branch's share to the denominator, and recomputes its numerator for the gate and λ.
    #[inline(always)]
    fn weigh_linear(&mut self, input: &HeadInput<'_, T>, chunk: ChunkRows, linear: &Linear<T>) {
        let (rows, heads, buffers) = (self.rows(chunk), &self.heads, &mut self.buffers);
        let (d, features, maps) = (input.head_dim, input.features.width(), &input.features);
        let phi = take(&mut buffers.phi, rows * features);
        for (head, phi) in heads.clone().zip(phi.chunks_exact_mut(chunk.length * features)) {
            let q = input.q[head].mat(chunk.start);
            map_into(maps.map, q, maps.q[head], maps.feature_dim, phi);
        }
        let value = take(&mut buffers.value, rows * d);
        let state = Mat::rows(&linear.s, d);
        matmul((rows, d, features), value, d, false, Mat::rows(phi, features), state);
        let normaliser = take(&mut buffers.normaliser, rows);
        for row in 0..rows {
            let scale = input.linear_scale(chunk.place(heads, row).0, linear.count);
            normaliser[row] = vector::dot(&phi[row * features..(row + 1) * features], &linear.z);
            buffers.denominator[row] += scale * normaliser[row];
        }
    }

    /// `o = num / den`: `d_num = d_o / den`, `d_den = −(d_o · o) / den`.
    #[inline(always)]
    fn divide(
        &mut self,
        input: &HeadInput<'_, T>,
        chunk: ChunkRows,
        tokens: usize,
        (out, d_out): (&[T], &[T]),
    ) {
        let (rows, heads, buffers) = (self.rows(chunk), &self.heads, &mut self.buffers);
        let d = input.head_dim;
        let d_num = take(&mut buffers.d_num, rows * d);
        let d_den = take(&mut buffers.d_den, rows);
        for (row, d_num) in d_num.chunks_exact_mut(d).enumerate() {
            let (head, token) = chunk.place(heads, row);
            let at = (head * tokens + token) * d;
            let (out, d_out) = (&out[at..at + d], &d_out[at..at + d]);
            let inverse = T::one() / buffers.denominator[row];
            d_den[row] = -vector::dot(d_out, out) * inverse;
            for (d_num, &d_out) in d_num.iter_mut().zip(d_out) {
                *d_num = d_out * inverse;
            }
        }
    }

    /// Of the gate, of λ, of the features of the queries (in `d_phi`) and of the state:
    /// `d_φ_q = S d_value + λ d_den z`, `d_S = φ_qᵀ d_value`, `d_z = Σ λ d_den φ_q`, `d_value = λ γ ⊙ d_num`.
    #[inline(always)]
    fn linear_gradients(
        &mut self,
        input: &HeadInput<'_, T>,
        chunk: ChunkRows,
        tokens: usize,
        linear: &Linear<T>,
        to_gate: &mut [T],
    ) {
        let (rows, heads, buffers) = (self.rows(chunk), &self.heads, &mut self.buffers);
        let (d, features, first) = (input.head_dim, input.features.width(), heads.start);
        let (value, d_den) = (&mut buffers.value, &buffers.d_den);
        // d_value takes the place of `value` once γ and λ have had their gradients.
        for row in 0..rows {
            let (head, token) = chunk.place(heads, row);
            let scale = input.linear_scale(head, linear.count);
            let span = row * d..(row + 1) * d;
            let (value, d_num) = (&mut value[span.clone()], &buffers.d_num[span]);
            let mut d_scale = d_den[row] * buffers.normaliser[row];
            match &input.gate {
                Some(gate) => {
                    let gate = gate[head].row(token);
                    let at = ((head - first) * tokens + token) * d;
                    let d_gate = &mut to_gate[at..at + d];
                    for c in 0..d {
                        d_gate[c] = scale * value[c] * d_num[c];
                        d_scale += gate[c] * value[c] * d_num[c];
                        value[c] = scale * gate[c] * d_num[c];
                    }
                }
                None => {
                    d_scale += vector::dot(value, d_num);
                    for (value, &d_num) in value.iter_mut().zip(d_num) {
                        *value = scale * d_num;
                    }
                }
            }
            if input.learns_scale() {
                self.d_log_scale[head - first] += d_scale * scale;
            }
        }
        let (phi, d_value) = (&buffers.phi, Mat::rows(value, d));
        let d_phi = take(&mut buffers.d_phi, rows * features);
        let state = Mat::rows(&linear.s, d);
        matmul((rows, features, d), d_phi, features, false, d_value, state.t());
        let d_s = take(&mut self.d_s, features * d);
        matmul((features, d, rows), d_s, d, false, Mat::rows(phi, features).t(), d_value);
        let d_z = take(&mut self.d_z, features);
        d_z.fill(T::zero());
        for row in 0..rows {
            let weight = input.linear_scale(chunk.place(heads, row).0, linear.count) * d_den[row];
            let span = row * features..(row + 1) * features;
            vector::axpy(&mut d_phi[span.clone()], weight, &linear.z);
            vector::axpy(d_z, weight, &phi[span]);
        }
    }

    /// Of the maps' matrices, and of the queries through their features.
    #[inline(always)]
    fn map_gradients(&mut self, input: &HeadInput<'_, T>, chunk: ChunkRows, wanted: Wanted) {
        let (buffers, maps, length) = (&mut self.buffers, &input.features, chunk.length);
        let d = input.head_dim;
        let (part, size) = (length * maps.width(), maps.feature_dim * d);
        for (i, head) in self.heads.clone().enumerate() {
            let span = i * part..(i + 1) * part;
            let d_q = &mut buffers.d_q[i * length * d..(i + 1) * length * d];
            map_rows_backward(
                maps.map,
                input.q[head].mat(chunk.start),
                maps.q[head],
                maps.feature_dim,
                &buffers.phi[span.clone()],
                &buffers.d_phi[span],
                wanted.qkv.then_some(d_q),
                &mut self.d_map_q[i * size..(i + 1) * size],
            );
        }
    }

    /// Of the exact values, and of the logits: `d_s = e ⊙ (d_num · v + d_den)`, then `−Σ d_s` at the arg-max key (`m`'s own
    /// gradient).
    #[inline(always)]
    fn exact_gradients(
        &mut self,
        input: &HeadInput<'_, T>,
        chunk: ChunkRows,
        salient: &Salient<T>,
    ) {
        let (rows, buffers) = (self.rows(chunk), &mut self.buffers);
        let (d, width, kept) = (input.head_dim, chunk.width(), salient.positions.len());
        let (local, exact) = (&buffers.local, &buffers.exact);
        let d_num = Mat::rows(&buffers.d_num, d);
        let d_v = take(&mut self.d_v_local, width * d);
        matmul((width, d, rows), d_v, d, false, Mat::rows(local, width).t(), d_num);
        let d_v = take(&mut self.d_v_salient, kept * d);
        matmul((kept, d, rows), d_v, d, false, Mat::rows(exact, kept).t(), d_num);

        let v = input.v.mat(chunk.local_start);
        let d_local = take(&mut buffers.d_local, rows * width);
        matmul((rows, width, d), d_local, width, false, d_num, v.t());
        let d_exact = take(&mut buffers.d_exact, rows * kept);
        matmul((rows, kept, d), d_exact, kept, false, d_num, Mat::rows(&salient.v, d).t());
        for row in 0..rows {
            let (span, wide) = (row * width..(row + 1) * width, row * kept..(row + 1) * kept);
            let (e, de) = (&local[span.clone()], &mut d_local[span]);
            let (x, dx) = (&exact[wide.clone()], &mut d_exact[wide]);
            let d_den = buffers.d_den[row];
            let total = logit_gradients(e, de, d_den) + logit_gradients(x, dx, d_den);
            // e^{s − m} is exactly 1 at the arg-max (nowhere, if the logits were not finite).
            let arg_max = |weights: &[T]| weights.iter().position(|&w| w >= T::one());
            if let Some(at) = arg_max(e) {
                de[at] -= total;
            } else if let Some(at) = arg_max(x) {
                dx[at] -= total;
            }
        }
    }

    /// Of the keys and the queries. The logits are those of scaled queries: `d_k` comes out right, `d_q` wants the scale again.
    #[inline(always)]
    fn query_gradients(
        &mut self,
        input: &HeadInput<'_, T>,
        chunk: ChunkRows,
        tokens: usize,
        salient: &Salient<T>,
        to_q: &mut [T],
    ) {
        let (rows, heads, buffers) = (self.rows(chunk), &self.heads, &mut self.buffers);
        let (d, width, kept) = (input.head_dim, chunk.width(), salient.positions.len());
        let q = Mat::rows(&buffers.q, d);
        let d_local = Mat::rows(&buffers.d_local, width);
        let d_exact = Mat::rows(&buffers.d_exact, kept);
        let d_k = take(&mut self.d_k_local, width * d);
        matmul((width, d, rows), d_k, d, false, d_local.t(), q);
        let d_k = take(&mut self.d_k_salient, kept * d);
        matmul((kept, d, rows), d_k, d, false, d_exact.t(), q);
        let exact_q = take(&mut buffers.value, rows * d);
        matmul((rows, d, width), exact_q, d, false, d_local, input.k.mat(chunk.local_start));
        matmul((rows, d, kept), exact_q, d, true, d_exact, Mat::rows(&salient.k, d));
        let scale = input.logit_scale;
        let (exact_q, d_q) = (exact_q.chunks_exact(d), buffers.d_q.chunks_exact(d));
        for (row, (exact, mapped)) in exact_q.zip(d_q).enumerate() {
            let (head, token) = chunk.place(heads, row);
            let at = ((head - heads.start) * tokens + token) * d;
            for ((to, &exact), &mapped) in to_q[at..at + d].iter_mut().zip(exact).zip(mapped) {
                *to = exact * scale + mapped;
            }
        }
    }
}

/// `e ⊙ (de + d_den)` in place of `de`; returns the sum.
#[inline(always)]
fn logit_gradients<T: Real>(e: &[T], de: &mut [T], d_den: T) -> T {
    for (de, &e) in de.iter_mut().zip(e) {
        *de = e * (*de + d_den);
    }
    vector::sum(de)
}
