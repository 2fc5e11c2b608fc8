//! A single token may attend to the salient keys of a head in pieces before it is fed: it sees the same.

mod common;

use candle_core::{IndexOp, Tensor};
use common::{random_input, some_exponents, tensors};
use still_attention::{
    HeadGeometry, HeadRows, HeadScratch, HostState, HybridState, PreparedWeights, RowDtype,
    StillConfig,
};
use still_testing::assert_relative_rms;

const GEOMETRY: HeadGeometry = HeadGeometry { num_heads: 4, num_key_value_heads: 2, head_dim: 8 };
const CHUNK: usize = 64;
/// Rows of a piece.
const PIECE: usize = 1024;
const READ: usize = 2300;
const TOKENS: usize = READ + 70;

/// Token `t` of a head of `[1, heads, N, D]`.
fn row(x: &Tensor, heads: std::ops::Range<usize>, t: usize) -> Vec<f32> {
    let rows = x.i((0, heads, t)).unwrap();
    rows.flatten_all().unwrap().to_vec1().unwrap()
}

/// Feeds token `t` to every part, with its pieces beforehand if `in_pieces`; how many each part had.
fn step(
    state: &HybridState,
    [q, k, v]: &[Tensor; 3],
    t: usize,
    in_pieces: bool,
) -> (Vec<f32>, Vec<usize>) {
    let (mut scratch, mut out, mut counts) = (HeadScratch::default(), Vec::new(), Vec::new());
    for part in 0..state.parts() {
        let (q, k, v) = (
            row(q, 2 * part..2 * part + 2, t),
            row(k, part..part + 1, t),
            row(v, part..part + 1, t),
        );
        let pieces = state.pieces(part);
        let mut beforehand = vec![f32::NAN; if in_pieces { pieces * (q.len() + 4) } else { 0 }];
        // In any order.
        for (piece, to) in beforehand.chunks_exact_mut(q.len() + 4).enumerate().rev() {
            state.attend_piece(part, piece, &q, &mut scratch, to);
        }
        let mut one = vec![f32::NAN; q.len()];
        let rows = HeadRows { q: &q, k: &k, v: &v, gate: None, beforehand: &beforehand };
        state.decode(part, rows, &mut scratch, &mut one);
        out.extend(one);
        counts.push(pieces);
    }
    (out, counts)
}

#[test]
fn pieces_give_what_the_whole_does() {
    let mut still = StillConfig::uniform(1, GEOMETRY, CHUNK, 0);
    still.budgets = vec![vec![CHUNK, 1]];
    still.key_exponents = vec![some_exponents(GEOMETRY)];
    let config = still.layer(0).unwrap();
    let x = tensors(&random_input(GEOMETRY, &config, TOKENS, 3), &config, |x| x as f32);
    let weights = PreparedWeights::new(GEOMETRY, &config, &x.weights).unwrap();
    let rows = [x.q, x.k, x.v];
    let first = |x: &Tensor| x.narrow(2, 0, READ).unwrap().contiguous().unwrap();
    for dtype in RowDtype::ALL {
        let mut whole = HybridState::new(weights.clone(), 1, dtype);
        whole.advance(&first(&rows[0]), &first(&rows[1]), &first(&rows[2]), None, None).unwrap();
        let pieces = whole.clone();
        for t in READ..TOKENS {
            let salient = (t / CHUNK - 1) * CHUNK;
            let (expected, _) = step(&whole, &rows, t, false);
            let (got, counts) = step(&pieces, &rows, t, true);
            // A chunk retires on its first token: what is salient changes under the token's eyes.
            let of_whole_head = if t % CHUNK == 0 { 0 } else { salient.div_ceil(PIECE) };
            assert_eq!(counts, [of_whole_head, 0], "token {t}");
            assert_relative_rms(&format!("{dtype:?}, token {t}"), &got, &expected, 1e-6);
        }
        for head in 0..2 {
            assert_eq!(whole.linear(0, head), pieces.linear(0, head), "{dtype:?}");
        }
    }
}
