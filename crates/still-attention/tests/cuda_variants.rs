//! Every attention that a configuration can say, on a CUDA GPU: the bodies of `variants`, which the CPU runs too
//! (`parity_variants`).
//!
//! Needs a GPU, and fails without one: it is built only where the feature `cuda` asks for it.

mod common;
#[path = "common/variants.rs"]
mod variants;

use candle_core::DType;
use common::gpu::gpu;
use common::tensors;
use still_attention::{
    AttentionState, CudaHybridState, CudaLinearState, CudaWeights, HybridConfig, Mode, naive,
};
use variants::GEOMETRIES;

#[test]
fn whole_sequences() {
    for dtype in [DType::F32, DType::BF16] {
        variants::whole_sequences(&GEOMETRIES, dtype, &gpu());
    }
}

#[test]
fn gradients_of_whole_sequences() {
    for dtype in [DType::F32, DType::BF16] {
        variants::gradients_of_whole_sequences(&GEOMETRIES, dtype, &gpu());
    }
}

#[test]
fn a_state_in_pieces() {
    let device = gpu();
    let make = |config: &HybridConfig, input: &naive::Input, dtype, batch| {
        let geometry = input.geometry;
        let weights = tensors(input, config, |x| x as f32).weights;
        let state: Box<dyn AttentionState> = if config.mode == Mode::LinearOnly {
            let state = CudaLinearState::new(geometry, config, &weights, &device, dtype, batch);
            Box::new(state.unwrap())
        } else {
            let weights = CudaWeights::new(geometry, config, &weights, &device, dtype).unwrap();
            Box::new(CudaHybridState::new(weights, batch).unwrap())
        };
        state
    };
    for dtype in [DType::F32, DType::BF16] {
        variants::a_state_in_pieces(&GEOMETRIES, dtype, &make, &device);
    }
}
