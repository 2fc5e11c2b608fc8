//! The salient keys of a single token, in pieces that threads share: a head that keeps all tokens has as many as all others of a
//! model together.
//!
//! A piece is a softmax over some of the keys: the sum of their values, its denominator and its maximum, by query head. Pieces are
//! of one size whatever the threads, so that their number changes no result.

use super::call::Scratch;
use super::cells::round_to_bf16;
use super::head_state::HeadState;
use super::panels::Softmax;
use super::query_rows::{Buffers, attend_salient, take};
use super::visible_keys::Part;
use still_compute::Real;

/// Rows of a piece.
const ROWS: usize = 1024;

/// Pieces of a head's salient keys for the next token: none of a few keys, and none where the token makes a chunk retire, which
/// changes what is salient.
pub(crate) fn pieces<T: Real>(state: &HeadState<T>, chunk: usize) -> usize {
    let rows = state.salient_k.len();
    if rows < 2 * ROWS || state.position.is_multiple_of(chunk) { 0 } else { rows.div_ceil(ROWS) }
}

/// Attends to a piece with the queries `q` `[query heads, D]`, which are multiplied by `scale` first: `to` is
/// `[query heads, D + 2]`.
pub(crate) fn attend_piece<T: Real>(
    state: &HeadState<T>,
    piece: usize,
    (q, scale): (&[T], T),
    scratch: &mut Scratch<T>,
    to: &mut [T],
) {
    let (k, v) = (&state.salient_k, &state.salient_v);
    let rows = piece * ROWS..k.len().min((piece + 1) * ROWS);
    assert!(!rows.is_empty(), "no piece {piece} of {} keys", k.len());
    let (d, rounded, heads) = (k.width(), k.is_bf16(), q.len() / k.width());
    scratch.buffers.resize_with(scratch.buffers.len().max(1), Buffers::default);
    let Buffers { q: scaled, exact, attended, denominator, maximum, .. } = &mut scratch.buffers[0];
    T::vectorize(
        #[inline(always)]
        || {
            let scaled = take(scaled, q.len());
            for (to, &x) in scaled.iter_mut().zip(q) {
                *to = if rounded { round_to_bf16(x * scale) } else { x * scale };
            }
            let mut sums = Softmax {
                attended: take(attended, q.len()),
                denominator: take(denominator, heads),
                maximum: take(maximum, heads),
            };
            sums.attended.fill(T::zero());
            sums.denominator.fill(T::zero());
            sums.maximum.fill(T::neg_infinity());
            attend_salient(&Part::Stored { k, v, rows }, scaled, d, &mut sums, exact);
            for (head, to) in to.chunks_exact_mut(d + 2).enumerate() {
                to[..d].copy_from_slice(&sums.attended[head * d..(head + 1) * d]);
                (to[d], to[d + 1]) = (sums.denominator[head], sums.maximum[head]);
            }
        },
    );
}

/// Adds pieces, `[pieces, query heads, D + 2]`, to the softmax of a token's queries.
#[inline(always)]
pub(super) fn add_pieces<T: Real>(pieces: &[T], d: usize, sums: &mut Softmax<'_, T>) {
    let Softmax { attended, denominator, maximum } = sums;
    for piece in pieces.chunks_exact(denominator.len() * (d + 2)) {
        for (head, piece) in piece.chunks_exact(d + 2).enumerate() {
            let top = if piece[d + 1] > maximum[head] || piece[d + 1].is_nan() {
                piece[d + 1]
            } else {
                maximum[head]
            };
            let (shrink, share) =
                ((maximum[head] - top).fast_exp(), (piece[d + 1] - top).fast_exp());
            denominator[head] = denominator[head] * shrink + piece[d] * share;
            maximum[head] = top;
            let attended = &mut attended[head * d..(head + 1) * d];
            for (sum, &x) in attended.iter_mut().zip(&piece[..d]) {
                *sum = *sum * shrink + x * share;
            }
        }
    }
}
