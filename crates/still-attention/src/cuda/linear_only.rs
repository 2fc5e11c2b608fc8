//! The state of linear attention alone (`linear_only`) on CUDA: `[S | z]` of every head, and nothing else. Of the tensor library's
//! ops.

use candle_core::{DType, Device, DeviceLocation, Tensor};

use super::{repeated, support};
use crate::arguments::checked_lengths;
use crate::attention_state::{check_truncate, without_gate};
use crate::cpu::head_state::HeadState;
use crate::linear_ops::LinearOps;
use crate::{
    AttentionError, AttentionKind, AttentionRows, AttentionState, HeadGeometry, HybridConfig,
    HybridWeights, Mode, Result, RowDtype, SavedState,
};

const OP: &str = "CudaLinearState::advance";

/// Tokens that are read together: what their blocks leave for each other is a state a block.
const PIECE: usize = 4096;

/// Everything that a layer of linear attention alone remembers of a batch of sequences, on a CUDA device.
#[derive(Clone, Debug)]
pub struct CudaLinearState {
    geometry: HeadGeometry,
    config: HybridConfig,
    rows: RowDtype,
    /// `[H, D, F]` and `[S, D, F]` f32, reflections folded in.
    maps: [Tensor; 2],
    dtype: DType,
    /// Tokens fed to each sequence.
    positions: Vec<usize>,
    /// `[B·S, 2F, D + 1]` f32
    state: Tensor,
}

impl CudaLinearState {
    /// An empty state of `batch` sequences, whose rows will be of `dtype` on `device`: f32 or bf16.
    ///
    /// # Errors
    /// Shapes that contradict the configuration; another mode; no sequence; no memory left on the device.
    pub fn new(
        geometry: HeadGeometry,
        config: &HybridConfig,
        weights: &HybridWeights,
        device: &Device,
        dtype: DType,
        batch: usize,
    ) -> Result<Self> {
        config.validate(geometry)?;
        weights.check(geometry, config)?;
        support::check_dtype("the rows of a state", dtype)?;
        support::require(config.mode == Mode::LinearOnly, "mode", "linear_only", || {
            format!("{:?}", config.mode)
        })?;
        if batch == 0 {
            return Err(AttentionError::Config("a state on CUDA has one sequence or more".into()));
        }
        let there = |map: Tensor| map.to_device(device)?.to_dtype(DType::F32)?.contiguous();
        let (map_q, map_k) = weights.folded()?;
        let heads = batch * geometry.selection_heads(config.selection_head);
        let shape = (heads, 2 * config.feature_dim, geometry.head_dim + 1);
        Ok(Self {
            geometry,
            config: config.clone(),
            rows: if dtype == DType::BF16 { RowDtype::Bf16 } else { RowDtype::F32 },
            maps: [there(map_q)?, there(map_k)?],
            dtype,
            positions: vec![0; batch],
            state: Tensor::zeros(shape, DType::F32, device)?,
        })
    }

    /// The same whose saved form says `rows` of the rows that it does not have, as that of the CPU's state does.
    #[must_use]
    pub fn with_rows(self, rows: RowDtype) -> Self {
        Self { rows, ..self }
    }

    /// Selection heads.
    fn heads(&self) -> usize {
        self.geometry.selection_heads(self.config.selection_head)
    }

    /// What the CPU has of a head, empty.
    fn empty_head(&self) -> HeadState<f32> {
        let HybridConfig { cap, .. } = &self.config;
        HeadState::new(self.config.ring_chunk(), self.geometry.head_dim, self.rows, cap.is_some())
    }

    /// Reads `q`, `k` and `v` of one piece; `counts` `[B, 1, T, 1]` u8 says which tokens are there, if not all are.
    fn read(&mut self, [q, k, v]: [&Tensor; 3], counts: Option<&Tensor>) -> Result<Tensor> {
        // What is not there must not be looked at: it may be anything.
        let present = |x: &Tensor| match counts {
            None => x.contiguous(),
            Some(counts) => counts.broadcast_as(x.shape())?.where_cond(x, &x.zeros_like()?),
        };
        let (q, k, v) = (present(q)?, present(k)?, present(v)?);
        let [map_q, map_k] = &self.maps;
        let ops =
            LinearOps { q: &q, k: &k, v: &v, map_q, map_k, map: self.config.feature_map, counts };
        let (out, state, _) = ops.forward(Some(&self.state))?;
        self.state = state;
        Ok(present(&out)?)
    }
}

impl AttentionState for CudaLinearState {
    fn advance(&mut self, rows: AttentionRows<'_>, lengths: Option<&[usize]>) -> Result<Tensor> {
        without_gate(&rows)?;
        let AttentionRows { q, k, v, .. } = rows;
        let (batch, device) = (self.positions.len(), self.state.device().clone());
        support::check_fed(OP, [q, k, v], self.geometry, batch, self.dtype, &device)?;
        let tokens = q.dim(2)?;
        let lengths = checked_lengths(OP, lengths, batch, tokens)?;
        let counts = match lengths.iter().all(|&length| length == tokens) {
            true => None,
            false => {
                let there = |&length: &usize| (0..tokens).map(move |t| u8::from(t < length));
                let there: Vec<u8> = lengths.iter().flat_map(there).collect();
                Some(Tensor::from_vec(there, (batch, 1, tokens, 1), &device)?)
            }
        };
        let copies = self.maps[1].dim(0)? / self.geometry.num_key_value_heads;
        let (q, k, v) = (q.detach(), repeated(k, copies)?, repeated(v, copies)?);
        let mut pieces = Vec::with_capacity(tokens.div_ceil(PIECE));
        for start in (0..tokens).step_by(PIECE) {
            let length = PIECE.min(tokens - start);
            let piece = |x: &Tensor| x.narrow(2, start, length);
            let counts = counts.as_ref().map(piece).transpose()?;
            pieces.push(self.read([&piece(&q)?, &piece(&k)?, &piece(&v)?], counts.as_ref())?);
        }
        for (position, length) in self.positions.iter_mut().zip(lengths) {
            *position += length;
        }
        match pieces.len() {
            1 => Ok(pieces.remove(0)),
            _ => Ok(Tensor::cat(&pieces, 2)?),
        }
    }

    fn kind(&self) -> AttentionKind {
        AttentionKind::Hybrid
    }

    fn location(&self) -> DeviceLocation {
        self.state.device().location()
    }

    fn position(&self, sequence: usize) -> usize {
        self.positions[sequence]
    }

    fn size_bytes(&self) -> usize {
        self.state.elem_count() * size_of::<f32>()
    }

    fn check_truncate(&self, sequence: usize, tokens: usize) -> Result<()> {
        check_truncate(&self.config, self.positions[sequence], tokens)
    }

    fn truncate(&mut self, sequence: usize, tokens: usize) -> Result<()> {
        self.check_truncate(sequence, tokens)?;
        if tokens == 0 {
            let heads = self.heads();
            let own = self.state.narrow(0, sequence * heads, heads)?;
            // Each call makes another tensor, so that a copy may have this one.
            self.state = self.state.slice_scatter(&own.zeros_like()?, 0, sequence * heads)?;
            self.positions[sequence] = 0;
        }
        Ok(())
    }

    fn save(&self) -> Result<SavedState> {
        let d = self.geometry.head_dim;
        let state = self.state.to_device(&Device::Cpu)?;
        let mut saved = SavedState::default();
        for part in 0..self.positions.len() * self.heads() {
            let mut head = self.empty_head();
            head.position = self.positions[part / self.heads()];
            head.count = head.position;
            if head.count > 0 {
                let own = state.get(part)?;
                head.s = own.narrow(1, 0, d)?.flatten_all()?.to_vec1()?;
                head.z = own.narrow(1, d, 1)?.flatten_all()?.to_vec1()?;
            }
            head.save(&mut saved, part)?;
        }
        Ok(saved)
    }

    fn restore(&mut self, mut saved: SavedState) -> Result<()> {
        let (d, heads) = (self.geometry.head_dim, self.heads());
        let features = self.state.dim(1)?;
        let mut states = Vec::with_capacity(self.positions.len() * heads);
        for part in 0..self.positions.len() * heads {
            let mut head = self.empty_head();
            head.restore(&mut saved, part, features)?;
            let position = &mut self.positions[part / heads];
            if part % heads == 0 {
                *position = head.position;
            }
            if *position != head.position || head.count != head.position {
                return Err(AttentionError::Config(format!(
                    "a saved state's part {part} has read {} tokens, {} of them are in it, and the first part has read {position}",
                    head.position, head.count
                )));
            }
            states.push(match head.count {
                0 => Tensor::zeros((features, d + 1), DType::F32, &Device::Cpu)?,
                _ => {
                    let s = Tensor::from_vec(head.s, (features, d), &Device::Cpu)?;
                    let z = Tensor::from_vec(head.z, (features, 1), &Device::Cpu)?;
                    Tensor::cat(&[s, z], 1)?
                }
            });
        }
        saved.check_all_taken()?;
        self.state = Tensor::stack(&states, 0)?.to_device(self.state.device())?;
        Ok(())
    }

    fn boxed_clone(&self) -> Box<dyn AttentionState> {
        // The tensor is not written to: each call makes another.
        Box::new(self.clone())
    }
}
