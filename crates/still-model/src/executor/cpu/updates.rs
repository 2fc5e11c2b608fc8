//! Low-rank updates as a decode step reads them.
//!
//! A step's products are a microsecond each, and an update adds to every tile of 16 rows of them. Tensors would be locked once a
//! tile, by all threads, and rows of 8 values leave no vector to sum over. So the updates are copied once, in the order in which a
//! step reads them, so that each is fetched while the one before is in use.

use std::collections::HashMap;
use std::ops::Range;

use candle_core::TensorId;
use still_compute::rows::low_rank::{self, BLOCK, ROWS};
use still_quant::LANES;

use crate::decoder::Lora;
use crate::decoder::ops::with_values;
use crate::error::Result;
use crate::student::Student;

/// The updates of a student, laid out on the first step that meets them.
#[derive(Debug, Default)]
pub(super) struct Updates {
    places: HashMap<Key, Place>,
    values: Values,
}

type Key = (TensorId, TensorId);

fn key(lora: &Lora) -> Key {
    (lora.a.id(), lora.b.id())
}

/// The values of all updates.
#[derive(Debug)]
enum Values {
    /// bf16, where that loses nothing: half as much to read.
    Narrow(Vec<u16>),
    Wide(Vec<f32>),
}

impl Default for Values {
    fn default() -> Self {
        Self::Wide(Vec::new())
    }
}

impl Values {
    fn of(&self, range: Range<usize>) -> low_rank::Values<'_> {
        match self {
            Self::Narrow(values) => low_rank::Values::Bf16(&values[range]),
            Self::Wide(values) => low_rank::Values::F32(&values[range]),
        }
    }
}

/// Where the update `scale · (x Aᵀ) Bᵀ` of one projection lies.
#[derive(Debug)]
struct Place {
    rank: usize,
    scale: f32,
    /// `[rank / 4, in / 16, 4, 16]`; rows and columns past the last are zeros.
    a: Range<usize>,
    /// `B` in tiles of 16 rows, transposed: `[tiles, rank, 16]`. Rows past the last are zeros.
    b: Range<usize>,
}

/// One of the updates.
#[derive(Clone, Copy, Debug)]
pub(super) struct Update<'a> {
    place: &'a Place,
    values: &'a Values,
}

impl Updates {
    /// Holds those of `student`, and no others, afterwards.
    ///
    /// # Errors
    /// Updates that are no f32 matrices on the CPU.
    pub fn prepare(&mut self, student: Option<&Student>) -> Result<()> {
        let layers = student.into_iter().flat_map(|student| &student.layers);
        // Those that one phase adds are side by side.
        let phases = layers.filter_map(|layer| layer.lora.as_ref()).flat_map(|lora| {
            [
                [lora.q.as_ref(), lora.k.as_ref(), lora.v.as_ref(), lora.g.as_ref()],
                [lora.o.as_ref(), None, None, None],
            ]
        });
        let all = phases.clone().flatten().flatten();
        let known = all.clone().all(|lora| self.places.contains_key(&key(lora)));
        if known && all.count() == self.places.len() {
            return Ok(());
        }
        self.places.clear();
        let mut values = Vec::new();
        for phase in phases {
            let mut places = Vec::new();
            for lora in phase.into_iter().flatten() {
                places.push((lora, lay_out_a(lora, &mut values)?));
            }
            for (lora, a) in places {
                let (rank, scale) = (lora.b.dims2()?.1, lora.scale as f32);
                let b = lay_out_b(lora, &mut values)?;
                self.places.insert(key(lora), Place { rank, scale, a, b });
            }
        }
        self.values = if values.iter().all(|value| value.to_bits() << 16 == 0) {
            let narrow = |value: f32| (value.to_bits() >> 16) as u16;
            Values::Narrow(values.into_iter().map(narrow).collect())
        } else {
            Values::Wide(values)
        };
        Ok(())
    }

    /// That of a projection.
    pub fn of(&self, lora: &Lora) -> Option<Update<'_>> {
        let place = self.places.get(&key(lora))?;
        Some(Update { place, values: &self.values })
    }
}

/// Appends `A`.
fn lay_out_a(lora: &Lora, values: &mut Vec<f32>) -> Result<Range<usize>> {
    let (rank, inner) = lora.a.dims2()?;
    let (start, blocks) = (values.len(), inner.div_ceil(LANES));
    values.resize(start + rank.div_ceil(ROWS) * blocks * BLOCK, 0.0);
    let to = &mut values[start..];
    with_values(&lora.a, |a: &[f32]| {
        for (row, a) in a.chunks_exact(inner).enumerate() {
            for (column, &value) in a.iter().enumerate() {
                let block = row / ROWS * blocks + column / LANES;
                to[block * BLOCK + row % ROWS * LANES + column % LANES] = value;
            }
        }
    })?;
    Ok(start..values.len())
}

/// Appends `B`.
fn lay_out_b(lora: &Lora, values: &mut Vec<f32>) -> Result<Range<usize>> {
    let (out, rank) = lora.b.dims2()?;
    let start = values.len();
    values.resize(start + out.next_multiple_of(LANES) * rank, 0.0);
    let to = &mut values[start..];
    with_values(&lora.b, |b: &[f32]| {
        for (row, b) in b.chunks_exact(rank).enumerate() {
            for (column, &value) in b.iter().enumerate() {
                to[(row / LANES * rank + column) * LANES + row % LANES] = value;
            }
        }
    })?;
    Ok(start..values.len())
}

impl Update<'_> {
    /// `scale · x Aᵀ` of `x` `[batch, in]` over what `low` held, `[batch, rank]`, in rows of a multiple of four.
    pub fn low_into(self, x: &[f32], batch: usize, low: &mut Vec<f32>) {
        let Place { rank, scale, a, .. } = self.place;
        low.resize(batch * rank.next_multiple_of(ROWS), f32::NAN);
        low_rank::low_into(self.values.of(a.clone()), *scale, x, batch, low);
    }

    /// Adds the update to some tiles of the projection's products, `[tiles, batch, 16]`; `low` is that of
    /// [`low_into`](Self::low_into).
    pub fn add(self, tiles: Range<usize>, low: &[f32], batch: usize, values: &mut [f32]) {
        let Place { rank, b, .. } = self.place;
        let tile = rank * LANES;
        let b = b.start + tiles.start * tile..b.start + tiles.end * tile;
        low_rank::add(self.values.of(b), *rank, low, batch, values);
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor};
    use still_attention::StillConfig;
    use still_testing::random;

    use super::*;
    use crate::random::tiny_config;
    use crate::student::{LoraConfig, LoraTarget};

    fn tensor(shape: [usize; 2], seed: u64, narrow: bool) -> Tensor {
        let wide = random(&shape, seed).to_dtype(DType::F32).unwrap();
        let stored = if narrow { DType::BF16 } else { DType::F32 };
        wide.to_dtype(stored).unwrap().to_dtype(DType::F32).unwrap()
    }

    fn values(tensor: &Tensor) -> Vec<f64> {
        tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    fn student(seed: u64, narrow: bool) -> Student {
        let model = tiny_config();
        let config = StillConfig::uniform(model.num_hidden_layers, model.geometry(), 8, 2);
        let mut student = Student::init(config, &model, Default::default(), 0).unwrap();
        let targets = LoraTarget::ALL.to_vec();
        student.add_lora(&model, LoraConfig { rank: 6, alpha: 9.0, targets }, 0).unwrap();
        let mut seed = seed;
        let replaced = student.map_tensors(|name, old| {
            seed += 1;
            Ok(match old.dims2() {
                Ok((rows, columns)) if name.contains("lora") => {
                    tensor([rows, columns], seed, narrow)
                }
                _ => old.clone(),
            })
        });
        replaced.unwrap()
    }

    fn check(update: Update<'_>, lora: &Lora) {
        let ((rank, inner), (out, _)) = (lora.a.dims2().unwrap(), lora.b.dims2().unwrap());
        let (a, b) = (values(&lora.a), values(&lora.b));
        for batch in [1, 3] {
            let x = tensor([batch, inner], 3, false);
            let mut low = vec![9.0; 2];
            update.low_into(&x.flatten_all().unwrap().to_vec1::<f32>().unwrap(), batch, &mut low);
            let (x, tiles) = (values(&x), out.div_ceil(LANES));
            for range in [0..tiles, tiles - 1..tiles] {
                let mut got = vec![1.0; range.len() * batch * LANES];
                update.add(range.clone(), &low, batch, &mut got);
                for (n, got) in got.iter().enumerate() {
                    let row = (range.start + n / LANES / batch) * LANES + n % LANES;
                    let x = &x[n / LANES % batch * inner..][..inner];
                    let dot =
                        |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
                    let low: Vec<f64> = a.chunks_exact(inner).map(|a| dot(a, x)).collect();
                    let b = b.chunks_exact(rank).nth(row);
                    let expected = 1.0 + b.map_or(0.0, |b| lora.scale * dot(b, &low));
                    let error = (f64::from(*got) - expected).abs();
                    assert!(error < 2e-5 * expected.abs().max(10.0), "{got} for {expected}");
                }
            }
        }
    }

    #[test]
    fn an_update_is_what_its_matrices_say() {
        for (rank, inner, out) in [(1, 5, 3), (8, 64, 48), (6, 40, 37), (11, 576, 16)] {
            for narrow in [false, true] {
                let (a, b) = (tensor([rank, inner], 1, narrow), tensor([out, rank], 2, narrow));
                let lora = Lora { a, b, scale: 1.5, dropout: None };
                let mut values = vec![0.5; 7];
                let a = lay_out_a(&lora, &mut values).unwrap();
                let b = lay_out_b(&lora, &mut values).unwrap();
                let place = Place { rank, scale: 1.5, a, b };
                check(Update { place: &place, values: &Values::Wide(values) }, &lora);
            }
        }
    }

    #[test]
    fn updates_are_those_of_the_student_at_hand_and_no_others() {
        let mut updates = Updates::default();
        updates.prepare(None).unwrap();
        let mut before = None;
        for (seed, narrow) in [(1, false), (2, true), (3, false)] {
            let student = student(seed * 100, narrow);
            for _ in 0..2 {
                updates.prepare(Some(&student)).unwrap();
                assert_eq!(matches!(updates.values, Values::Narrow(_)), narrow);
            }
            let all = student.layers.iter().map(|layer| layer.lora.as_ref().unwrap());
            for lora in all.flat_map(|lora| [&lora.q, &lora.k, &lora.v, &lora.o]).flatten() {
                check(updates.of(lora).unwrap(), lora);
            }
            let first = student.layers[0].lora.clone().unwrap().q.unwrap();
            if let Some(before) = before.replace(first) {
                assert!(updates.of(&before).is_none(), "it was of another student");
            }
        }
        updates.prepare(None).unwrap();
        assert!(updates.of(&before.unwrap()).is_none());
        let elsewhere = Tensor::zeros((2, 2), DType::F64, &Device::Cpu).unwrap();
        let lora = Lora { a: elsewhere.clone(), b: elsewhere, scale: 1.0, dropout: None };
        assert!(lay_out_a(&lora, &mut Vec::new()).is_err(), "f64 is no dtype of a step");
    }
}
