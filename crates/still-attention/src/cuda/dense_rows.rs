//! Keys and values of every token as a dense cache keeps them: as they come, or as codes and the words that scale those.

use std::ops::Deref;
use std::ptr::null_mut;

use candle_core::{DType, Device, Layout, Storage, Tensor};
use still_compute::cuda::{Launch, on_cuda};
use still_kernels::dense::{DenseCache, DenseSequence};
use still_kernels::{Rows, STILL_PLAIN};

use super::saved_rows::{DeviceRows, bytes};
use super::store::Coding;
use crate::{AttentionError, Result, SavedState};

/// The names of keys and values in a saved state.
const SIDES: [&str; 2] = ["k", "v"];

/// Room for equally many tokens of every sequence. A copy is of the same memory.
#[derive(Clone, Debug)]
pub(super) struct DenseRows {
    coding: Coding,
    /// K and V: `[B, K, room, D]` as they come, or their codes, `[B, K, room, bytes]` u8. Zeros where nothing is yet.
    values: [Tensor; 2],
    /// Of codes: `[B, K, room, words]` u32 each.
    words: Option<[Tensor; 2]>,
}

/// The memory of [`DenseRows`] while kernels are queued: guards `G` of it.
pub(super) struct HeldRows<'a, G> {
    kind: i32,
    values: [(G, &'a Layout); 2],
    words: Option<[(G, &'a Layout); 2]>,
}

impl DenseRows {
    /// Of `[batch, heads]` heads, whose rows come in `dtype`.
    pub fn new(
        coding: Coding,
        dtype: DType,
        [batch, heads, room]: [usize; 3],
        device: &Device,
    ) -> Result<Self> {
        let zeros = |width, dtype| {
            let side = || Tensor::zeros((batch, heads, room, width), dtype, device);
            Ok::<_, AttentionError>([side()?, side()?])
        };
        let (values, words) = match coding.kind {
            STILL_PLAIN => (zeros(coding.width, dtype)?, None),
            _ => {
                let words = zeros(coding.scale_words(), DType::U32)?;
                (zeros(coding.value_bytes, DType::U8)?, Some(words))
            }
        };
        Ok(Self { coding, values, words })
    }

    /// The same rows with room for more.
    pub fn grown(&self, room: usize) -> Result<Self> {
        let (batch, heads, ..) = self.values[0].dims4()?;
        let dtype = self.values[0].dtype();
        let grown = Self::new(self.coding, dtype, [batch, heads, room], self.device())?;
        for (to, from) in grown.tensors().zip(self.tensors()) {
            to.slice_set(from, 2, 0)?;
        }
        Ok(grown)
    }

    /// The same in memory of its own.
    pub fn copy(&self) -> candle_core::Result<Self> {
        let both = |[k, v]: &[Tensor; 2]| Ok::<_, candle_core::Error>([k.copy()?, v.copy()?]);
        let words = self.words.as_ref().map(both).transpose()?;
        Ok(Self { coding: self.coding, values: both(&self.values)?, words })
    }

    pub fn device(&self) -> &Device {
        self.values[0].device()
    }

    /// Tokens of a sequence that there is room for.
    pub fn room(&self) -> Result<usize> {
        Ok(self.values[0].dim(2)?)
    }

    /// The rows, unless they are codes.
    pub fn plain(&self) -> Option<&[Tensor; 2]> {
        self.words.is_none().then_some(&self.values)
    }

    pub fn size_bytes(&self) -> usize {
        self.tensors().map(|x| x.elem_count() * x.dtype().size_in_bytes()).sum()
    }

    fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        self.values.iter().chain(self.words.iter().flatten())
    }

    pub fn held(&self) -> HeldRows<'_, impl Deref<Target = Storage>> {
        HeldRows {
            kind: self.coding.kind,
            values: self.values.each_ref().map(Tensor::storage_and_layout),
            words: self.words.as_ref().map(|w| w.each_ref().map(Tensor::storage_and_layout)),
        }
    }

    /// Puts the first `tokens` rows of a sequence's heads among a state's tensors, as parts `first..`.
    pub fn save(
        &self,
        sequence: usize,
        tokens: usize,
        state: &mut SavedState,
        first: usize,
    ) -> Result<()> {
        let own = |x: &Tensor| {
            let own = x.get(sequence)?.narrow(1, 0, tokens)?.contiguous()?;
            own.to_device(&Device::Cpu)
        };
        for (side, name) in SIDES.into_iter().enumerate() {
            let values = own(&self.values[side])?;
            let words = self.words.as_ref().map(|words| own(&words[side])).transpose()?;
            for head in 0..values.dim(0)? {
                let values = values.get(head)?.force_contiguous()?;
                let Some(words) = &words else {
                    state.put(first + head, name, values);
                    continue;
                };
                let (values, scales) = (bytes(&values)?, bytes(&words.get(head)?)?);
                let rows = DeviceRows { values: &values[..], scales: &scales[..] };
                self.coding.save(&rows, state, first + head, name)?;
            }
        }
        Ok(())
    }

    /// Takes `tokens` rows, one or more, of a sequence's heads back.
    pub fn restore(
        &self,
        sequence: usize,
        tokens: usize,
        state: &mut SavedState,
        first: usize,
    ) -> Result<()> {
        let (_, heads, ..) = self.values[0].dims4()?;
        let (Coding { width, value_bytes, .. }, cpu) = (self.coding, &Device::Cpu);
        for (side, name) in SIDES.into_iter().enumerate() {
            let to = &self.values[side];
            let set = |to: &Tensor, own: Tensor| {
                let own = own.unsqueeze(0)?.to_device(to.device())?;
                to.narrow(0, sequence, 1)?.slice_set(&own, 2, 0)
            };
            let Some(words) = &self.words else {
                let shape = [Some(tokens), Some(width)];
                let heads = first..first + heads;
                let heads = heads.map(|part| state.take(part, name, to.dtype(), &shape));
                set(to, Tensor::stack(&heads.collect::<Result<Vec<_>>>()?, 0)?)?;
                continue;
            };
            let count = self.coding.scale_words();
            let mut values = vec![0; heads * tokens * value_bytes];
            let mut scales = vec![0; heads * tokens * count * size_of::<u32>()];
            let parts = values.chunks_exact_mut(tokens * value_bytes);
            let parts = parts.zip(scales.chunks_exact_mut(tokens * count * size_of::<u32>()));
            for (head, (values, scales)) in parts.enumerate() {
                let mut rows = DeviceRows { values, scales };
                self.coding.restore(state, (first + head, name), tokens, &mut rows)?;
            }
            set(to, Tensor::from_vec(values, (heads, tokens, value_bytes), cpu)?)?;
            let scales =
                Tensor::from_raw_buffer(&scales, DType::U32, &[heads, tokens, count], cpu)?;
            set(&words[side], scales)?;
        }
        Ok(())
    }
}

/// What [`DenseRows::save`] puts where a sequence of so many heads has no token yet.
pub(super) fn save_nothing(
    coding: Coding,
    heads: usize,
    state: &mut SavedState,
    first: usize,
) -> Result<()> {
    let nothing = DeviceRows { values: &[][..], scales: &[][..] };
    parts(first, heads).try_for_each(|(part, name)| coding.save(&nothing, state, part, name))
}

/// Takes back what [`save_nothing`] has put.
pub(super) fn restore_nothing(
    coding: Coding,
    heads: usize,
    state: &mut SavedState,
    first: usize,
) -> Result<()> {
    let mut nothing = DeviceRows { values: &mut [][..], scales: &mut [][..] };
    parts(first, heads).try_for_each(|at| coding.restore(state, at, 0, &mut nothing))
}

/// Keys and values of heads from part `first` on.
fn parts(first: usize, heads: usize) -> impl Iterator<Item = (usize, &'static str)> {
    (first..first + heads).flat_map(|part| SIDES.map(|name| (part, name)))
}

impl<G: Deref<Target = Storage>> HeldRows<'_, G> {
    /// As kernels take them.
    pub fn args<'a>(&'a self, launch: &mut Launch<'a>) -> candle_core::Result<DenseCache> {
        let [k, v] = &self.values;
        let (k, v) = (launch.rows(on_cuda(&k.0)?, k.1)?, launch.rows(on_cuda(&v.0)?, v.1)?);
        let [k_words, v_words] = match &self.words {
            Some([k, v]) => {
                [launch.values(on_cuda(&k.0)?, k.1)?, launch.values(on_cuda(&v.0)?, v.1)?]
            }
            None => [null_mut(); 2],
        };
        Ok(DenseCache { k, v, k_words, v_words, coding: self.kind })
    }

    /// Those of one sequence, as a table has them.
    pub fn entry<'a>(&'a self, launch: &mut Launch<'a>) -> candle_core::Result<DenseSequence> {
        let DenseCache { k, v, k_words, v_words, .. } = self.args(launch)?;
        Ok(DenseSequence { k: k.data, v: v.data, k_words, v_words, head: k.head })
    }
}

/// The cache of a step whose sequences have one each.
pub(super) fn in_table(coding: i32) -> DenseCache {
    DenseCache { k: Rows::NONE, v: Rows::NONE, k_words: null_mut(), v_words: null_mut(), coding }
}
