//! CPU kernels: plain loops and small matrix products, threads over (sequence, selection head).

pub(crate) mod backward;
pub(crate) mod call;
pub(crate) mod cells;
pub(crate) mod feature_map;
pub(crate) mod forward;
mod gradients;
pub(crate) mod head_input;
pub(crate) mod head_state;
pub(crate) mod key_store;
pub(crate) mod linear_only;
pub(crate) mod linear_only_backward;
pub(crate) mod operator;
pub(crate) mod paired_keys;
pub(crate) mod query_rows;
pub(crate) mod query_rows_backward;
pub(crate) mod recall;
pub(crate) mod retirement;
mod row_weights;
pub(crate) mod rows;
mod saved_attention;
pub(crate) mod saved_rows;
pub(crate) mod sliding;
mod visible_keys;
pub(crate) mod weighted_sum;

pub(crate) use saved_attention::SavedAttention;
