//! How each format spells its values.
//!
//! Each block is widened into a fixed number of pieces of 32 values, so that the compiler keeps a piece in registers.

/// Values of a piece.
pub const PIECE: usize = 32;

/// Whole numbers and what they stand for: `scale · quant + offset`, with one scale for each half.
pub struct Piece {
    pub quants: [f32; PIECE],
    pub scales: [f32; 2],
    pub offset: f32,
}

/// One format's blocks.
pub trait Block: Send + Sync {
    /// Bytes of a block.
    const BYTES: usize;
    /// Values of a block: a multiple of [`PIECE`].
    const VALUES: usize;
    /// Whether pieces have offsets other than 0.
    const OFFSETS: bool;

    /// Calls `each(index, piece)` with the block's pieces in order.
    fn pieces(bytes: &[u8], each: impl FnMut(usize, &Piece));
}

/// A format whose blocks are one piece each.
pub trait OnePiece: Send + Sync {
    /// Bytes of a block.
    const BYTES: usize;
    /// Whether offsets are other than 0.
    const OFFSETS: bool;

    /// The block.
    fn piece(bytes: &[u8]) -> Piece;
}

impl<B: OnePiece> Block for B {
    const BYTES: usize = B::BYTES;
    const VALUES: usize = PIECE;
    const OFFSETS: bool = B::OFFSETS;

    #[inline(always)]
    fn pieces(bytes: &[u8], mut each: impl FnMut(usize, &Piece)) {
        each(0, &B::piece(bytes));
    }
}

/// IEEE half precision to single. Infinities and NaN are no scales; everything else is exact.
#[inline(always)]
fn half(bytes: &[u8]) -> f32 {
    // Sign-extended and shifted, the sign is in place; the mask drops its copies. The exponent's bias differs by 112,
    // and the product also gives subnormals their value.
    let bits = i32::from(i16::from_le_bytes([bytes[0], bytes[1]])) << 13;
    f32::from_bits(bits as u32 & 0x8fff_e000) * f32::from_bits((112 + 127) << 23)
}

/// Low nibbles first, then high ones.
#[inline(always)]
fn nibbles(bytes: &[u8]) -> [f32; PIECE] {
    let mut quants = [0.0; PIECE];
    let bytes = &bytes[..16];
    for i in 0..16 {
        quants[i] = f32::from(bytes[i] & 0xf);
        quants[i + 16] = f32::from(bytes[i] >> 4);
    }
    quants
}

/// A piece that is its own values.
#[inline(always)]
fn plain(quants: [f32; PIECE]) -> Piece {
    Piece { quants, scales: [1.0; 2], offset: 0.0 }
}

pub struct Bf16;

impl OnePiece for Bf16 {
    const BYTES: usize = 64;
    const OFFSETS: bool = false;

    #[inline(always)]
    fn piece(bytes: &[u8]) -> Piece {
        let mut quants = [0.0; PIECE];
        let (stored, _) = bytes.as_chunks::<2>();
        for i in 0..PIECE {
            quants[i] = f32::from_bits(u32::from(u16::from_le_bytes(stored[i])) << 16);
        }
        plain(quants)
    }
}

pub struct F16;

impl OnePiece for F16 {
    const BYTES: usize = 64;
    const OFFSETS: bool = false;

    #[inline(always)]
    fn piece(bytes: &[u8]) -> Piece {
        let mut quants = [0.0; PIECE];
        for i in 0..PIECE {
            quants[i] = half(&bytes[2 * i..2 * i + 2]);
        }
        plain(quants)
    }
}

pub struct Q4_0;

impl OnePiece for Q4_0 {
    const BYTES: usize = 18;
    const OFFSETS: bool = true;

    #[inline(always)]
    fn piece(bytes: &[u8]) -> Piece {
        let scale = half(bytes);
        Piece { quants: nibbles(&bytes[2..]), scales: [scale; 2], offset: -8.0 * scale }
    }
}

pub struct Q4_1;

impl OnePiece for Q4_1 {
    const BYTES: usize = 20;
    const OFFSETS: bool = true;

    #[inline(always)]
    fn piece(bytes: &[u8]) -> Piece {
        let quants = nibbles(&bytes[4..]);
        Piece { quants, scales: [half(bytes); 2], offset: half(&bytes[2..]) }
    }
}

pub struct Q8_0;

impl OnePiece for Q8_0 {
    const BYTES: usize = 34;
    const OFFSETS: bool = false;

    #[inline(always)]
    fn piece(bytes: &[u8]) -> Piece {
        let mut quants = [0.0; PIECE];
        let stored = &bytes[2..2 + PIECE];
        for i in 0..PIECE {
            quants[i] = f32::from(stored[i] as i8);
        }
        Piece { quants, scales: [half(bytes); 2], offset: 0.0 }
    }
}

pub struct Q4K;

impl Block for Q4K {
    const BYTES: usize = 144;
    const VALUES: usize = 256;
    const OFFSETS: bool = true;

    #[inline(always)]
    fn pieces(bytes: &[u8], mut each: impl FnMut(usize, &Piece)) {
        let (scale, minimum) = (half(bytes), half(&bytes[2..]));
        let (sixes, stored) = (&bytes[4..16], &bytes[16..144]);
        for pair in 0..4 {
            let stored = &stored[32 * pair..32 * pair + 32];
            for high in 0..2 {
                let (s, m) = scale_and_minimum(sixes, 2 * pair + high);
                let mut quants = [0.0; PIECE];
                for i in 0..PIECE {
                    quants[i] = f32::from(stored[i] >> (4 * high) & 0xf);
                }
                let piece = Piece { quants, scales: [scale * s; 2], offset: -minimum * m };
                each(2 * pair + high, &piece);
            }
        }
    }
}

/// The 6-bit scale and minimum of piece `index`, of which GGUF packs eight pairs into twelve bytes.
#[inline(always)]
fn scale_and_minimum(sixes: &[u8], index: usize) -> (f32, f32) {
    let (scale, minimum) = if index < 4 {
        (sixes[index] & 63, sixes[index + 4] & 63)
    } else {
        (
            (sixes[index + 4] & 0xf) | (sixes[index - 4] >> 6 << 4),
            (sixes[index + 4] >> 4) | (sixes[index] >> 6 << 4),
        )
    };
    (f32::from(scale), f32::from(minimum))
}

pub struct Q6K;

impl Block for Q6K {
    const BYTES: usize = 210;
    const VALUES: usize = 256;
    const OFFSETS: bool = false;

    #[inline(always)]
    fn pieces(bytes: &[u8], mut each: impl FnMut(usize, &Piece)) {
        let scale = half(&bytes[208..]);
        for half in 0..2 {
            let low = &bytes[64 * half..64 * half + 64];
            let high = &bytes[128 + 32 * half..128 + 32 * half + 32];
            let scales = &bytes[192 + 8 * half..192 + 8 * half + 8];
            for part in 0..4 {
                let low = &low[32 * (part % 2)..32 * (part % 2) + 32];
                let mut quants = [0.0; PIECE];
                for i in 0..PIECE {
                    let four = low[i] >> (4 * (part / 2)) & 0xf;
                    let two = high[i] >> (2 * part) & 3;
                    quants[i] = f32::from((four | two << 4) as i8 - 32);
                }
                let scales = [0, 1].map(|i| scale * f32::from(scales[2 * part + i] as i8));
                each(4 * half + part, &Piece { quants, scales, offset: 0.0 });
            }
        }
    }
}
