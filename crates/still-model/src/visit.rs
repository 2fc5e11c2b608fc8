//! All layers of a decoder, one after another, with an attention that the caller computes.

use candle_core::Tensor;

use crate::decoder::{AttentionInputs, Decoder, DecoderLayer, Rotation, StudentLayer};
use crate::error::{ModelError, Result};
use crate::student::Student;

/// Rows that an output projection and an MLP are computed for at a time: their hidden layer is what a long sequence would
/// take most memory for.
const BLOCK: usize = 16 * 1024;

impl Decoder {
    /// Sends activations `x` `[B, N, E]` through all layers, bottom first, and returns them before the final norm.
    ///
    /// `attend(n, layer, inputs)` gives the attention of layer `n`, `[B, H, N, D]`. It may look at whatever it likes on the way;
    /// its error ends the visit. `student` brings its low-rank updates and output gates.
    ///
    /// # Errors
    /// Shapes or dtypes that do not fit; an error of `attend`.
    pub fn visit_layers<E: From<ModelError>>(
        &self,
        mut x: Tensor,
        rotation: &Rotation,
        student: Option<&Student>,
        mut attend: impl FnMut(usize, &DecoderLayer, &AttentionInputs) -> std::result::Result<Tensor, E>,
    ) -> std::result::Result<Tensor, E> {
        for (n, layer) in self.layers.iter().enumerate() {
            let student = student.and_then(|student| student.layer(n));
            let inputs = layer.attention_inputs(&x, rotation, student)?;
            let attention = attend(n, layer, &inputs)?;
            x = output_in_blocks(layer, &x, &attention, student)?;
        }
        Ok(x)
    }
}

/// [`DecoderLayer::layer_output`] of as many tokens at a time as take little memory.
fn output_in_blocks(
    layer: &DecoderLayer,
    x: &Tensor,
    attention: &Tensor,
    student: Option<&StudentLayer>,
) -> Result<Tensor> {
    let (batch, tokens, _) = x.dims3()?;
    let block = (BLOCK / batch.max(1)).max(1);
    if tokens <= block {
        return layer.layer_output(x, attention, student);
    }
    let blocks = (0..tokens).step_by(block).map(|start| {
        let length = block.min(tokens - start);
        let x = x.narrow(1, start, length)?.contiguous()?;
        layer.layer_output(&x, &attention.narrow(2, start, length)?.contiguous()?, student)
    });
    Ok(Tensor::cat(&blocks.collect::<Result<Vec<_>>>()?, 1)?)
}
