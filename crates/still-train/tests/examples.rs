//! The examples run.

#[path = "../examples/linearize_layer.rs"]
mod linearize_layer;

#[test]
fn linearize_layer_runs() {
    linearize_layer::main().unwrap();
}
