//! The gradients of linear attention alone, written out.

use candle_core::{Result, Tensor};

use super::{MIN_DENOMINATOR, SavedLinear};

/// Gradients of rows `[B, H or S, N, D]`, in their dtype, and of the maps `[H, D, F]` and `[S, D, F]`.
pub(crate) struct LinearGradients {
    /// If they are wanted.
    pub qkv: Option<[Tensor; 3]>,
    pub map_q: Tensor,
    pub map_k: Tensor,
}

impl SavedLinear {
    /// From the output's gradient `[B, H, N, D]`. That of the state is not asked for.
    ///
    /// # Errors
    /// An error of the tensor library.
    pub fn backward(&self, d_out: &Tensor, wants_rows: bool) -> Result<LinearGradients> {
        let Self { blocks, phi_q, phi_k, with_one, found, products, mask, earlier, .. } = self;
        let transposed = |x: &Tensor| x.transpose(1, 2)?.contiguous();
        let d_terms = self.terms_gradient(&blocks.cut(&d_out.to_dtype(phi_q.dtype())?)?)?;

        // Queries, by the state that they find and by the products of their block.
        let d_products = blocks.causal(&d_terms.matmul(&transposed(with_one)?)?, mask)?;
        let d_phi_q = (d_terms.matmul(&transposed(found)?)? + d_products.matmul(phi_k)?)?;
        // What a block adds is found by all later ones.
        let d_found = transposed(phi_q)?.matmul(&d_terms)?;
        let d_added = blocks.sums(&transposed(earlier)?, &d_found)?;
        let d_phi_k = transposed(&d_products)?.matmul(phi_q)?;
        let d_phi_k = blocks.joined(&(d_phi_k + with_one.matmul(&transposed(&d_added)?)?)?)?;
        let d_phi_k = match &self.counts {
            Some(counts) => d_phi_k.broadcast_mul(counts)?,
            None => d_phi_k,
        };

        let (map_q, d_q) = self.q.backward(&blocks.joined(&d_phi_q)?, wants_rows)?;
        let (map_k, d_k) = self.k.backward(&d_phi_k, wants_rows)?;
        let (Some(d_q), Some(d_k)) = (d_q, d_k) else {
            return Ok(LinearGradients { qkv: None, map_q, map_k });
        };
        let d_v = (transposed(products)?.matmul(&d_terms)? + phi_k.matmul(&d_added)?)?;
        let d_v = blocks.joined(&d_v)?.narrow(3, 0, self.out.dim(2)?)?;
        let as_rows = |x: Tensor| x.to_dtype(self.rows)?.contiguous();
        Ok(LinearGradients {
            qkv: Some([as_rows(d_q)?, as_rows(d_k)?, as_rows(d_v)?]),
            map_q,
            map_k,
        })
    }

    /// The gradient of numerators and denominator, `[all, group · block, D + 1]`: of `o = num / den` they are `d_o / den` and
    /// `−(d_o · o) / den`, 0 where `den` is bounded.
    fn terms_gradient(&self, d_out: &Tensor) -> Result<Tensor> {
        let d = self.out.dim(2)?;
        let raw = self.terms.narrow(2, d, 1)?;
        let d_num = d_out.broadcast_div(&raw.maximum(MIN_DENOMINATOR)?)?;
        let free = raw.ge(MIN_DENOMINATOR)?.to_dtype(d_out.dtype())?;
        let d_den = ((&d_num * &self.out)?.sum_keepdim(2)?.neg()? * free)?;
        Tensor::cat(&[d_num, d_den], 2)
    }
}
