//! The example runs.

#[path = "../examples/own_router.rs"]
mod own_router;

#[test]
fn own_router_runs() {
    own_router::main().unwrap();
}
