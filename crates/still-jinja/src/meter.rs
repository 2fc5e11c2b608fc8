//! Counts what a template does.

use std::cell::Cell;

use crate::error::{Error, ErrorKind, Result};

/// Steps that every template has.
const STEPS: u64 = 10_000_000;
/// Steps more for each byte of what it is given: long conversations take long.
const STEPS_PER_BYTE: u64 = 64;
/// Bytes that are copied in one step.
const BYTES_PER_STEP: u64 = 8;
/// Steps for an element of a list or dictionary: an element is larger than a byte.
const STEPS_PER_ELEMENT: u64 = 4;

/// What is left of the steps. A step is a node of the template visited or some bytes copied, so that time and
/// memory are bounded by one number: 10 million steps are about a second, or 80 MB.
#[derive(Debug)]
pub(crate) struct Meter {
    left: Cell<u64>,
    all: u64,
}

impl Meter {
    pub fn new(input_bytes: usize) -> Self {
        let all = STEPS + STEPS_PER_BYTE * input_bytes as u64;
        Self { left: Cell::new(all), all }
    }

    pub fn steps(&self, steps: u64) -> Result<()> {
        match self.left.get().checked_sub(steps) {
            Some(left) => {
                self.left.set(left);
                Ok(())
            }
            None => {
                let what = format!("takes more than the {} steps that a template may", self.all);
                Err(Error::new(ErrorKind::Limit, what))
            }
        }
    }

    /// Before bytes are copied or looked through.
    pub fn bytes(&self, bytes: usize) -> Result<()> {
        self.steps(bytes as u64 / BYTES_PER_STEP)
    }

    /// Before a list or dictionary of so many elements is made.
    pub fn elements(&self, elements: usize) -> Result<()> {
        self.steps((elements as u64).saturating_mul(STEPS_PER_ELEMENT))
    }
}
