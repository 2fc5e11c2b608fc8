//! Wall-clock times on a device that works behind the host's back.

use std::time::Instant;

use candle_core::Device;
use still_model::Result;

use crate::quantile::{median, quantile};

/// Calls between two waits for the device last at least this long, so that neither the wait nor the clock counts.
const LEAST_MS: f64 = 10.0;

/// Calls between two waits at most: what they allocate is not to pile up.
const MOST_CALLS: usize = 64;

/// Milliseconds of one call.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Times {
    pub median_ms: f64,
    pub p10_ms: f64,
    pub p90_ms: f64,
    /// Calls in each repetition.
    pub calls: usize,
}

/// Times `repetitions` runs of `calls` calls, the device waited for before and after each run; a run before them warms up.
/// Without `calls`, as many as last 10 ms.
pub(super) fn time(
    device: &Device,
    repetitions: usize,
    calls: Option<usize>,
    mut call: impl FnMut() -> Result<()>,
) -> Result<Times> {
    let mut run = |calls: usize| -> Result<f64> {
        device.synchronize()?;
        let started = Instant::now();
        (0..calls).try_for_each(|_| call())?;
        device.synchronize()?;
        Ok(1e3 * started.elapsed().as_secs_f64() / calls as f64)
    };
    let calls = match calls {
        Some(calls) => {
            run(calls)?;
            calls
        }
        None => {
            // The first call finds memory and kernels cold.
            run(1)?;
            let enough = (LEAST_MS / run(1)?).ceil() as usize;
            enough.clamp(1, MOST_CALLS)
        }
    };
    let mut ms = (0..repetitions).map(|_| run(calls)).collect::<Result<Vec<f64>>>()?;
    let median_ms = median(&mut ms);
    Ok(Times { median_ms, p10_ms: quantile(&ms, 0.1), p90_ms: quantile(&ms, 0.9), calls })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_counted() {
        let mut calls = 0;
        let mut call = || {
            calls += 1;
            Ok(())
        };
        let times = time(&Device::Cpu, 3, Some(5), &mut call).unwrap();
        assert_eq!((times.calls, calls), (5, 20));
        assert!(times.p10_ms <= times.median_ms && times.median_ms <= times.p90_ms);
        // A call that takes no time is called as often as is allowed.
        assert_eq!(time(&Device::Cpu, 1, None, || Ok(())).unwrap().calls, MOST_CALLS);
    }
}
