//! How each format spells its values.
//!
//! Each block is widened into a fixed number of pieces of 32 values, so that the compiler keeps a piece in registers.

/// Values of a piece.
pub const PIECE: usize = 32;

/// One format's blocks.
pub trait Block {
    /// Bytes of a block.
    const BYTES: usize;
    /// Values of a block: a multiple of [`PIECE`].
    const VALUES: usize;

    /// Calls `each(piece, values)` with the block's pieces in order.
    fn pieces(bytes: &[u8], each: impl FnMut(usize, &[f32; PIECE]));
}

/// IEEE half precision to single. Infinities and NaN are no scales; everything else is exact.
#[inline(always)]
fn half(bytes: &[u8]) -> f32 {
    let bits = u32::from(u16::from_le_bytes([bytes[0], bytes[1]]));
    // The exponent's bias differs by 112; the product also gives subnormals their value.
    let magnitude = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits((112 + 127) << 23);
    f32::from_bits(magnitude.to_bits() | (bits & 0x8000) << 16)
}

/// `scale · nibble + offset`: low nibbles first, then high ones.
#[inline(always)]
fn nibbles(bytes: &[u8], scale: f32, offset: f32) -> [f32; PIECE] {
    let mut values = [0.0; PIECE];
    let bytes = &bytes[..16];
    for i in 0..16 {
        values[i] = f32::from(bytes[i] & 0xf).mul_add(scale, offset);
        values[i + 16] = f32::from(bytes[i] >> 4).mul_add(scale, offset);
    }
    values
}

pub struct Q4_0;

impl Block for Q4_0 {
    const BYTES: usize = 18;
    const VALUES: usize = 32;

    #[inline(always)]
    fn pieces(bytes: &[u8], mut each: impl FnMut(usize, &[f32; PIECE])) {
        let scale = half(bytes);
        each(0, &nibbles(&bytes[2..], scale, -8.0 * scale));
    }
}

pub struct Q4_1;

impl Block for Q4_1 {
    const BYTES: usize = 20;
    const VALUES: usize = 32;

    #[inline(always)]
    fn pieces(bytes: &[u8], mut each: impl FnMut(usize, &[f32; PIECE])) {
        each(0, &nibbles(&bytes[4..], half(bytes), half(&bytes[2..])));
    }
}

pub struct Q8_0;

impl Block for Q8_0 {
    const BYTES: usize = 34;
    const VALUES: usize = 32;

    #[inline(always)]
    fn pieces(bytes: &[u8], mut each: impl FnMut(usize, &[f32; PIECE])) {
        let scale = half(bytes);
        let quants = &bytes[2..2 + PIECE];
        let mut values = [0.0; PIECE];
        for i in 0..PIECE {
            values[i] = f32::from(quants[i] as i8) * scale;
        }
        each(0, &values);
    }
}

pub struct Q4K;

impl Block for Q4K {
    const BYTES: usize = 144;
    const VALUES: usize = 256;

    #[inline(always)]
    fn pieces(bytes: &[u8], mut each: impl FnMut(usize, &[f32; PIECE])) {
        let (scale, minimum) = (half(bytes), half(&bytes[2..]));
        let (sixes, quants) = (&bytes[4..16], &bytes[16..144]);
        for pair in 0..4 {
            let bytes = &quants[32 * pair..32 * pair + 32];
            for high in [0, 1] {
                let (s, m) = scale_and_minimum(sixes, 2 * pair + high);
                let (scale, offset) = (scale * s, -minimum * m);
                let mut values = [0.0; PIECE];
                for i in 0..PIECE {
                    let nibble = if high == 0 { bytes[i] & 0xf } else { bytes[i] >> 4 };
                    values[i] = f32::from(nibble).mul_add(scale, offset);
                }
                each(2 * pair + high, &values);
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

    #[inline(always)]
    fn pieces(bytes: &[u8], mut each: impl FnMut(usize, &[f32; PIECE])) {
        let scale = half(&bytes[208..]);
        for half in 0..2 {
            let low = &bytes[64 * half..64 * half + 64];
            let high = &bytes[128 + 32 * half..128 + 32 * half + 32];
            let scales = &bytes[192 + 8 * half..192 + 8 * half + 8];
            for part in 0..4 {
                let low = &low[32 * (part % 2)..32 * (part % 2) + 32];
                let mut values = [0.0; PIECE];
                for i in 0..PIECE {
                    let four = if part < 2 { low[i] & 0xf } else { low[i] >> 4 };
                    let two = high[i] >> (2 * part) & 3;
                    let scale = scale * f32::from(scales[2 * part + i / 16] as i8);
                    values[i] = f32::from((four | two << 4) as i8 - 32) * scale;
                }
                each(4 * half + part, &values);
            }
        }
    }
}
