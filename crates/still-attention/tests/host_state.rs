//! A state that is saved and restored, or that goes back to fewer tokens, continues as if nothing had happened.

mod common;

use candle_core::Tensor;
use common::{flat, random_input, relative_rms, some_exponents, tensors};
use still_attention::{
    AttentionRows, AttentionState, HeadGeometry, HybridState, KvCache, PreparedWeights, Router,
    RowDtype, SavedState, SlidingKvCache, StillConfig,
};

const GEOMETRY: HeadGeometry = HeadGeometry { num_heads: 4, num_key_value_heads: 2, head_dim: 8 };
const CHUNK: usize = 4;
const TOKENS: usize = 23;

/// A way to make an empty state, and the rows of a sequence for it.
struct Case {
    name: String,
    empty: Box<dyn Fn() -> Box<dyn AttentionState>>,
    rows: [Tensor; 3],
}

fn hybrid(rows: RowDtype, change: impl Fn(&mut StillConfig), name: &str) -> Case {
    let mut still = StillConfig::uniform(1, GEOMETRY, CHUNK, 1);
    change(&mut still);
    let config = still.layer(0).unwrap();
    let x = tensors(&random_input(GEOMETRY, &config, TOKENS, 3), &config, |x| x as f32);
    let weights = PreparedWeights::new(GEOMETRY, &config, &x.weights).unwrap();
    Case {
        name: format!("{name}, {rows:?}"),
        empty: Box::new(move || Box::new(HybridState::new(weights.clone(), 1, rows))),
        rows: [x.q, x.k, x.v],
    }
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for rows in RowDtype::ALL {
        cases.push(hybrid(rows, |_| {}, "hybrid"));
        cases.push(hybrid(rows, |still| still.cap = Some(2), "hybrid with a cap"));
        let scale = |still: &mut StillConfig| still.key_exponents = vec![some_exponents(GEOMETRY)];
        cases.push(hybrid(rows, scale, "hybrid with scaled keys"));
        let Case { rows: x, .. } = hybrid(rows, |_| {}, "");
        for window in [1, 5, 16] {
            cases.push(Case {
                name: format!("a window of {window}, {rows:?}"),
                empty: Box::new(move || {
                    Box::new(SlidingKvCache::new(GEOMETRY, window, 1, rows).unwrap())
                }),
                rows: x.clone(),
            });
        }
        cases.push(Case {
            name: format!("dense, {rows:?}"),
            empty: Box::new(move || Box::new(KvCache::new(GEOMETRY, 1, rows))),
            rows: x,
        });
    }
    cases
}

impl Case {
    /// Feeds tokens in pieces of `piece`.
    fn feed(
        &self,
        state: &mut dyn AttentionState,
        tokens: std::ops::Range<usize>,
        piece: usize,
    ) -> Vec<f64> {
        let parts = tokens.clone().step_by(piece).map(|start| {
            let length = piece.min(tokens.end - start);
            let [q, k, v] = self.rows.each_ref().map(|x| x.narrow(2, start, length).unwrap());
            state.advance(AttentionRows { q: &q, k: &k, v: &v, gate: None }, None).unwrap()
        });
        flat(&Tensor::cat(&parts.collect::<Vec<_>>(), 2).unwrap())
    }

    fn restored(&self, saved: SavedState) -> Box<dyn AttentionState> {
        let mut state = (self.empty)();
        state.restore(saved).unwrap();
        state
    }
}

#[test]
fn a_restored_state_is_the_state() {
    for case in cases() {
        for at in [0, 1, CHUNK, 2 * CHUNK, 13, 22] {
            for piece in [1, TOKENS] {
                let mut state = (case.empty)();
                if at > 0 {
                    case.feed(&mut *state, 0..at, piece);
                }
                let saved = state.save().unwrap();
                let mut back = case.restored(saved.clone());
                assert_eq!(back.position(0), at);
                let again = back.save().unwrap();
                for (name, tensor) in saved.into_tensors() {
                    let other = &again.clone().into_tensors()[&name];
                    let bits = |x: &Tensor| format!("{:?} {x}", x.shape());
                    assert_eq!(bits(&tensor), bits(other), "{}: {name}", case.name);
                }
                let expected = case.feed(&mut *state, at..TOKENS, 1);
                let got = case.feed(&mut *back, at..TOKENS, 1);
                let error = relative_rms(&got, &expected);
                assert!(error < 1e-6, "{}, saved after {at} tokens: {error}", case.name);
            }
        }
    }
}

/// Sessions of format 2 have every slot of the ring, and ranks of every hybrid state.
#[test]
fn a_state_that_an_earlier_program_saved_is_read() {
    let case = hybrid(RowDtype::Bf16, |still| still.chunk = 12, "chunks of 12");
    let config = |still: &mut StillConfig| still.chunk = 12;
    let ranked = hybrid(RowDtype::Bf16, |still| (config(still), still.cap = Some(100)).1, "ranked");
    for at in [3, 17, 22] {
        let mut state = (case.empty)();
        case.feed(&mut *state, 0..at, 1);
        let mut earlier = (ranked.empty)();
        ranked.feed(&mut *earlier, 0..at, 1);
        let mut old = SavedState::default();
        for (name, tensor) in earlier.save().unwrap().into_tensors() {
            let ring = name.contains(".ring_");
            let missing = if ring { 24 - tensor.dim(0).unwrap() } else { 0 };
            old.insert(name, tensor.pad_with_zeros(0, 0, missing).unwrap());
        }
        let mut back = case.restored(old);
        assert_eq!(back.size_bytes(), state.size_bytes());
        let expected = case.feed(&mut *state, at..TOKENS, 1);
        assert_eq!(case.feed(&mut *back, at..TOKENS, 1), expected, "saved after {at} tokens");
    }
}

#[test]
fn a_state_of_another_shape_or_format_is_refused() {
    let of = |case: &Case| {
        let mut state = (case.empty)();
        case.feed(&mut *state, 0..TOKENS, 1);
        state.save().unwrap()
    };
    let (bf16, int8) =
        (hybrid(RowDtype::Bf16, |_| {}, "bf16 rows"), hybrid(RowDtype::Int8, |_| {}, "int8 rows"));
    let longer = hybrid(RowDtype::Bf16, |still| still.chunk = 8, "chunks of 8");
    for (from, to, word) in [
        (&int8, &bf16, "salient_k\" is in u8, and this state's in bf16"),
        (&longer, &bf16, "ring_k\" is [16, 8], and this state's 8 × 8"),
    ] {
        let error = (to.empty)().restore(of(from)).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
    // A tensor too few, and one too many.
    let mut tensors = of(&bf16).into_tensors();
    let taken = tensors.remove("1.z").unwrap();
    let restore = |tensors: std::collections::BTreeMap<String, Tensor>| {
        let mut saved = SavedState::default();
        tensors.into_iter().for_each(|(name, tensor)| saved.insert(name, tensor));
        (bf16.empty)().restore(saved).map_err(|error| error.to_string())
    };
    assert!(restore(tensors.clone()).unwrap_err().contains("no tensor \"1.z\""));
    tensors.insert("1.z".into(), taken.clone());
    restore(tensors.clone()).unwrap();
    tensors.insert("2.z".into(), taken);
    assert!(restore(tensors).unwrap_err().contains("\"2.z\" that this one has no place for"));
}

#[test]
fn a_state_goes_back_within_the_chunk_of_its_last_token() {
    // A sliding window has rules of its own.
    for case in cases().into_iter().filter(|case| !case.name.contains("window")) {
        let dense = case.name.starts_with("dense");
        for (position, back) in [(23, 21), (23, 22), (12, 10), (3, 1), (9, 9), (23, 0), (2, 0)] {
            for piece in [1, TOKENS] {
                let mut state = (case.empty)();
                case.feed(&mut *state, 0..position, piece);
                state.truncate(0, back).unwrap();
                assert_eq!(state.position(0), back);
                let mut fresh = (case.empty)();
                if back > 0 {
                    case.feed(&mut *fresh, 0..back, piece);
                }
                let got = case.feed(&mut *state, back..TOKENS, 1);
                let expected = case.feed(&mut *fresh, back..TOKENS, 1);
                let error = relative_rms(&got, &expected);
                assert!(error < 1e-6, "{}, {position} to {back}: {error}", case.name);
            }
        }
        let mut state = (case.empty)();
        case.feed(&mut *state, 0..TOKENS, 1);
        let error = state.truncate(0, TOKENS + 1).unwrap_err().to_string();
        assert!(error.contains("it has 23"), "{error}");
        // Chunk 5 is 20, 21 and 22: its first token's arrival retired chunk 3.
        match state.truncate(0, 20) {
            Ok(()) => assert!(dense),
            Err(error) => {
                assert!(!dense && error.to_string().contains("it can go back to 21, or to 0"));
            }
        }
        assert_eq!(state.position(0), if dense { 20 } else { TOKENS });
    }
}

#[test]
fn a_sliding_window_goes_back_until_rows_have_left_it() {
    for case in cases().into_iter().filter(|case| case.name.contains("a window of 5")) {
        for (position, back) in [(5, 2), (5, 5), (4, 0), (23, 23), (23, 0)] {
            let mut state = (case.empty)();
            case.feed(&mut *state, 0..position, 3);
            state.truncate(0, back).unwrap();
            assert_eq!(state.position(0), back);
            let mut fresh = (case.empty)();
            if back > 0 {
                case.feed(&mut *fresh, 0..back, 3);
            }
            if back < TOKENS {
                let got = case.feed(&mut *state, back..TOKENS, 1);
                let expected = case.feed(&mut *fresh, back..TOKENS, 1);
                let error = relative_rms(&got, &expected);
                assert!(error < 1e-6, "{}, {position} to {back}: {error}", case.name);
            }
        }
        let mut state = (case.empty)();
        case.feed(&mut *state, 0..6, 1);
        for (tokens, why) in [(5, "kept the last 5 alone"), (7, "it has 6")] {
            let error = state.truncate(0, tokens).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
        assert_eq!(state.position(0), 6);
    }
}

#[test]
fn what_later_tokens_changed_does_not_come_back() {
    let summed = |still: &mut StillConfig| still.router = Router::ReceivedAttention;
    let case = hybrid(RowDtype::F32, summed, "received attention");
    let mut state = (case.empty)();
    case.feed(&mut *state, 0..TOKENS, 1);
    let error = state.truncate(0, TOKENS - 1).unwrap_err().to_string();
    assert!(error.contains("have changed what it remembers"), "{error}");
    state.truncate(0, 0).unwrap();
    assert_eq!(state.position(0), 0);
}
