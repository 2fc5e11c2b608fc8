//! Kernels that are captured once and then launched as one.

use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_core::cuda::cudarc::driver::{CudaGraph, DriverError, sys};
use candle_core::{CudaDevice, Error, Result};

/// A captured graph. It reads and writes the memory that was there when it was captured, which must outlive it.
pub struct CapturedGraph(CudaGraph);

// SAFETY: a graph must not be used by two threads at once. It is launched through `&mut` and dropped by its owner; a shared
// reference gives nothing away.
unsafe impl Send for CapturedGraph {}
unsafe impl Sync for CapturedGraph {}

impl std::fmt::Debug for CapturedGraph {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CapturedGraph").finish_non_exhaustive()
    }
}

/// Captures that may be invalidated from outside before the error is the caller's.
const ATTEMPTS: usize = 20;

/// Held by whoever captures.
static CAPTURE: Mutex<()> = Mutex::new(());

/// While this is held no thread captures: opening a device does what would end a capture anywhere in the process.
pub fn no_capture() -> MutexGuard<'static, ()> {
    CAPTURE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether a device's stream can be captured: with event tracking, buffers would be waited for that the capture does not know.
pub fn can_capture(device: &CudaDevice) -> bool {
    !device.cuda_stream().context().is_managing_stream_synchronization()
}

impl CapturedGraph {
    /// Captures what `queue` queues on the device's stream. It is called twice: first to be run, so that kernels are loaded and
    /// uploads done, then to be captured. What it allocates is free again at the end of each launch.
    ///
    /// # Errors
    /// The first that `queue` returns; an error of the driver; nothing that was queued.
    pub fn capture<E: From<Error>>(
        device: &CudaDevice,
        mut queue: impl FnMut() -> std::result::Result<(), E>,
    ) -> std::result::Result<Self, E> {
        let stream = device.cuda_stream();
        // Shapes and strides that kernels read from the device are uploaded by the first run, on this thread, and kept.
        let _uploaded = device.enable_cuda_graph_htod_cache();
        queue()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        for attempt in 1.. {
            let capturing = no_capture();
            stream.begin_capture(mode).map_err(driver)?;
            let queued = queue();
            // In an invalidated capture nothing can be freed. That is noted for the next call, which would return it in place of
            // ending the capture: the stream is of no use to anyone before that, whatever came of it.
            let noted = stream.context().check_err();
            let ended = stream.end_capture(flags);
            drop(capturing);
            let graph = ended.and_then(|graph| noted.map(|()| graph));
            match (queued, graph) {
                // Another thread loaded kernels, which ends captures everywhere in the process.
                (_, Err(error)) if was_invalidated(&error) && attempt < ATTEMPTS => {
                    // What was allocated in the capture is gone with it. That it could not be freed is noted, for the next call.
                    let _noted = stream.context().check_err();
                }
                (Err(error), _) => return Err(error),
                (Ok(()), graph) => {
                    let graph = graph.map_err(driver)?;
                    let empty = || Error::Msg("a captured graph is empty".into());
                    return Ok(Self(graph.ok_or_else(empty)?));
                }
            }
        }
        unreachable!("attempts are counted")
    }

    /// Queues all of it.
    ///
    /// # Errors
    /// An error of the driver.
    pub fn launch(&mut self) -> Result<()> {
        self.0.launch().map_err(driver)
    }
}

fn was_invalidated(error: &DriverError) -> bool {
    error.0 == sys::CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED
}

fn driver(error: DriverError) -> Error {
    Error::wrap(error)
}
