#![doc = include_str!("../README.md")]
//!
//! # Files
//!
//! | file | content |
//! |---|---|
//! | `config` | the configuration of a layer: router, budgets, feature map, branches, row dtypes |
//! | `key_exponents` | powers of two by which the channels of coded keys are scaled |
//! | `weights` | learned tensors of a layer |
//! | `hybrid` | `hybrid_attention`: whole sequences, in the tensor library's graph |
//! | `output` | the output of a call |
//! | `saved_attention` | the operator forward and backward without a graph, on both devices |
//! | `attention_state` | the trait of a layer's state: advance, size, clone, cut back, save |
//! | `state` | the recurrent state on the CPU |
//! | `dense` | softmax attention and its cache: the teacher's |
//! | `sliding`, `sliding_cache` | attention to a window of the last tokens, and its cache: layers that a student keeps |
//! | `router` | scores and selection of a retiring chunk |
//! | `routing` | the routing of one call |
//! | `selection` | which tokens are salient, and until when |
//! | `feature_map` | reflections folded into the map's matrix |
//! | `limits` | what CUDA refuses |
//! | `linear_ops` | linear attention alone, as tensor ops |
//! | `shares` | the share of each branch in an output |
//! | `size` | bytes of a state, computed from shapes |
//! | `saved_state` | a state as named tensors |
//! | `arguments` | checks of device, dtype and shape |
//! | `error` | errors of the operator |
//! | `naive` | the float64 twin |
//! | `cpu` | kernels on slices |
//! | `cuda` | kernels of `still-kernels`, queued |
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
mod key_exponents;
#[cfg(any(test, feature = "cuda"))]
mod limits;
#[cfg(any(test, feature = "cuda"))]
mod linear_ops;
pub mod naive;
mod output;
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
pub use cpu::{HostRows, attention_into};
#[cfg(feature = "cuda")]
pub use cuda::{
    CudaHybridState, CudaKvCache, CudaLinearState, CudaWeights, DeviceAttention, DeviceGradients,
    DeviceMaps, DeviceOperands, DeviceRows, DeviceSizes, GraphState, GraphStep, IDLE,
    OperandShapes, StepRotation, StepTable, TableState, check_shapes,
};
pub use dense::{DenseHead, KvCache, dense_attention};
pub use error::{AttentionError, Result};
pub use feature_map::fold_householder;
pub use hybrid::hybrid_attention;
pub use key_exponents::{KeyExponents, MAX_KEY_EXPONENT};
pub use output::HybridOutput;
pub use routing::Routing;
pub use saved_attention::{AttentionGradients, SavedAttention, attention_forward};
pub use saved_state::SavedState;
pub use selection::Selection;
pub use shares::{BranchShares, branch_shares};
pub use size::{HeadSize, StateBytes};
pub use sliding::{sliding_attention, sliding_attention_backward};
pub use sliding_cache::SlidingKvCache;
pub use state::{HeadRows, HeadScratch, HybridHead, HybridState, LinearState, PreparedWeights};
pub use weights::HybridWeights;
