//! CPU kernels: plain loops and small matrix products, threads over (sequence, selection head).
//!
//! | file | content |
//! |---|---|
//! | `operator` | whole sequences, forward and backward: threads over (sequence, selection head) |
//! | `head_input` | what one selection head is fed in one call |
//! | `gradients` | where the gradients of one selection head go |
//! | `call` | what a call may be asked to tell, and the memory that it works in |
//! | `saved_attention`, `host_rows` | the same on tensors, and on memory that a caller lends |
//! | `learned` | what a layer has learned, as the kernels read it |
//! | `forward` | one selection head, chunk by chunk: training, prefill and decoding |
//! | `whole_head` | whole sequences of a head that keeps every token: its chunks side by side |
//! | `head_state` | its state |
//! | `retirement` | a chunk's tokens: which stay exact, the linear state with the others |
//! | `recall` | the score of the router `self_recall` |
//! | `query_rows` | queries of a segment: all that they attend to, in a few matrix products |
//! | `visible_keys` | the keys that they see: as they are stored, or upcast |
//! | `row_weights` | softmax of one query over its window, and the token's score |
//! | `pieces` | the salient keys of a single token, a piece a thread |
//! | `panels`, `panels_x86`, `panels_avx2` | many queries with keys of a tile at a time, on AVX-512 and, in f32, on AVX2 |
//! | `feature_map` | rows of the feature map and their gradients |
//! | `linear_only` | linear attention alone |
//! | `sliding` | attention to a window of the last tokens |
//! | `backward`, `query_rows_backward`, `linear_only_backward` | gradients of the files of these names |
//! | `store`, `cells` | stored rows: layout, saving, and how each type is coded |
//! | `four_bit` | stored rows in 4 bits a value, with their kernels |
//! | `channel_codes` | keys of heads that keep every token in 4 bits a value, by channel |
//! | `key_store`, `rows` | what is computed with stored keys, and with stored values |
//! | `weighted_sum` | products of a small batch with stored rows |

pub(crate) mod backward;
pub(crate) mod call;
pub(crate) mod cells;
pub(crate) mod channel_codes;
pub(crate) mod feature_map;
pub(crate) mod forward;
mod four_bit;
mod gradients;
pub(crate) mod head_input;
pub(crate) mod head_state;
mod host_rows;
pub(crate) mod key_store;
mod learned;
pub(crate) mod linear_only;
pub(crate) mod linear_only_backward;
pub(crate) mod operator;
pub(crate) mod panels;
pub(crate) mod pieces;
pub(crate) mod query_rows;
pub(crate) mod query_rows_backward;
pub(crate) mod recall;
pub(crate) mod retirement;
mod row_weights;
pub(crate) mod rows;
mod saved_attention;
pub(crate) mod sliding;
mod store;
mod visible_keys;
pub(crate) mod weighted_sum;
mod whole_head;

pub use host_rows::{HostRows, attention_into};
pub(crate) use saved_attention::SavedAttention;
