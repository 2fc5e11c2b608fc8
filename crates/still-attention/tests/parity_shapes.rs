//! The operator on the CPU, by the same bodies as on a GPU (`cuda`).

mod common;
#[path = "common/shapes.rs"]
mod shapes;

use candle_core::{DType, Device};

#[test]
fn forward_and_selection() {
    shapes::forward_and_selection(&Device::Cpu, DType::F32);
}

#[test]
fn gradients() {
    shapes::gradients_of_all(&Device::Cpu, DType::F32);
}

#[test]
fn a_cap() {
    shapes::a_cap(&Device::Cpu, DType::F32);
}

#[test]
fn ties_under_a_cap_go_to_the_earlier() {
    shapes::ties_under_a_cap_go_to_the_earlier(&Device::Cpu);
}

#[test]
fn variants() {
    shapes::variants(&Device::Cpu, DType::F32);
}

#[test]
fn strides_and_gradients_change_nothing() {
    shapes::strides_and_gradients_change_nothing(&Device::Cpu, DType::F32);
}

#[test]
fn a_batch_equals_each_sequence_alone() {
    shapes::a_batch_equals_each_sequence_alone(&Device::Cpu, DType::F32);
}
