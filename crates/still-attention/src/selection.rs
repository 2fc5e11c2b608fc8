//! Which tokens are salient, and until when.

use crate::{AttentionError, HybridConfig, Mode, Result};

/// The routing of a whole batch: when each token enters the linear state.
///
/// Token `j` of chunk `c(j)` is exact for queries of chunks `c(j)` and `c(j)+1` (the window), then
/// salient for queries of chunks `c(j)+2 … absorbed_at−1`, and part of the linear state from chunk
/// `absorbed_at` on. One number per token says it all, demotions included.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selection {
    /// Chunk length in tokens.
    pub chunk: usize,
    /// Sequences.
    pub batch: usize,
    /// Selection heads.
    pub heads: usize,
    /// Tokens (padding included).
    pub tokens: usize,
    /// `[batch, heads, tokens]`; [`Selection::NEVER`] if the token stays exact.
    pub absorbed_at: Vec<u32>,
}

impl Selection {
    /// The token never enters the state within this sequence.
    pub const NEVER: u32 = u32::MAX;

    /// The row of one sequence and selection head, `[tokens]`.
    pub fn row(&self, sequence: usize, head: usize) -> &[u32] {
        let start = (sequence * self.heads + head) * self.tokens;
        &self.absorbed_at[start..start + self.tokens]
    }

    /// Whether token `token` is in the salient set while queries of chunk `chunk` are answered.
    pub fn is_salient(&self, sequence: usize, head: usize, chunk: usize, token: usize) -> bool {
        let absorbed_at = self.row(sequence, head)[token] as usize;
        token / self.chunk + 2 <= chunk && chunk < absorbed_at
    }

    /// Checks a selection that was given against what it is given for.
    pub(crate) fn check(
        &self,
        (batch, heads, tokens): (usize, usize, usize),
        config: &HybridConfig,
    ) -> Result<()> {
        let expected = (batch, heads, tokens, config.chunk);
        if (self.batch, self.heads, self.tokens, self.chunk) != expected {
            return Err(AttentionError::Config(format!(
                "the given selection is for {}x{}x{} tokens in chunks of {}, expected {expected:?}",
                self.batch, self.heads, self.tokens, self.chunk
            )));
        }
        let at_once = |(i, &at): (usize, &u32)| at as usize == i % tokens / config.chunk;
        if config.mode == Mode::LinearOnly && !self.absorbed_at.iter().enumerate().all(at_once) {
            return Err(AttentionError::Config(
                "linear_only absorbs every token at once: no other selection can be given".into(),
            ));
        }
        Ok(())
    }
}
