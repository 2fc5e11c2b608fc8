//! Exact keys in panels of 16, for many f32 queries, on CPUs with AVX2 or AVX-512. Logits, weights and sums of a few queries and keys at a
//! time never leave a core's first cache, and nothing is packed.
//!
//! bf16 keys are multiplied in pairs where the CPU does so (AVX512_BF16): twice the products an instruction. Both factors of a
//! logit are bf16 already ([`super::query_rows`] rounds such queries on every CPU), so that only the order of summation differs
//! from f32 products. Weights are not rounded: their products with values stay f32.

use super::key_store::TILE;

/// Keys of panels, 16 a panel: panel `p` has keys `16p .. 16p + 16`, each line a value of every key.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Panels<'a> {
    /// bf16: line `i` has channels `2i` (low half) and `2i + 1`. Where [`pairs_multiply`].
    Pairs(&'a [[u32; TILE]]),
    /// f32: line `i` has channel `i`. Where [`singles_multiply`].
    Singles(&'a [[f32; TILE]]),
}

/// Keys whose panels and values the second cache holds: as many are widened, and met by all queries, at a time.
pub(crate) const SPAN: usize = 1024;

/// Keys in panels, and their values.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PanelKeys<'a> {
    pub k: Panels<'a>,
    /// `[n, D]`
    pub v: &'a [f32],
    pub head_dim: usize,
}

/// A softmax that keys are still added to, by query row.
#[derive(Debug)]
pub(crate) struct Softmax<'a, T> {
    /// `Σ e^{s − m} v`, `[rows, D]`
    pub attended: &'a mut [T],
    /// `Σ e^{s − m}`
    pub denominator: &'a mut [T],
    /// `m`
    pub maximum: &'a mut [T],
}

impl PanelKeys<'_> {
    pub fn len(&self) -> usize {
        self.v.len() / self.head_dim
    }

    /// Lines of all panels, and of each.
    fn lines(&self) -> (usize, usize) {
        match self.k {
            Panels::Pairs(lines) => (lines.len(), self.head_dim.div_ceil(2)),
            Panels::Singles(lines) => (lines.len(), self.head_dim),
        }
    }

    /// Adds these keys to the softmax of `q` `[rows, D]`, scaled; for pairs rounded to bf16.
    ///
    /// # Panics
    /// If sizes do not fit, or this CPU does not multiply such keys.
    pub fn attend(&self, q: &[f32], softmax: Softmax<'_, f32>, lines: &mut Vec<u32>) {
        let rows = q.len() / self.head_dim;
        assert_eq!(q.len(), rows * self.head_dim, "q is not of rows");
        assert_eq!(self.v.len(), self.len() * self.head_dim, "v is not of rows");
        let (all, of_panel) = self.lines();
        assert!(all >= self.len().div_ceil(TILE) * of_panel, "fewer keys than values");
        assert_eq!(softmax.attended.len(), q.len(), "a sum by channel of each query");
        assert!(softmax.denominator.len() == rows && softmax.maximum.len() == rows);
        kernels::attend(self, q, softmax, lines);
    }
}

pub(crate) use kernels::{pairs_multiply, singles_multiply};

#[cfg(target_arch = "x86_64")]
#[path = "panels_avx2.rs"]
mod avx2;
#[cfg(target_arch = "x86_64")]
#[path = "panels_x86.rs"]
mod kernels;

/// No CPU of this architecture is known to have them.
#[cfg(not(target_arch = "x86_64"))]
mod kernels {
    use super::{PanelKeys, Softmax};

    pub fn pairs_multiply() -> bool {
        false
    }

    pub fn singles_multiply() -> bool {
        false
    }

    pub(super) fn attend(_: &PanelKeys<'_>, _: &[f32], _: Softmax<'_, f32>, _: &mut Vec<u32>) {
        unreachable!("keys are in panels only where they multiply");
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::config::RowDtype;
    use crate::cpu::key_store::KeyStore;

    fn values(count: usize, seed: usize) -> Vec<f32> {
        (0..count)
            .map(|i| bf16::from_f32(((i * 7919 + seed) as f32 * 0.618).sin()).to_f32())
            .collect()
    }

    /// Exactly what is meant, in f64: output, denominator and maximum of one query.
    fn twin(q: &[f32], k: &[f32], v: &[f32], before: (&[f32], f32, f32)) -> (Vec<f64>, f64, f64) {
        let d = q.len();
        let logits: Vec<f64> = k
            .chunks_exact(d)
            .map(|k| q.iter().zip(k).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum())
            .collect();
        let (attended, denominator, maximum) = before;
        let m = logits.iter().copied().fold(f64::from(maximum), f64::max);
        let shrink = (f64::from(maximum) - m).exp();
        let mut sum = f64::from(denominator) * shrink;
        let mut out: Vec<f64> = attended.iter().map(|&x| f64::from(x) * shrink).collect();
        for (logit, v) in logits.iter().zip(v.chunks_exact(d)) {
            let weight = (logit - m).exp();
            sum += weight;
            out.iter_mut().zip(v).for_each(|(out, &v)| *out += weight * f64::from(v));
        }
        (out, sum, m)
    }

    /// [`PanelKeys::attend`] of some keys.
    type Attend<'a> = dyn Fn(&[f32], Softmax<'_, f32>) + 'a;

    /// Runs `check` with a store's keys in every form of panels that this CPU multiplies, in AVX2 too where there is AVX-512.
    fn in_every_form(
        store: &KeyStore<f32>,
        (v, head_dim): (&[f32], usize),
        check: &mut dyn FnMut(&str, &Attend<'_>),
    ) {
        let (rows, mut scratch, mut pairs) = (v.len() / head_dim, vec![9.0], Vec::new());
        if !singles_multiply() {
            return;
        }
        let singles = store.panels(0..rows, &mut scratch);
        let keys = PanelKeys { k: Panels::Singles(singles), v, head_dim };
        check("singles", &|q, softmax| keys.attend(q, softmax, &mut vec![9; 5]));
        #[cfg(target_arch = "x86_64")]
        if let Some(simd) = pulp::x86::V3::try_new() {
            check("AVX2", &|q, softmax| {
                // SAFETY: `simd` proves that the CPU has the features.
                unsafe { avx2::attend(simd, singles, &keys, q, softmax) }
            });
        }
        if store.is_bf16() && pairs_multiply() {
            let k = Panels::Pairs(store.paired(0..rows, &mut pairs).unwrap());
            let keys = PanelKeys { k, v, head_dim };
            check("pairs", &|q, softmax| keys.attend(q, softmax, &mut vec![9; 5]));
        }
    }

    const DTYPES: [RowDtype; 4] = [RowDtype::F32, RowDtype::Bf16, RowDtype::F16, RowDtype::Int8];

    #[test]
    fn panels_give_the_softmax_over_all_keys() {
        for (d, rows, count) in [
            (64, 192, 512),
            (64, 30, 1100),
            (64, 24, 64),
            (64, 9, 130),
            (80, 31, 77),
            (96, 12, 65),
            (128, 25, 200),
            (5, 7, 3),
            (24, 1, 1),
            (64, 13, 0),
        ] {
            let (q, k, v) = (values(rows * d, 1), values(count * d, 2), values(count * d, 3));
            for dtype in DTYPES {
                let mut store = KeyStore::new(d, dtype);
                store.extend(&k);
                let mut k = Vec::new();
                (0..count).for_each(|row| store.append_row(row, &mut k));
                // Rows that have left the store must not count.
                store.extend(&vec![f32::NAN; 3 * d]);
                (0..3).rev().for_each(|i| store.swap_remove(count + i));
                // Maxima of the window on both sides of what is to come.
                let before: Vec<f32> = (0..rows).map(|i| i as f32 * 0.5 - 4.0).collect();
                let first = values(rows * d, 4);
                in_every_form(&store, (&v, d), &mut |form, attend| {
                    let (mut attended, mut denominator, mut maximum) =
                        (first.clone(), vec![1.5; rows], before.clone());
                    let softmax = Softmax {
                        attended: &mut attended,
                        denominator: &mut denominator,
                        maximum: &mut maximum,
                    };
                    attend(&q, softmax);
                    for row in 0..rows {
                        let case = format!("{dtype:?} {form} {d} {rows} {count}: row {row}");
                        let span = row * d..(row + 1) * d;
                        let before = (&first[span.clone()], 1.5, before[row]);
                        let (out, sum, m) = twin(&q[span.clone()], &k, &v, before);
                        let near =
                            |a: f32, b: f64| (f64::from(a) - b).abs() <= 1e-5 * sum.max(m.abs());
                        assert!(near(denominator[row], sum) && near(maximum[row], m), "{case}");
                        for (&a, &b) in attended[span].iter().zip(&out) {
                            assert!(near(a, b), "{case}, {a} for {b}");
                        }
                    }
                });
            }
        }
    }

    #[test]
    fn not_a_number_stays_so() {
        let (d, count) = (16, 70);
        let mut k = values(count * d, 5);
        k[66 * d + 3] = f32::NAN;
        let (q, v) = (values(12 * d, 6), values(count * d, 7));
        for dtype in [RowDtype::F32, RowDtype::Bf16] {
            let mut store = KeyStore::new(d, dtype);
            store.extend(&k);
            in_every_form(&store, (&v, d), &mut |form, attend| {
                let (mut attended, mut denominator, mut maximum) =
                    (vec![0.0; 12 * d], vec![1.0; 12], vec![0.0; 12]);
                let softmax = Softmax {
                    attended: &mut attended,
                    denominator: &mut denominator,
                    maximum: &mut maximum,
                };
                attend(&q, softmax);
                let all = denominator.iter().chain(&attended);
                assert!(all.copied().all(f32::is_nan), "{dtype:?} {form}");
            });
        }
    }
}
