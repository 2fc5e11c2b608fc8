//! The layout of a matrix for the tensor cores of a GPU.
//!
//! A matrix is cut into tiles of 16 rows and 64 columns, all of 16 rows one after the other; rows and columns past the last are
//! zeros. A tile's codes lie as the 32 lanes of a warp hold them for products of 16 rows with 16 columns: lane `4 g + t` has rows `g`
//! and `g + 8`, and of each block of 32 columns first `4 t .. 4 t + 3`, then `16 + 4 t .. 16 + 4 t + 3`. After all codes come the
//! scales of all tiles; then what tiles of 256 columns, or all of 16 rows, share. The kernels' `quantized.cuh` reads it.

use rayon::prelude::*;

use crate::Format;
use crate::matrix::{PackError, PackedMatrix};
use crate::tile::{LANES, Words};

/// Columns of a tile.
const COLUMNS: usize = 64;
/// Columns that share the shared words of a format with large blocks.
const SHARED: usize = 256;

/// The formats that a GPU's kernels multiply by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(non_camel_case_types, reason = "the names are GGUF's own")]
pub enum FragmentFormat {
    /// [`Format::Q8_0`].
    Q8_0,
    /// [`Format::Q4_0`].
    Q4_0,
    /// [`Format::Q4_1`].
    Q4_1,
    /// [`Format::Q4K`].
    Q4K,
    /// [`Format::Q6K`].
    Q6K,
    /// Floats of 4 bits of exponent and 3 of mantissa, an f32 scale a row.
    E4m3,
}

impl FragmentFormat {
    /// The form on a GPU of a file's format; none of 16-bit values, which lie there row by row.
    pub fn of(format: Format) -> Option<Self> {
        match format {
            Format::Bf16 | Format::F16 => None,
            Format::Q8_0 => Some(Self::Q8_0),
            Format::Q4_0 => Some(Self::Q4_0),
            Format::Q4_1 => Some(Self::Q4_1),
            Format::Q4K => Some(Self::Q4K),
            Format::Q6K => Some(Self::Q6K),
        }
    }

    /// Its name, as llama.cpp's tools write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q8_0 => "q8_0",
            Self::Q4_0 => "q4_0",
            Self::Q4_1 => "q4_1",
            Self::Q4K => "q4_k",
            Self::Q6K => "q6_k",
            Self::E4m3 => "fp8",
        }
    }

    /// Words of a tile's codes and of its scales.
    fn tile_words(self) -> (usize, usize) {
        match self {
            Self::Q8_0 => (256, 16),
            Self::Q4_0 | Self::Q4K => (128, 16),
            Self::Q4_1 => (128, 32),
            Self::Q6K => (192, 16),
            Self::E4m3 => (256, 0),
        }
    }

    /// Words that a row of so many tiles shares.
    fn shared_words(self, tiles: usize) -> usize {
        let large = tiles / (SHARED / COLUMNS);
        match self {
            Self::Q8_0 | Self::Q4_0 | Self::Q4_1 => 0,
            Self::Q4K => large * 16,
            Self::Q6K => large * 8,
            Self::E4m3 => LANES,
        }
    }

    /// Words of a matrix.
    pub fn words(self, rows: usize, columns: usize) -> usize {
        let ((codes, scales), tiles) = (self.tile_words(), columns.div_ceil(COLUMNS));
        rows.div_ceil(LANES) * (tiles * (codes + scales) + self.shared_words(tiles))
    }
}

/// A matrix in that layout, on the host.
#[derive(Clone)]
pub struct Fragments {
    format: FragmentFormat,
    rows: usize,
    columns: usize,
    words: Vec<u32>,
}

impl std::fmt::Debug for Fragments {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Fragments({:?} [{}, {}])", self.format, self.rows, self.columns)
    }
}

impl Fragments {
    /// The values of a packed matrix, code by code; `None` where a GPU has no kernel for its format.
    pub fn of(matrix: &PackedMatrix) -> Option<Self> {
        let (rows, columns) = (matrix.rows(), matrix.columns());
        let format = FragmentFormat::of(matrix.format())?;
        let mut words = vec![0; format.words(rows, columns)];
        let tiles = columns.div_ceil(COLUMNS);
        let (code_words, scale_words) = format.tile_words();
        let row_tiles = rows.div_ceil(LANES);
        let (codes, rest) = words.split_at_mut(row_tiles * tiles * code_words);
        let (scales, shared) = rest.split_at_mut(row_tiles * tiles * scale_words);
        let shared_words = format.shared_words(tiles);
        let mut shared: Vec<&mut [u32]> = match shared_words {
            0 => (0..row_tiles).map(|_| Default::default()).collect(),
            size => shared.chunks_mut(size).collect(),
        };
        codes
            .par_chunks_mut(tiles * code_words)
            .zip(scales.par_chunks_mut(tiles * scale_words))
            .zip(&mut shared)
            .enumerate()
            .for_each(|(row_tile, ((codes, scales), shared))| {
                let from =
                    Blocks { format: matrix.format(), words: matrix.tiles(row_tile..row_tile + 1) };
                for (tile, to) in codes.chunks_exact_mut(code_words).enumerate() {
                    each_place(|place| {
                        let column = tile * COLUMNS + place.column;
                        if column < columns {
                            place.put(format, to, from.code(column, place.row));
                        }
                    });
                }
                for (tile, to) in scales.chunks_exact_mut(scale_words).enumerate() {
                    from.scales(tile * COLUMNS, columns, to);
                }
                from.shared(shared);
            });
        Some(Self { format, rows, columns, words })
    }

    /// From words that a GPU has, or made.
    ///
    /// # Errors
    /// Another number of words than the shape needs.
    pub fn from_words(
        format: FragmentFormat,
        rows: usize,
        columns: usize,
        words: Vec<u32>,
    ) -> Result<Self, PackError> {
        let (got, expected) = (4 * words.len(), 4 * format.words(rows, columns));
        if got != expected {
            return Err(PackError::Bytes { got, expected });
        }
        Ok(Self { format, rows, columns, words })
    }

    /// The format.
    pub fn format(&self) -> FragmentFormat {
        self.format
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// The words.
    pub fn words(&self) -> &[u32] {
        &self.words
    }

    /// The words, without a copy.
    pub fn into_words(self) -> Vec<u32> {
        self.words
    }

    /// All values, `[rows, columns]`: the plain twin of the kernels, value by value.
    pub fn dequantize(&self) -> Vec<f32> {
        let (tiles, row_tiles) = (self.columns.div_ceil(COLUMNS), self.rows.div_ceil(LANES));
        let (code_words, scale_words) = self.format.tile_words();
        let (codes, rest) = self.words.split_at(row_tiles * tiles * code_words);
        let (scales, shared) = rest.split_at(row_tiles * tiles * scale_words);
        let shared_words = self.format.shared_words(tiles);
        let mut values = vec![f32::NAN; self.rows * self.columns];
        for (row_tile, values) in values.chunks_mut(LANES * self.columns).enumerate() {
            let shared = &shared[row_tile * shared_words..(row_tile + 1) * shared_words];
            for tile in 0..tiles {
                let at = row_tile * tiles + tile;
                let codes = &codes[at * code_words..(at + 1) * code_words];
                let scales = &scales[at * scale_words..(at + 1) * scale_words];
                each_place(|place| {
                    let column = tile * COLUMNS + place.column;
                    let value = values.get_mut(place.row * self.columns + column);
                    if let Some(value) = value.filter(|_| column < self.columns) {
                        let code = place.get(self.format, codes);
                        *value = place.value(self.format, code, scales, (shared, tile));
                    }
                });
            }
        }
        values
    }
}

/// Where a tile has the code of a row and a column.
struct Place {
    row: usize,
    column: usize,
    lane: usize,
    /// Whether the row is the lane's second.
    second: usize,
    /// Block of 32 columns.
    block: usize,
    /// Half of the block.
    half: usize,
    /// Which of four adjacent columns.
    of_four: usize,
}

fn each_place(mut f: impl FnMut(Place)) {
    for row in 0..LANES {
        for column in 0..COLUMNS {
            let (block, in_block) = (column / 32, column % 32);
            let (half, t, of_four) = (in_block / 16, in_block % 16 / 4, in_block % 4);
            let (lane, second) = (row % 8 * 4 + t, row / 8);
            f(Place { row, column, lane, second, block, half, of_four });
        }
    }
}

impl Place {
    /// The word and the bit of a byte. The bytes of a word are columns 0, 2, 1, 3: every other one is a pair of neighbours.
    fn byte(&self) -> (usize, usize) {
        let byte = [0, 2, 1, 3][self.of_four];
        (self.second * 128 + self.lane * 4 + 2 * self.block + self.half, 8 * byte)
    }

    /// Of pairs of neighbours the first are in the low half of a word.
    fn pair(&self) -> (usize, usize) {
        (2 * self.half + self.of_four / 2, self.of_four % 2)
    }

    /// The word and the bit of four bits.
    fn nibble(&self) -> (usize, usize) {
        let (pair, high) = self.pair();
        (self.lane * 4 + 2 * self.block + self.second, 4 * pair + 16 * high)
    }

    /// The word and the bit of a six-bit code's upper two.
    fn upper(&self) -> (usize, usize) {
        let (pair, high) = self.pair();
        (128 + self.lane * 2 + self.second, 8 * self.block + 2 * pair + 16 * high)
    }

    fn put(&self, format: FragmentFormat, tile: &mut [u32], code: u32) {
        let mut add = |(word, bit): (usize, usize), code: u32| tile[word] |= code << bit;
        match format {
            FragmentFormat::Q8_0 | FragmentFormat::E4m3 => add(self.byte(), code),
            FragmentFormat::Q4_0 | FragmentFormat::Q4_1 | FragmentFormat::Q4K => {
                add(self.nibble(), code);
            }
            FragmentFormat::Q6K => {
                add(self.nibble(), code & 0xf);
                add(self.upper(), code >> 4);
            }
        }
    }

    fn get(&self, format: FragmentFormat, tile: &[u32]) -> u32 {
        let field = |(word, bit): (usize, usize), mask: u32| tile[word] >> bit & mask;
        match format {
            FragmentFormat::Q8_0 | FragmentFormat::E4m3 => field(self.byte(), 0xff),
            FragmentFormat::Q4_0 | FragmentFormat::Q4_1 | FragmentFormat::Q4K => {
                field(self.nibble(), 0xf)
            }
            FragmentFormat::Q6K => field(self.nibble(), 0xf) | field(self.upper(), 3) << 4,
        }
    }

    /// What a code stands for. Scales of row `g` are next to those of row `g + 8`.
    fn value(
        &self,
        format: FragmentFormat,
        code: u32,
        scales: &[u32],
        (shared, tile): (&[u32], usize),
    ) -> f32 {
        let rows = self.row % 8 * 2 + self.second;
        let byte = |word: u32, which: usize| (word >> (8 * which) & 0xff) as u8;
        let large = tile / (SHARED / COLUMNS);
        match format {
            FragmentFormat::Q8_0 => half(scales[rows], self.block) * f32::from(code as u8 as i8),
            FragmentFormat::Q4_0 => half(scales[rows], self.block) * (code as f32 - 8.0),
            FragmentFormat::Q4_1 => {
                let both = scales[2 * rows + self.block];
                half(both, 0).mul_add(code as f32, half(both, 1))
            }
            FragmentFormat::Q4K => {
                let all = shared[large * 16 + rows];
                let of = |which| f32::from(byte(scales[rows], 2 * self.block + which));
                (half(all, 0) * of(0)).mul_add(code as f32, -half(all, 1) * of(1))
            }
            FragmentFormat::Q6K => {
                let all = half(shared[large * 8 + self.row % 8], self.second);
                let of = byte(scales[rows], 2 * self.block + self.half) as i8;
                all * f32::from(of) * (code as f32 - 32.0)
            }
            FragmentFormat::E4m3 => f32::from_bits(shared[rows]) * e4m3(code as u8),
        }
    }
}

/// One of a word's two halves in IEEE half precision.
fn half(word: u32, which: usize) -> f32 {
    half::f16::from_bits((word >> (16 * which)) as u16).to_f32()
}

/// A float of 4 bits of exponent and 3 of mantissa, none of them infinite.
fn e4m3(byte: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(byte >> 3 & 0xf), f32::from(byte & 7));
    let size = match exponent {
        0 => mantissa * (2.0_f32).powi(-9),
        _ => (1.0 + mantissa / 8.0) * (2.0_f32).powi(exponent - 7),
    };
    if byte & 0x80 == 0 { size } else { -size }
}

/// The blocks of 16 rows as the host has them.
struct Blocks<'a> {
    format: Format,
    /// `[blocks of a row, words of a block]`
    words: &'a [Words],
}

impl Blocks<'_> {
    /// A word of the block that has a column, of one row.
    fn word(&self, column: usize, word: usize, row: usize) -> u32 {
        let block = column / self.format.block_values();
        self.words[block * self.format.tile_words() + word].0[row]
    }

    fn field(&self, column: usize, word: usize, row: usize, bit: usize, mask: u32) -> u32 {
        self.word(column, word, row) >> bit & mask
    }

    fn code(&self, column: usize, row: usize) -> u32 {
        let at = column % self.format.block_values();
        match self.format {
            Format::Bf16 | Format::F16 => 0,
            Format::Q4_0 | Format::Q4_1 => self.field(column, at / 8, row, at % 8 * 4, 0xf),
            Format::Q8_0 => self.field(column, at / 4, row, at % 4 * 8, 0xff) ^ 0x80,
            Format::Q4K => self.field(column, at / 32 * 4 + at % 32 / 8, row, at % 8 * 4, 0xf),
            Format::Q6K => {
                let (group, at) = (at / 16, at % 16);
                let low = self.field(column, group * 3 + at / 8, row, at % 8 * 4, 0xf);
                low | self.field(column, group * 3 + 2, row, at * 2, 3) << 4
            }
        }
    }

    /// The scales of the tile that begins with a column, row `g` next to row `g + 8`.
    fn scales(&self, column: usize, columns: usize, to: &mut [u32]) {
        for row in 0..LANES {
            let rows = row % 8 * 2 + row / 8;
            for block in 0..COLUMNS / 32 {
                let column = column + block * 32;
                if column >= columns {
                    continue;
                }
                let group = column % self.format.block_values() / 32;
                match self.format {
                    Format::Bf16 | Format::F16 => {}
                    Format::Q4_0 => to[rows] |= self.word(column, 4, row) << (16 * block),
                    Format::Q8_0 => to[rows] |= self.word(column, 8, row) << (16 * block),
                    Format::Q4_1 => to[2 * rows + block] = self.word(column, 4, row),
                    Format::Q4K => {
                        let both = self.field(column, 32 + group / 2, row, group % 2 * 16, 0xffff);
                        to[rows] |= both << (16 * block);
                    }
                    Format::Q6K => {
                        let both = self.field(column, 48 + group / 2, row, group % 2 * 16, 0xffff);
                        to[rows] |= (both ^ 0x8080) << (16 * block);
                    }
                }
            }
        }
    }

    /// What tiles of 256 columns share.
    fn shared(&self, to: &mut [u32]) {
        for row in 0..LANES {
            let (first, second) = (row % 8, row / 8);
            match self.format {
                Format::Q4K => {
                    for (large, to) in to.chunks_exact_mut(16).enumerate() {
                        to[first * 2 + second] = self.word(large * SHARED, 36, row);
                    }
                }
                Format::Q6K => {
                    for (large, to) in to.chunks_exact_mut(8).enumerate() {
                        to[first] |= self.word(large * SHARED, 52, row) << (16 * second);
                    }
                }
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A matrix whose bits are all in use, with scales of an ordinary size.
    fn matrix(format: Format, rows: usize, columns: usize) -> PackedMatrix {
        let (size, block) = (format.row_bytes(format.block_values()), format.block_values());
        let mut bytes = Vec::new();
        for at in 0..rows * columns / block {
            let mut one: Vec<u8> = (0..size).map(|i| ((i * 89 + at * 31) % 251) as u8).collect();
            for high in match format {
                Format::Q4K | Format::Q4_1 => vec![1, 3],
                Format::Q6K => vec![size - 1],
                _ => vec![1],
            } {
                one[high] = 0x2c;
            }
            bytes.extend(one);
        }
        PackedMatrix::new(format, rows, columns, &bytes).unwrap()
    }

    #[test]
    fn values_are_those_of_the_packed_matrix() {
        for (format, columns) in [
            (Format::Q8_0, 96),
            (Format::Q8_0, 256),
            (Format::Q4_0, 96),
            (Format::Q4_1, 160),
            (Format::Q4K, 512),
            (Format::Q6K, 512),
        ] {
            for rows in [1, 16, 37] {
                let packed = matrix(format, rows, columns);
                let fragments = Fragments::of(&packed).unwrap();
                assert_eq!(fragments.words().len(), fragments.format().words(rows, columns));
                let mut expected = Vec::new();
                packed.dequantize_into(0..rows, &mut expected);
                let got = fragments.dequantize();
                let most = expected.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
                for (at, (got, expected)) in got.iter().zip(&expected).enumerate() {
                    let error = (got - expected).abs();
                    assert!(
                        error <= 2e-6 * most,
                        "{format:?} {rows} value {at}: {got}, {expected}"
                    );
                }
            }
        }
    }

    #[test]
    fn wide_formats_have_no_fragments() {
        for format in [Format::Bf16, Format::F16] {
            let matrix = PackedMatrix::new(format, 2, 32, &[0; 128]).unwrap();
            assert!(Fragments::of(&matrix).is_none());
        }
    }

    #[test]
    fn another_number_of_words_is_refused() {
        let words = vec![0; FragmentFormat::Q8_0.words(16, 64) + 1];
        assert!(Fragments::from_words(FragmentFormat::Q8_0, 16, 64, words).is_err());
    }

    #[test]
    fn floats_of_eight_bits_are_read() {
        for (byte, value) in [(0x00, 0.0), (0x01, 0.001_953_125), (0x38, 1.0), (0xb9, -1.125)] {
            assert_eq!(e4m3(byte), value);
        }
        assert_eq!(e4m3(0x7e), 448.0);
    }
}
