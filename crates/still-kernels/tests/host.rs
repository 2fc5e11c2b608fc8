//! What the interface answers without a GPU: the library links, shapes are judged, scratch is sized.
#![cfg(feature = "cuda")]

use still_kernels::{self as ffi, Shape};

fn shape(tokens: i32, head_dim: i32) -> Shape {
    Shape { batch: 1, heads: 32, kv_heads: 8, tokens, head_dim, dtype: ffi::STILL_BF16, flags: 0 }
}

#[test]
fn scratch_grows_with_the_sequence_and_the_budgets() {
    let bytes = |tokens, budget: i32| {
        let budgets = [budget; 8];
        unsafe { ffi::still_backward_bytes(&shape(tokens, 128), budgets.as_ptr()) }
    };
    assert!(bytes(1, 4) > 0);
    assert!(bytes(8192, 4) > bytes(4096, 4));
    assert!(bytes(8192, 64) > bytes(8192, 4));
}

#[test]
fn a_shape_without_a_kernel_is_refused() {
    let budgets = [4; 8];
    assert_eq!(unsafe { ffi::still_backward_bytes(&shape(512, 80), budgets.as_ptr()) }, -1);
    let rows = ffi::Rows { data: std::ptr::null_mut(), batch: 0, head: 0, token: 0 };
    let code = unsafe {
        ffi::still_saliency(&shape(512, 80), rows, rows, std::ptr::null_mut(), std::ptr::null_mut())
    };
    let error =
        still_kernels::check("still_saliency", code).expect_err("head_dim 80 has no kernel");
    assert!(error.to_string().contains("head dimensions 64, 80, 96 and 128"), "{error}");
}

#[test]
fn the_scan_has_a_segment_at_least() {
    assert_eq!(unsafe { ffi::still_segments(&shape(1, 128)) }, 1);
    assert!(unsafe { ffi::still_segments(&shape(8192, 128)) } > 1);
}
