//! The products value by value.

use pulp::Scalar;

use super::{Digits, GROUP, Group, Integer, Order, Rows};
use crate::tile::{LANES, Part, Words};

/// The digits of `x`.
pub fn digits(x: &[f32], columns: usize, order: Order) -> Rows {
    let (width, n) = (columns / GROUP, x.len() / columns);
    let mut groups = vec![Group::default(); n * width];
    let mut all = Vec::new();
    for (at, x) in x.chunks_exact(GROUP).enumerate() {
        let (unit, whole) = whole(x);
        let mut digits = [Digits::default(); 3];
        for (column, &number) in whole.iter().enumerate() {
            let place = order.place(column);
            let mut rest = number;
            for digits in digits.iter_mut().rev() {
                let digit = rest as i8;
                digits.0[place] = digit;
                rest = (rest - i32::from(digit)) >> 8;
            }
            assert_eq!(rest, 0, "{number} has more than three digits");
        }
        all.push(digits);
        let sum: i32 = whole.iter().sum();
        groups[at % width * n + at / width] = Group { unit, sum: unit * sum as f32 };
    }
    Rows { digits: all, words: Vec::new(), groups, width }
}

/// What a group's whole numbers count, and these.
fn whole(x: &[f32]) -> (f32, Vec<i32>) {
    let pick = |most: f32, x: &f32| if x.abs() > most || x.is_nan() { x.abs() } else { most };
    let least = (2.0_f32).powi(-100);
    let most = x.iter().fold(0.0, pick);
    if most < least {
        return (0.0, vec![0; GROUP]);
    }
    // So that three digits hold the largest.
    let most = most * 1.004;
    if !most.is_finite() {
        return (f32::NAN, vec![0; GROUP]);
    }
    let mut power = least;
    while 2.0 * power <= most {
        power *= 2.0;
    }
    let unit = power / (1 << 22) as f32;
    (unit, x.iter().map(|x| (x / unit).round_ties_even() as i32).collect())
}

/// `y[tile][i][lane] = x[i] · row` for the `n` rows of `x`.
pub fn multiply<B: Integer>(words: &[Words], row_words: usize, x: &[f32], n: usize) -> Vec<f32> {
    let columns = x.len() / n;
    let mut y = Vec::new();
    for tile in words.chunks_exact(row_words) {
        for x in x.chunks_exact(columns) {
            for lane in 0..LANES {
                y.push(product::<B>(tile, lane, x));
            }
        }
    }
    y
}

fn product<B: Integer>(tile: &[Words], lane: usize, x: &[f32]) -> f32 {
    let mut y = 0.0_f32;
    for (index, x) in x.chunks_exact(GROUP).enumerate() {
        let (block, group) = (index / (B::VALUES / GROUP), index % (B::VALUES / GROUP));
        let tile = &tile[block * B::WORDS..(block + 1) * B::WORDS];
        let codes = codes::<B>(tile, group, lane);
        let rows = digits(x, GROUP, Order::Bytes);
        let sum = |digits: &Digits| -> i32 {
            codes.iter().zip(digits.0).map(|(&code, digit)| code * i32::from(digit)).sum()
        };
        let [high, middle, low] = &rows.digits[0];
        let upper = sum(high) * 256 + sum(middle);
        let total = (upper as f32).mul_add(256.0, sum(low) as f32);
        let part = Part { simd: Scalar::new(), tile, part: lane };
        let (scale, offset) = B::scale_and_offset(part, group);
        let Group { unit, sum } = rows.groups[0];
        y = offset.mul_add(sum, y);
        y = (scale * unit).mul_add(total, y);
    }
    y
}

/// A group's codes by column.
fn codes<B: Integer>(tile: &[Words], group: usize, lane: usize) -> Vec<i32> {
    let words = B::codes_of(tile, group);
    let bits = 32 * words.len() / GROUP;
    let code = |column: usize| {
        let at = column * bits;
        (words[at / 32].0[lane] >> (at % 32) & ((1 << bits) - 1)) as i32
    };
    (0..GROUP).map(code).collect()
}
