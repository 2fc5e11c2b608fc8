//! Devices by name.

use candle_core::Device;
#[cfg(feature = "cuda")]
use candle_core::cuda::cudarc::driver::sys;

use crate::error::{ModelError, Result};

/// `cpu`, `cuda` (the first GPU) or `cuda:N`.
///
/// A CUDA device has a stream of its own. Use tensors of a device only with that device.
///
/// # Errors
/// An unknown name; a device that this machine or this build does not have.
pub fn device(name: &str) -> Result<Device> {
    if name == "cpu" {
        return Ok(Device::Cpu);
    }
    let ordinal = match name.strip_prefix("cuda") {
        Some("") => Some(0),
        Some(rest) => rest.strip_prefix(':').and_then(|n| n.parse().ok()),
        None => None,
    };
    match ordinal {
        Some(ordinal) => cuda(name, ordinal),
        None => Err(ModelError::NotFound {
            what: format!("no device is called {name:?}"),
            hint: "use cpu, cuda or cuda:N".into(),
        }),
    }
}

#[cfg(feature = "cuda")]
fn cuda(name: &str, ordinal: usize) -> Result<Device> {
    let _opening = still_compute::cuda::no_capture();
    let device = Device::new_cuda_with_stream(ordinal).map_err(|error| ModelError::NotFound {
        what: format!("the device {name} does not answer: {error}"),
        hint:
            "`nvidia-smi` lists the GPUs that the driver sees; CUDA_VISIBLE_DEVICES may hide them"
                .into(),
    })?;
    // SAFETY: everything runs on this device's one stream, in order: no other stream has to be told.
    unsafe { device.as_cuda_device()?.disable_event_tracking() };
    keep_freed_memory(&device)?;
    Ok(device)
}

/// Makes the device's pool keep freed memory. Otherwise the driver returns it whenever the host waits for the device, and maps it
/// again afterwards.
#[cfg(feature = "cuda")]
fn keep_freed_memory(device: &Device) -> Result<()> {
    let mut threshold = u64::MAX;
    // SAFETY: the attribute is a 64-bit number.
    let set = unsafe {
        sys::cuMemPoolSetAttribute(
            pool(device)?,
            sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD,
            (&raw mut threshold).cast(),
        )
    };
    Ok(set.result().map_err(candle_core::Error::wrap)?)
}

#[cfg(feature = "cuda")]
fn pool(device: &Device) -> Result<sys::CUmemoryPool> {
    let on = device.as_cuda_device()?.cuda_stream().context().cu_device();
    let mut pool = std::ptr::null_mut();
    // SAFETY: the device exists, the pool is written.
    let got = unsafe { sys::cuDeviceGetDefaultMemPool(&raw mut pool, on) };
    got.result().map_err(candle_core::Error::wrap)?;
    Ok(pool)
}

/// Resets [`peak_device_bytes`] to the bytes in use.
///
/// # Errors
/// An error of the driver.
pub fn reset_peak_device_bytes(device: &Device) -> Result<()> {
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        let mut zero = 0_u64;
        // SAFETY: the attribute is a 64-bit number, and 0 the one value that it takes.
        let set = unsafe {
            sys::cuMemPoolSetAttribute(
                pool(device)?,
                sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH,
                (&raw mut zero).cast(),
            )
        };
        set.result().map_err(candle_core::Error::wrap)?;
    }
    let _ = device;
    Ok(())
}

/// Peak memory of a CUDA device, in bytes, since the program's start or [`reset_peak_device_bytes`]. `None` on other devices.
///
/// # Errors
/// An error of the driver.
pub fn peak_device_bytes(device: &Device) -> Result<Option<u64>> {
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        let mut bytes = 0_u64;
        // SAFETY: the attribute is a 64-bit number.
        let got = unsafe {
            sys::cuMemPoolGetAttribute(
                pool(device)?,
                sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH,
                (&raw mut bytes).cast(),
            )
        };
        got.result().map_err(candle_core::Error::wrap)?;
        return Ok(Some(bytes));
    }
    let _ = device;
    Ok(None)
}

#[cfg(not(feature = "cuda"))]
fn cuda(name: &str, _: usize) -> Result<Device> {
    Err(ModelError::NotFound {
        what: format!("this program was built without CUDA, so there is no device {name}"),
        hint: "build it with `--features cuda` (docs/cuda.md), or use --device cpu".into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_is_not_there_is_an_error_that_says_so() {
        assert!(device("cpu").unwrap().is_cpu());
        for name in ["gpu", "cuda:x", "cuda0", "CPU", ""] {
            assert!(device(name).unwrap_err().to_string().contains(&format!("{name:?}")));
        }
        #[cfg(not(feature = "cuda"))]
        for name in ["cuda", "cuda:1"] {
            assert!(device(name).unwrap_err().to_string().contains("without CUDA"));
        }
    }
}
