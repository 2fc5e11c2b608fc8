//! Every attention that a configuration can say, on the CPU, by the same bodies as on a GPU (`cuda_variants`).

mod common;
#[path = "common/variants.rs"]
mod variants;

use candle_core::{DType, Device};
use common::tensors;
use still_attention::{
    AttentionState, HeadGeometry, HybridConfig, HybridState, PreparedWeights, RowDtype, naive,
};

/// One of those of a GPU: a CPU has no kernel for a head dimension.
const GEOMETRIES: &[HeadGeometry] = &[variants::GEOMETRIES[0]];

#[test]
fn whole_sequences() {
    variants::whole_sequences(GEOMETRIES, DType::F32, &Device::Cpu);
}

#[test]
fn gradients_of_whole_sequences() {
    variants::gradients_of_whole_sequences(GEOMETRIES, DType::F32, &Device::Cpu);
}

#[test]
fn a_state_in_pieces() {
    let make = |config: &HybridConfig, input: &naive::Input, _, batch| {
        let weights = tensors(input, config, |x| x as f32).weights;
        let weights = PreparedWeights::new(input.geometry, config, &weights).unwrap();
        let state = HybridState::new(weights, batch, RowDtype::F32);
        Box::new(state) as Box<dyn AttentionState>
    };
    variants::a_state_in_pieces(GEOMETRIES, DType::F32, &make, &Device::Cpu);
}
