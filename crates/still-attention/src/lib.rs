#![doc = include_str!("../README.md")]
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

mod arguments;
mod attention_state;
mod config;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod dense;
mod error;
mod feature_map;
mod hybrid;
#[cfg(any(test, feature = "cuda"))]
mod linear_branch;
pub mod naive;
pub mod router;
mod routing;
mod saved_attention;
mod saved_state;
mod selection;
mod shares;
mod size;
mod sliding;
mod sliding_cache;
mod state;
mod weights;

pub use attention_state::{AttentionKind, AttentionRows, AttentionState, HostState};
pub use config::{
    Branches, FeatureMap, HeadGeometry, HybridConfig, LinearNorm, MAX_CAP, MAX_CHUNK,
    MAX_FEATURE_DIM, Mode, Router, RowDtype, SelectionHead, StillConfig,
};
#[cfg(feature = "cuda")]
pub use cuda::{CudaHybridState, CudaKvCache, CudaWeights};
pub use dense::{DenseHead, KvCache, dense_attention};
pub use error::{AttentionError, Result};
pub use feature_map::fold_householder;
pub use hybrid::{HybridOutput, hybrid_attention};
pub use routing::Routing;
pub use saved_attention::{AttentionGradients, SavedAttention, attention_forward};
pub use saved_state::SavedState;
pub use selection::Selection;
pub use shares::{BranchShares, branch_shares};
pub use size::HeadSize;
pub use sliding::{sliding_attention, sliding_attention_backward};
pub use sliding_cache::SlidingKvCache;
pub use state::{HeadRows, HeadScratch, HybridHead, HybridState, LinearState, PreparedWeights};
pub use weights::HybridWeights;
