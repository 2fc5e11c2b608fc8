//! What each branch of a student carries, layer by layer, over a text.

use still_attention::{BranchShares, branch_shares, hybrid_attention};
use still_model::Model;

use crate::error::{EvalError, Result};

/// Shares of every layer's query heads, `[layer][query head]` (none of a layer that keeps its attention to a sliding window), over one text of at least three chunks.
///
/// `progress` is told of each layer that is done.
///
/// # Errors
/// A model without hybrid attention, a text that is too short, or an error of the model.
pub fn branch_shares_of(
    model: &Model,
    tokens: &[u32],
    progress: &dyn Fn(),
) -> Result<Vec<Vec<BranchShares>>> {
    let Some(student) = &model.student else {
        return Err(EvalError::Argument("a teacher has no branches: give a student".into()));
    };
    let needed = 2 * student.config.chunk + 1;
    if tokens.len() < needed {
        return Err(EvalError::TooShort {
            what: "a look at the branches",
            needed,
            got: tokens.len(),
        });
    }
    let decoder = &model.decoder;
    let rotation = decoder.rotation(0, tokens.len())?;
    let mut shares = Vec::with_capacity(decoder.layers.len());
    let (x, students) = (decoder.embed(tokens)?, Some(student));
    decoder.visit_layers(x, &rotation, students, |n, layer, inputs| {
        let Some(learned) = student.layer(n) else {
            shares.push(Vec::new());
            progress();
            return Ok(layer.softmax_attention(inputs)?);
        };
        let (q, k, v) = (&inputs.q, &inputs.k, &inputs.v);
        let (weights, config) = (&learned.attention, &learned.config);
        let done = hybrid_attention(q, k, v, weights, inputs.gate.as_ref(), config, None)
            .map_err(still_model::ModelError::from)?;
        let of_layer = done
            .routing
            .selection()
            .and_then(|selection| branch_shares((q, k, v), weights, config, &selection))
            .map_err(still_model::ModelError::from)?;
        shares.push(of_layer);
        progress();
        Ok::<_, EvalError>(done.out)
    })?;
    Ok(shares)
}
