//! Products in whole numbers, on CPUs that multiply bytes (AVX2, AVX512_VNNI, AMX): codes are bytes as they are, and a row of `x` becomes three.
//!
//! In a group of 32 columns a value of `x` is `s X`, with one power of two `s` for the group and a whole number `X` of 23 bits, and
//! `X = 2¹⁶ h + 2⁸ m + l` with digits of −128 … 127. The sums `Σ code · h`, `Σ code · m` and `Σ code · l` are exact, in whatever order
//! and by whichever instruction they are made. What follows is one sequence of roundings ([`Unit`]'s kernels spell it alike), so that a
//! row's products do not depend on the batch, though many rows are multiplied by other instructions than one.
//!
//! The largest of a group keeps 23 bits and the others as many as lie above `s / 2`: sums of f32 products round as much.
//!
//! | file | content |
//! |---|---|
//! | `x86` | which of the instructions a CPU has |
//! | `digits` | rows of `x` in digits |
//! | `avx2` | products of codes of four bits (AVX2) |
//! | `words` | products of codes of eight bits (AVX2) |
//! | `vnni` | products of a few rows (AVX512_VNNI) |
//! | `amx` | products of many rows (AMX-INT8) |
//! | `naive` | the same, value by value: what tests compare with |

mod digits;
#[cfg(test)]
mod naive;

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod vnni;
#[cfg(target_arch = "x86_64")]
mod words;
#[cfg(target_arch = "x86_64")]
mod x86;

pub(crate) use digits::{Digits, GROUP, Group, RowWords, Rows};
#[cfg(target_arch = "x86_64")]
pub(crate) use x86::Unit;

/// No CPU of this architecture is known to have it.
#[cfg(not(target_arch = "x86_64"))]
#[derive(Clone, Copy, Debug)]
pub(crate) enum Unit {}

#[cfg(not(target_arch = "x86_64"))]
impl Unit {
    pub fn find() -> Option<Self> {
        None
    }

    pub fn has_tiles(self) -> bool {
        match self {}
    }

    pub fn digits_into(self, _x: &[f32], _columns: usize, _order: Order, _rows: &mut Rows) {
        match self {}
    }

    pub fn multiply<B: Integer>(
        self,
        _words: &[crate::tile::Words],
        _row_words: usize,
        _rows: &Rows,
        _y: &mut [f32],
    ) {
        match self {}
    }
}

/// In which order a word has the codes of a group's columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// Four bytes, one after the other.
    Bytes,
    /// Eight codes of four bits: those of even columns, masked, are four bytes, then those of odd ones.
    Nibbles,
}

impl Order {
    /// Where among a group's bytes a column's is.
    #[cfg(test)]
    pub fn place(self, column: usize) -> usize {
        match self {
            Self::Bytes => column,
            Self::Nibbles => column / 8 * 8 + column % 2 * 4 + column % 8 / 2,
        }
    }
}

/// A format whose codes are whole numbers of up to eight bits: `value = scale · code + offset`, in groups of [`GROUP`] columns.
pub(crate) trait Integer: crate::block::Block {
    /// Where a word has which column.
    const ORDER: Order;

    /// The words of a group's codes in a tile.
    fn codes_of(tile: &[crate::tile::Words], group: usize) -> &[crate::tile::Words];

    /// Scale and offset of a group, for codes as they are.
    fn scale_and_offset<S: pulp::Simd>(
        part: crate::tile::Part<'_, S>,
        group: usize,
    ) -> (S::f32s, S::f32s);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::{Q4_0, Q4_1, Q4K, Q8_0};
    use crate::tile::{LANES, Words};

    #[test]
    fn every_column_has_a_place_of_its_own() {
        for order in [Order::Bytes, Order::Nibbles] {
            let mut places: Vec<usize> = (0..GROUP).map(|column| order.place(column)).collect();
            places.sort_unstable();
            assert_eq!(places, (0..GROUP).collect::<Vec<_>>());
        }
    }

    /// Values of very different sizes, zeros, and whole groups of them.
    fn values(n: usize, columns: usize) -> Vec<f32> {
        let value = |i: usize| match i / GROUP % 5 {
            3 => 0.0,
            2 => (i as f32 * 0.7).sin() * (10.0_f32).powi((i % 9) as i32 - 4),
            _ => (i as f32 * 0.37).sin(),
        };
        (0..n * columns).map(value).collect()
    }

    fn check<B: Integer>() {
        let (blocks, tiles, most) = (3, 3, 70);
        let columns = blocks * B::VALUES;
        let words: Vec<Words> = crate::product::tests::tiles::<B>(tiles * blocks);
        let x = values(most, columns);
        for n in 1..=most {
            let x = &x[..n * columns];
            let expected_digits = naive::digits(x, columns, B::ORDER);
            let expected = naive::multiply::<B>(&words, blocks * B::WORDS, x, n);
            assert!(expected.iter().all(|y| y.is_finite()) && expected.iter().any(|y| *y != 0.0));
            for unit in Unit::all() {
                let mut rows = Rows::default();
                unit.digits_into(x, columns, B::ORDER, &mut rows);
                let digits = Rows { words: Vec::new(), ..rows.clone() };
                assert_eq!(digits, expected_digits, "digits of {n} rows on {unit:?}");
                let mut y = vec![f32::NAN; n * tiles * LANES];
                unit.multiply::<B>(&words, blocks * B::WORDS, &rows, &mut y);
                assert_eq!(y, expected, "{n} rows on {unit:?}");
            }
        }
    }

    #[test]
    fn every_kernel_gives_the_bits_of_the_naive_twin() {
        if Unit::all().is_empty() {
            println!("this CPU multiplies no bytes: nothing to compare");
        }
        check::<Q4_0>();
        check::<Q4_1>();
        check::<Q8_0>();
        check::<Q4K>();
    }

    /// The largest codes and digits of either sign: sums of 16 bits hold them.
    #[test]
    fn the_largest_sums_are_exact() {
        let row_words = <Q4_1 as crate::block::Block>::WORDS;
        let mut words = vec![Words::default(); row_words];
        words[..4].fill(Words([u32::MAX; LANES]));
        // Scale 1, minimum 0.
        words[4] = Words([0x3c00; LANES]);
        // 2²³ / 1.004 and numbers whose lower digits are all -128 or 127.
        for whole in [8_355_000, 0x7f_7f7f, -0x80_8080 + 0x1_0000, -8_355_000] {
            let x = [whole as f32; GROUP];
            let expected = naive::multiply::<Q4_1>(&words, row_words, &x, 1);
            for unit in Unit::all() {
                let mut rows = Rows::default();
                unit.digits_into(&x, GROUP, Order::Nibbles, &mut rows);
                let mut y = vec![f32::NAN; LANES];
                unit.multiply::<Q4_1>(&words, row_words, &rows, &mut y);
                assert_eq!(y, expected, "{whole} on {unit:?}");
                let exact = 15.0 * 32.0 * f64::from(whole);
                assert!((f64::from(y[0]) - exact).abs() <= 1e-6 * exact.abs(), "{whole}: {}", y[0]);
            }
        }
    }

    /// What is no number, or too large for one, makes products that are none; what is next to nothing is nothing.
    #[test]
    fn values_that_are_no_numbers_reach_the_products() {
        let words: Vec<Words> = crate::product::tests::tiles::<Q4_1>(1);
        let row_words = <Q4_1 as crate::block::Block>::WORDS;
        for (unit, n) in Unit::all().into_iter().flat_map(|unit| [(unit, 1), (unit, 40)]) {
            for (value, is_nan) in [(f32::NAN, true), (f32::INFINITY, true), (1e-38, false)] {
                let mut x = vec![1e-38; n * GROUP];
                x[(n - 1) * GROUP + 7] = value;
                let mut rows = Rows::default();
                unit.digits_into(&x, GROUP, Order::Nibbles, &mut rows);
                let mut y = vec![f32::INFINITY; n * LANES];
                unit.multiply::<Q4_1>(&words, row_words, &rows, &mut y);
                let (first, last) = y.split_at((n - 1) * LANES);
                assert!(first.iter().all(|y| *y == 0.0), "{unit:?}");
                let fits = |y: &f32| y.is_nan() == is_nan && (is_nan || *y == 0.0);
                assert!(last.iter().all(fits), "{value} on {unit:?}");
            }
        }
    }
}
