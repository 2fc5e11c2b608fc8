//! Scratch that the layers of one pass take in turn.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::cuda::cudarc::driver::CudaSlice;
use candle_core::{CudaDevice, Result};

/// Bytes up to which scratch stays for the next layer. More is only asked for by a pass of many tokens, whose kernels take longer
/// than the host needs to allocate, and whose other activations are to have the memory meanwhile.
const KEPT_BYTES: usize = 64 << 20;

/// What the kernels of one layer leave for each other, where those of the layer before did; and counts that are the same for all
/// layers, uploaded once. A short piece of a prompt waits for the host, whose calls for a layer are half allocations otherwise.
///
/// It is of one pass on one device's one stream: the kernels of a layer begin when those of the layer before have ended.
#[derive(Debug, Default)]
pub struct PassScratch {
    kept: Mutex<Option<Arc<CudaSlice<u8>>>>,
    counts: Mutex<Option<Counts>>,
}

/// Counts, and where they were uploaded to.
type Counts = (Vec<i32>, Arc<CudaSlice<i32>>);

impl PassScratch {
    /// Memory of at least `bytes` bytes, not initialised. Whoever asks next gets the same.
    ///
    /// # Errors
    /// No memory left on the device.
    pub fn memory(&self, device: &CudaDevice, bytes: usize) -> Result<Arc<CudaSlice<u8>>> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kept) = kept.as_ref().filter(|kept| kept.len() >= bytes) {
            return Ok(Arc::clone(kept));
        }
        // SAFETY: who asks for it queues what fills it before what reads it. An empty one cannot be had.
        let memory = Arc::new(unsafe { device.alloc(bytes.max(1))? });
        if bytes <= KEPT_BYTES {
            *kept = Some(Arc::clone(&memory));
        }
        Ok(memory)
    }

    /// `counts` on the device: uploaded by the first layer, and again where they are others.
    ///
    /// # Errors
    /// An error of the driver.
    pub fn counts(&self, device: &CudaDevice, counts: Vec<i32>) -> Result<Arc<CudaSlice<i32>>> {
        let mut there = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, there)) = there.as_ref().filter(|(of, _)| *of == counts) {
            return Ok(Arc::clone(there));
        }
        let uploaded = Arc::new(device.clone_htod(&counts)?);
        *there = Some((counts, Arc::clone(&uploaded)));
        Ok(uploaded)
    }
}
