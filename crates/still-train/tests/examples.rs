//! The examples run.

#[path = "../examples/linearize_layer.rs"]
mod linearize_layer;
#[path = "../examples/resume_run.rs"]
mod resume_run;

#[test]
fn linearize_layer_runs() {
    linearize_layer::main().unwrap();
}

#[test]
fn resume_run_runs() {
    resume_run::main().unwrap();
}
