//! How stored rows are coded: the kernel's own type, 16 bits, or 8 bits with one scale a row.

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};

use crate::Result;
use crate::config::RowDtype;
use still_compute::Real;

/// One stored value.
pub(crate) trait Cell<T>: Copy + Default + Send + Sync {
    /// Exactly, but for the row's scale.
    fn widen(self) -> T;

    /// To nearest.
    fn narrow(x: T) -> Self;
}

impl<T: Real> Cell<T> for T {
    #[inline(always)]
    fn widen(self) -> T {
        self
    }

    #[inline(always)]
    fn narrow(x: T) -> Self {
        x
    }
}

impl<T: Real> Cell<T> for Bf16 {
    #[inline(always)]
    fn widen(self) -> T {
        // bf16 is the upper half of an f32.
        T::of_f32(f32::from_bits(u32::from(self.0.to_bits()) << 16))
    }

    #[inline(always)]
    fn narrow(x: T) -> Self {
        Self(bf16::from_f32(x.wide() as f32))
    }
}

impl<T: Real> Cell<T> for F16 {
    #[inline(always)]
    fn widen(self) -> T {
        // Without a branch, so that it vectorises: the exponent is rebiased by a product, which also makes subnormal
        // numbers right; what had the highest exponent is infinite or NaN.
        const REBIAS: f32 = f32::from_bits((127 + 112) << 23);
        let bits = u32::from(self.0.to_bits());
        let magnitude = f32::from_bits((bits & 0x7fff) << 13) * REBIAS;
        let special = if bits & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
        T::of_f32(f32::from_bits(magnitude.to_bits() | special | (bits & 0x8000) << 16))
    }

    #[inline(always)]
    fn narrow(x: T) -> Self {
        Self(f16::from_f32(x.wide() as f32))
    }
}

impl<T: Real> Cell<T> for Int8 {
    #[inline(always)]
    fn widen(self) -> T {
        T::of_f32(f32::from(self.0))
    }

    #[inline(always)]
    fn narrow(x: T) -> Self {
        Self(x.wide().round() as i8)
    }
}

#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Bf16(bf16);

impl Bf16 {
    pub fn to_bits(self) -> u16 {
        self.0.to_bits()
    }
}

/// The nearest bf16 value, without a branch.
#[inline(always)]
pub(crate) fn round_to_bf16<T: Real>(x: T) -> T {
    let bits = (x.wide() as f32).to_bits();
    let even = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) & 0xffff_0000;
    if x.is_nan() { x } else { T::of_f32(f32::from_bits(even)) }
}

#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct F16(pub(super) f16);

#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Int8(i8);

/// Stored values, and the scale of each row where the format has one.
#[derive(Clone, Debug)]
pub(crate) struct Cells<T> {
    pub values: Values<T>,
    /// By row; empty unless the values are 8-bit.
    scales: Vec<T>,
}

#[derive(Clone, Debug)]
pub(crate) enum Values<T> {
    Native(Vec<T>),
    Bf16(Vec<Bf16>),
    F16(Vec<F16>),
    Int8(Vec<Int8>),
}

/// Runs one body on whichever vector is inside.
macro_rules! each {
    ($values:expr, $v:ident => $body:expr) => {
        match $values {
            $crate::cpu::cells::Values::Native($v) => $body,
            $crate::cpu::cells::Values::Bf16($v) => $body,
            $crate::cpu::cells::Values::F16($v) => $body,
            $crate::cpu::cells::Values::Int8($v) => $body,
        }
    };
}
pub(crate) use each;

impl<T: Real> Cells<T> {
    /// `RowDtype::F32` keeps the kernel's own type.
    ///
    /// # Panics
    /// If the format codes groups of values, not each.
    pub fn new(dtype: RowDtype) -> Self {
        let values = match dtype {
            RowDtype::F32 => Values::Native(Vec::new()),
            RowDtype::Bf16 => Values::Bf16(Vec::new()),
            RowDtype::F16 => Values::F16(Vec::new()),
            RowDtype::Int8 => Values::Int8(Vec::new()),
            RowDtype::Int4 => unreachable!("4-bit rows are a store of their own"),
        };
        Self { values, scales: Vec::new() }
    }

    /// Of values and of scales.
    pub fn size_bytes(&self) -> [usize; 2] {
        let values = each!(&self.values, v => size_of_val(v.as_slice()));
        [values, size_of_val(self.scales.as_slice())]
    }

    /// Sets the number of values and, where rows have scales, of rows; new ones are zero. Growth by a fraction keeps the
    /// slack small.
    pub fn resize(&mut self, values: usize, rows: usize) {
        each!(&mut self.values, v => {
            if v.capacity() < values {
                v.reserve_exact((values - v.len()).max(v.len() / 8));
            }
            v.resize(values, Default::default());
        });
        if let Values::Int8(_) = self.values {
            self.scales.resize(rows, T::zero());
        }
    }

    /// What row `index` is multiplied by when it is widened.
    #[inline(always)]
    pub fn scale(&self, index: usize) -> T {
        self.scales.get(index).copied().unwrap_or_else(T::one)
    }

    /// Scales by row, if there are any.
    pub fn scales(&self) -> Option<&[T]> {
        matches!(self.values, Values::Int8(_)).then_some(&self.scales)
    }

    /// Chooses the scale of a row that is about to be written; returns what its values are to be multiplied by first.
    pub fn prepare(&mut self, index: usize, row: &[T]) -> T {
        let Values::Int8(_) = self.values else { return T::one() };
        // NaN stays: a row that holds one is not a number.
        let larger = |a: T, b: T| if b > a || b.is_nan() { b } else { a };
        let largest = row.iter().fold(T::zero(), |largest, x| larger(largest, x.abs()));
        self.scales[index] = largest / T::of(127.0);
        if largest > T::zero() { T::of(127.0) / largest } else { T::zero() }
    }

    /// The dtype that stored values are saved in: 8-bit codes as bytes.
    pub fn saved_dtype(&self) -> DType {
        match self.values {
            Values::Native(_) => T::DTYPE,
            Values::Bf16(_) => DType::BF16,
            Values::F16(_) => DType::F16,
            Values::Int8(_) => DType::U8,
        }
    }

    /// The stored values at `places`, as they are, `[rows, width]`.
    pub fn saved(
        &self,
        places: impl Iterator<Item = usize>,
        shape: (usize, usize),
    ) -> Result<Tensor> {
        let cpu = &Device::Cpu;
        Ok(match &self.values {
            Values::Native(v) => Tensor::from_iter(places.map(|at| v[at]), cpu)?,
            Values::Bf16(v) => Tensor::from_iter(places.map(|at| v[at].0), cpu)?,
            Values::F16(v) => Tensor::from_iter(places.map(|at| v[at].0), cpu)?,
            Values::Int8(v) => Tensor::from_iter(places.map(|at| v[at].0 as u8), cpu)?,
        }
        .reshape(shape)?)
    }

    /// Overwrites the values at `places` with those of a tensor that [`saved`](Self::saved) made.
    pub fn restore(&mut self, places: impl Iterator<Item = usize>, saved: &Tensor) -> Result<()> {
        let saved = saved.flatten_all()?;
        match &mut self.values {
            Values::Native(v) => places.zip(saved.to_vec1()?).for_each(|(at, x)| v[at] = x),
            Values::Bf16(v) => places.zip(saved.to_vec1()?).for_each(|(at, x)| v[at] = Bf16(x)),
            Values::F16(v) => places.zip(saved.to_vec1()?).for_each(|(at, x)| v[at] = F16(x)),
            Values::Int8(v) => {
                let codes = saved.to_vec1::<u8>()?;
                places.zip(codes).for_each(|(at, x)| v[at] = Int8(x as i8));
            }
        }
        Ok(())
    }

    /// Overwrites the scales of the first rows.
    pub fn restore_scales(&mut self, scales: &[T]) {
        self.scales[..scales.len()].copy_from_slice(scales);
    }

    /// Gives row `to` the scale of row `from`.
    pub fn move_scale(&mut self, from: usize, to: usize) {
        if let Values::Int8(_) = self.values {
            self.scales[to] = self.scales[from];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sixteen_bit_values_widen_as_they_should() {
        for bits in 0..=u16::MAX {
            let (half, brain) = (f16::from_bits(bits), bf16::from_bits(bits));
            let (a, b): (f32, f32) = (F16(half).widen(), Bf16(brain).widen());
            assert!(a == half.to_f32() || half.is_nan() && a.is_nan(), "{half:?}: {a}");
            assert!(b == brain.to_f32() || brain.is_nan() && b.is_nan(), "{brain:?}: {b}");
            assert_eq!(a.is_sign_negative(), half.is_sign_negative());
            for x in [b, f32::from_bits(b.to_bits() | 0x8000), f32::from_bits(b.to_bits() | 0x7fff)]
            {
                let nearest = bf16::from_f32(x).to_f32();
                assert!(round_to_bf16(x) == nearest || x.is_nan() && round_to_bf16(x).is_nan());
            }
        }
    }

    #[test]
    fn eight_bit_rows_are_within_half_a_step() {
        let row: Vec<f32> = (0..64).map(|i| (i as f32 * 0.7).sin() * 3.0).collect();
        let mut cells = Cells::<f32>::new(RowDtype::Int8);
        cells.resize(64, 1);
        let inverse = cells.prepare(0, &row);
        let step = 3.0 / 127.0;
        for &x in &row {
            let code: Int8 = Cell::<f32>::narrow(x * inverse);
            let back: f32 = Cell::<f32>::widen(code) * cells.scale(0);
            assert!((back - x).abs() <= 0.501 * step, "{x}: {back}");
        }
        assert_eq!(cells.prepare(0, &[0.0; 64]), 0.0, "a row of zeros");
    }
}
