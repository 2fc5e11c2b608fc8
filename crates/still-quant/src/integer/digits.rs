//! Rows of `x` in digits.

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
    /// Rows.
    pub fn count(&self) -> usize {
        self.groups.len() / self.width
    }
}
