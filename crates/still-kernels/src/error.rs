//! What the kernels' status codes mean.

use std::ffi::{CStr, c_char, c_int};

unsafe extern "C" {
    fn cudaGetErrorString(code: c_int) -> *const c_char;
}

/// `cudaErrorInvalidValue`: how a launcher says that it has no kernel for a shape.
const INVALID_VALUE: c_int = 1;
/// `cudaErrorMemoryAllocation`.
const OUT_OF_MEMORY: c_int = 2;
/// `cudaErrorInvalidPtx`, `cudaErrorUnsupportedPtxVersion` and `cudaErrorNoKernelImageForDevice`.
const NO_CODE: [c_int; 3] = [218, 222, 209];

/// A kernel could not be queued.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{call}: {message} (CUDA error {code}){hint}")]
pub struct KernelError {
    /// The function that was called.
    pub call: &'static str,
    /// The `cudaError_t` that it returned.
    pub code: i32,
    /// The CUDA runtime's words for it.
    pub message: String,
    hint: &'static str,
}

/// The error that a status code of the kernels' functions stands for.
///
/// # Errors
/// Any code but 0.
pub fn check(call: &'static str, code: i32) -> Result<(), KernelError> {
    if code == 0 {
        return Ok(());
    }
    // SAFETY: the runtime answers any code with a string that lives as long as the program.
    let message = unsafe { CStr::from_ptr(cudaGetErrorString(code)) };
    let hint = match code {
        INVALID_VALUE => {
            "; hint: the kernels take head dimensions 64, 80, 96 and 128 in f32 or bf16, and 256 in bf16; f32 at 128 and bf16 at 256 need the shared memory of an H100"
        }
        OUT_OF_MEMORY => "; hint: feed fewer tokens or sequences at a time",
        code if NO_CODE.contains(&code) => {
            "; hint: the kernels need a GPU of compute capability 8.0 or newer and a driver as new as the toolkit they \
             were built with"
        }
        _ => "",
    };
    Err(KernelError { call, code, message: message.to_string_lossy().into_owned(), hint })
}
