//! Exact keys in bf16, for many queries, on CPUs that multiply pairs of bf16 values (AVX512_BF16): twice the products an
//! instruction. Logits, weights and sums of a few queries and keys at a time never leave a core's first cache.
//!
//! Both factors of a logit are bf16 already ([`super::query_rows`] rounds such queries on every CPU), so that only the
//! order of summation differs from f32 products. Weights are not rounded: their products with values stay f32.

use super::key_store::TILE;

/// Keys with channels in pairs, and their values.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PairedKeys<'a> {
    pub unit: PairUnit,
    /// Line `i` of panel `p` has channels `2i` (low half) and `2i + 1` of keys `16p .. 16p + 16`.
    pub k: &'a [[u32; TILE]],
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

impl PairedKeys<'_> {
    /// Lines of a panel.
    pub fn lines(head_dim: usize) -> usize {
        head_dim.div_ceil(2)
    }

    pub fn len(&self) -> usize {
        self.v.len() / self.head_dim
    }

    /// Adds these keys to the softmax of `q` `[rows, D]`, scaled and rounded to bf16.
    ///
    /// # Panics
    /// If sizes do not fit.
    pub fn attend(&self, q: &[f32], softmax: Softmax<'_, f32>, pairs: &mut Vec<u32>) {
        let rows = q.len() / self.head_dim;
        assert_eq!(q.len(), rows * self.head_dim, "q is not of rows");
        assert_eq!(self.v.len(), self.len() * self.head_dim, "v is not of rows");
        let lines = self.len().div_ceil(TILE) * Self::lines(self.head_dim);
        assert!(self.k.len() >= lines, "fewer keys than values");
        assert_eq!(softmax.attended.len(), q.len(), "a sum by channel of each query");
        assert!(softmax.denominator.len() == rows && softmax.maximum.len() == rows);
        self.unit.attend(self, q, softmax, pairs);
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::PairUnit;

/// No CPU of this architecture is known to have it.
#[cfg(not(target_arch = "x86_64"))]
#[derive(Clone, Copy, Debug)]
pub(crate) enum PairUnit {}

#[cfg(not(target_arch = "x86_64"))]
impl PairUnit {
    pub fn find() -> Option<Self> {
        None
    }

    fn attend(self, _: &PairedKeys<'_>, _: &[f32], _: Softmax<'_, f32>, _: &mut Vec<u32>) {
        match self {}
    }
}

#[cfg(target_arch = "x86_64")]
#[path = "paired_keys_x86.rs"]
mod x86;

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

    #[test]
    fn pairs_give_the_softmax_over_all_keys() {
        let Some(unit) = PairUnit::find() else {
            println!("this CPU has no AVX512_BF16: nothing to compare");
            return;
        };
        for (d, rows, count) in [
            (64, 192, 512),
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
            let mut store = KeyStore::new(d, RowDtype::Bf16);
            store.extend(&k);
            // Rows that have left the store must not count.
            store.extend(&vec![f32::NAN; 3 * d]);
            (0..3).rev().for_each(|i| store.swap_remove(count + i));
            let mut scratch = Vec::new();
            let paired = store.paired(count, &mut scratch).unwrap();
            let keys = PairedKeys { unit, k: paired, v: &v, head_dim: d };
            // Maxima of the window on both sides of what is to come.
            let before: Vec<f32> = (0..rows).map(|i| i as f32 * 0.5 - 4.0).collect();
            let (mut attended, mut denominator, mut maximum) =
                (values(rows * d, 4), vec![1.5; rows], before.clone());
            let softmax = Softmax {
                attended: &mut attended,
                denominator: &mut denominator,
                maximum: &mut maximum,
            };
            keys.attend(&q, softmax, &mut vec![9; 5]);
            let first = values(rows * d, 4);
            for row in 0..rows {
                let span = row * d..(row + 1) * d;
                let (out, sum, m) =
                    twin(&q[span.clone()], &k, &v, (&first[span.clone()], 1.5, before[row]));
                let near = |a: f32, b: f64| (f64::from(a) - b).abs() <= 1e-5 * sum.max(m.abs());
                assert!(near(denominator[row], sum) && near(maximum[row], m), "{d} {rows} {count}");
                for (&a, &b) in attended[span].iter().zip(&out) {
                    assert!(near(a, b), "{d} {rows} {count}: row {row}, {a} for {b}");
                }
            }
        }
    }

    #[test]
    fn not_a_number_stays_so() {
        let Some(unit) = PairUnit::find() else {
            println!("this CPU has no AVX512_BF16: nothing to check");
            return;
        };
        let (d, count) = (16, 70);
        let mut k = values(count * d, 5);
        k[66 * d + 3] = f32::NAN;
        let (q, v) = (values(12 * d, 6), values(count * d, 7));
        let mut store = KeyStore::new(d, RowDtype::Bf16);
        store.extend(&k);
        let mut scratch = Vec::new();
        let paired = store.paired(count, &mut scratch).unwrap();
        let (mut attended, mut denominator, mut maximum) =
            (vec![0.0; 12 * d], vec![1.0; 12], vec![0.0; 12]);
        let softmax = Softmax {
            attended: &mut attended,
            denominator: &mut denominator,
            maximum: &mut maximum,
        };
        PairedKeys { unit, k: paired, v: &v, head_dim: d }.attend(&q, softmax, &mut Vec::new());
        assert!(denominator.iter().chain(&attended).all(|x| x.is_nan()));
    }
}
