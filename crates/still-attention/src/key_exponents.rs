//! Exponents of two by which the channels of coded keys are scaled to alike ranges.
//!
//! Keys of some models have a few channels a hundred times larger than the others, such as Qwen2's, whose projections have biases. A row
//! or a group of a row has one scale, which such channels take for themselves. So a key is coded as `k_c · 2^−e_c` and given back
//! as code times `2^e_c`. A product with a power of two is exact: nothing changes but how codes are rounded. Whatever is not coded (a
//! window, a row in 16 or 32 bits, what enters the linear state) is as it was.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use still_compute::Real;

use crate::error::{AttentionError, Result};

/// The largest exponent, either way: products of 2^±30 and a key or query stay within f32 and bf16.
pub const MAX_KEY_EXPONENT: i8 = 30;

/// From this exponent on a channel's range is that of 16 median ones, as many as 4 bits have codes: what such a channel is rounded by
/// is as large as the others.
const WIDE: i8 = 4;

/// `e` of each channel of one KV head. In files they are a text, such as `"0 0 3 -1"`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeyExponents(Vec<i8>);

impl KeyExponents {
    /// Exponents of all channels, each up to [`MAX_KEY_EXPONENT`] either way.
    ///
    /// # Errors
    /// Names an exponent that is larger.
    pub fn new(exponents: Vec<i8>) -> Result<Self> {
        match exponents.iter().find(|e| e.unsigned_abs() > MAX_KEY_EXPONENT as u8) {
            None => Ok(Self(exponents)),
            Some(e) => Err(AttentionError::Config(format!(
                "a key exponent is {e}, expected -{MAX_KEY_EXPONENT} to {MAX_KEY_EXPONENT}"
            ))),
        }
    }

    /// Those by which the `ranges` of channels become alike, relative to their median. A channel that is 0 everywhere is not scaled.
    pub fn of_ranges(ranges: &[f64]) -> Self {
        let mut logs: Vec<f64> = ranges.iter().filter(|&&x| x > 0.0).map(|x| x.log2()).collect();
        logs.sort_by(f64::total_cmp);
        let Some(&median) = logs.get(logs.len() / 2) else { return Self(vec![0; ranges.len()]) };
        let most = f64::from(MAX_KEY_EXPONENT);
        let exponent = |&range: &f64| match range > 0.0 {
            true => (range.log2() - median).round().clamp(-most, most) as i8,
            false => 0,
        };
        Self(ranges.iter().map(exponent).collect())
    }

    /// By channel.
    pub fn values(&self) -> &[i8] {
        &self.0
    }

    /// Whether no channel is scaled.
    pub fn are_zero(&self) -> bool {
        self.0.iter().all(|&e| e == 0)
    }

    /// Whether a channel's range is 16 times the median or more, so that 4 bits cannot hold it: an error of its code is as large as the
    /// other channels.
    pub fn are_wide(&self) -> bool {
        self.0.iter().any(|&e| e >= WIDE)
    }

    /// `2^(sign · e)` of each channel.
    pub(crate) fn powers<T: Real>(&self, sign: i32) -> Vec<T> {
        self.0.iter().map(|&e| T::of(2.0_f64.powi(sign * i32::from(e)))).collect()
    }
}

impl fmt::Display for KeyExponents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, e) in self.0.iter().enumerate() {
            write!(f, "{}{e}", if i > 0 { " " } else { "" })?;
        }
        Ok(())
    }
}

impl FromStr for KeyExponents {
    type Err = AttentionError;

    fn from_str(text: &str) -> Result<Self> {
        let number = |word: &str| {
            word.parse::<i8>().map_err(|_| {
                AttentionError::Config(format!(
                    "key exponents are whole numbers with spaces between them, not {word:?}"
                ))
            })
        };
        Self::new(text.split_ascii_whitespace().map(number).collect::<Result<_>>()?)
    }
}

impl Serialize for KeyExponents {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for KeyExponents {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_become_alike() {
        let ranges = [0.01, 1.0, 1.1, 0.9, 145.0, 0.0, f64::MAX];
        let exponents = KeyExponents::of_ranges(&ranges);
        assert_eq!(exponents.values(), [-7, 0, 0, 0, 7, 0, 30]);
        for (range, e) in ranges[..5].iter().zip(exponents.values()) {
            let scaled = range * 2.0_f64.powi(-i32::from(*e));
            assert!((0.7..1.5).contains(&scaled), "{range} becomes {scaled}");
        }
        assert!(KeyExponents::of_ranges(&[0.0; 4]).are_zero() && !exponents.are_zero());
        assert!(exponents.are_wide());
        assert!(!KeyExponents::of_ranges(&[0.001, 1.0, 1.0, 11.0]).are_wide());
        assert!(KeyExponents::of_ranges(&[0.001, 1.0, 1.0, 12.0]).are_wide());
    }

    #[test]
    fn they_are_a_text_in_files() {
        let exponents = KeyExponents::new(vec![0, -3, 12]).unwrap();
        let text = serde_json::to_string(&exponents).unwrap();
        assert_eq!(text, "\"0 -3 12\"");
        assert_eq!(serde_json::from_str::<KeyExponents>(&text).unwrap(), exponents);
        let error = |text: &str| text.parse::<KeyExponents>().unwrap_err().to_string();
        assert!(error("0 x").contains("\"x\""));
        assert!(error("0 31").contains("31, expected -30 to 30"));
        assert!(error("0 300").contains("\"300\""));
    }
}
