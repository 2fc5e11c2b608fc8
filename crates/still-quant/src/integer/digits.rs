//! Rows of `x` in digits.

/// Values below are next to nothing.
#[cfg(target_arch = "x86_64")]
pub(super) const LEAST: f32 = f32::from_bits(27 << 23);

/// Columns of a group.
pub(crate) const GROUP: usize = 32;

/// The digits of a group's values that weigh the same, as a format orders them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(align(32))]
pub(crate) struct Digits(pub [i8; GROUP]);

/// A group's digits in words of 16 bits: those that weigh 2⁸, and 1.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(align(64))]
pub(crate) struct RowWords(pub [[i16; GROUP]; 2]);

/// A group of a row besides its digits.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Group {
    /// What a value's whole number counts: a power of two; 0 if all are next to nothing, NaN if one is no number.
    pub unit: f32,
    /// `Σ x`.
    pub sum: f32,
}

/// Rows of `x`.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Rows {
    /// `[n, groups, 3]`: those that weigh 2¹⁶, 2⁸ and 1.
    pub digits: Vec<[Digits; 3]>,
    /// `[n, groups]`: the same in words, where a CPU multiplies them.
    pub words: Vec<RowWords>,
    /// `[groups, n]`: those of many rows are read together.
    pub groups: Vec<Group>,
    /// Groups of a row.
    pub width: usize,
}

impl Rows {
    /// Takes rows `x` `[n, columns]` in place of its own: `digits_of` writes a group's digits, and says what else is to know of it.
    #[inline(always)]
    pub fn fill(
        &mut self,
        x: &[f32],
        columns: usize,
        digits_of: impl Fn(&[f32; GROUP], &mut [Digits; 3]) -> Group,
    ) {
        let (width, n) = (columns / GROUP, x.len() / columns);
        self.width = width;
        self.digits.resize(n * width, Default::default());
        self.groups.resize(n * width, Group::default());
        let x = x.as_chunks::<GROUP>().0.chunks_exact(width);
        for (row, (x, digits)) in x.zip(self.digits.chunks_exact_mut(width)).enumerate() {
            for (at, (x, digits)) in x.iter().zip(digits).enumerate() {
                self.groups[at * n + row] = digits_of(x, digits);
            }
        }
    }

    /// Rows.
    pub fn count(&self) -> usize {
        self.groups.len() / self.width
    }
}
