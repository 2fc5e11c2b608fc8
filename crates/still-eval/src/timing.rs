//! Wall-clock times on any device: warm-up, waits for the device, medians.
//!
//! Every speed that `still` reports is measured here. A GPU works behind the host's back, so it is waited for.

use std::time::Instant;

use candle_core::Device;

use crate::quantile::{median, quantile};

/// Calls between two waits for the device last at least this long, so that neither the wait nor the clock counts.
const LEAST_MS: f64 = 10.0;

/// Calls between two waits at most: what they allocate is not to pile up.
const MOST_CALLS: usize = 64;

/// Milliseconds of one call, by repetition; at least one.
#[derive(Clone, Debug, PartialEq)]
pub struct Times {
    /// Ascending.
    ms: Vec<f64>,
    /// The median: the mean of the two middle ones of an even number.
    pub median_ms: f64,
    /// Calls in each repetition.
    pub calls: usize,
}

impl Times {
    pub(crate) fn new(mut ms: Vec<f64>, calls: usize) -> Self {
        let median_ms = median(&mut ms);
        Self { ms, median_ms, calls }
    }

    /// Repetitions that were timed.
    pub fn repetitions(&self) -> usize {
        self.ms.len()
    }

    /// The time that a share of the repetitions do not exceed, by the nearest rank: 1 is the slowest.
    pub fn quantile_ms(&self, share: f64) -> f64 {
        quantile(&self.ms, share)
    }

    /// Over all repetitions.
    pub fn mean_ms(&self) -> f64 {
        self.ms.iter().sum::<f64>() / self.ms.len() as f64
    }
}

/// What `call` returns and the milliseconds that it took, the device waited for before and after.
///
/// # Errors
/// An error of the call or the device.
pub fn time_once<T, E: From<candle_core::Error>>(
    device: &Device,
    call: impl FnOnce() -> Result<T, E>,
) -> Result<(T, f64), E> {
    device.synchronize()?;
    let started = Instant::now();
    let done = call()?;
    device.synchronize()?;
    Ok((done, 1e3 * started.elapsed().as_secs_f64()))
}

/// Times `repetitions` (1 if 0) runs of `calls` calls, the device waited for before and after each run; a run before them
/// warms up. Without `calls`, as many as last 10 ms.
///
/// # Errors
/// An error of a call or the device.
pub fn time<E: From<candle_core::Error>>(
    device: &Device,
    repetitions: usize,
    calls: Option<usize>,
    mut call: impl FnMut() -> Result<(), E>,
) -> Result<Times, E> {
    let mut run = |calls: usize| -> Result<f64, E> {
        let ((), ms) = time_once(device, || (0..calls).try_for_each(|_| call()))?;
        Ok(ms / calls as f64)
    };
    // The first call finds memory and kernels cold.
    run(calls.unwrap_or(1))?;
    let calls = match calls {
        Some(calls) => calls,
        None => ((LEAST_MS / run(1)?).ceil() as usize).clamp(1, MOST_CALLS),
    };
    let ms = (0..repetitions.max(1)).map(|_| run(calls)).collect::<Result<_, E>>()?;
    Ok(Times::new(ms, calls))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_counted() {
        let mut calls = 0;
        let mut call = || {
            calls += 1;
            Ok::<_, candle_core::Error>(())
        };
        let times = time(&Device::Cpu, 3, Some(5), &mut call).unwrap();
        assert_eq!((times.calls, calls), (5, 20));
        let [p10, p50, p90] = [times.quantile_ms(0.1), times.median_ms, times.quantile_ms(0.9)];
        assert!(p10 <= p50 && p50 <= p90);
        // A call that takes no time is called as often as is allowed.
        let nothing = || Ok::<_, candle_core::Error>(());
        assert_eq!(time(&Device::Cpu, 1, None, nothing).unwrap().calls, MOST_CALLS);
    }
}
