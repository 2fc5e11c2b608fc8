//! AdamW with a state that a checkpoint saves whole.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{Tensor, Var};
use serde::{Deserialize, Serialize};
use still_compute::{Gradients, Run, Spans};

use crate::error::{Result, TrainError};
use crate::flat::{joined, sums_of_squares};
use crate::schedule::{Plateau, Schedule};

/// Settings of AdamW (Loshchilov and Hutter 2019) and its schedule.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdamWConfig {
    /// Peak learning rate.
    pub lr: f64,
    /// Steps of linear warmup.
    pub warmup: usize,
    /// The rate after the warmup: `"cosine"`, `"linear"`, `"constant"` or `{ plateau = { factor = 0.1, patience = 10 } }`.
    pub schedule: Schedule,
    /// The schedule ends at this share of `lr`.
    pub floor: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Largest global norm of the gradients; larger ones are scaled down to it. 0 is off.
    pub clip: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self {
            lr: 1e-3,
            warmup: 2,
            schedule: Schedule::default(),
            floor: 0.1,
            beta1: 0.9,
            beta2: 0.99,
            eps: 1e-8,
            weight_decay: 0.0,
            clip: 1.0,
        }
    }
}

/// Named variables in a fixed order.
pub type Parameters = Vec<(String, Var)>;

/// AdamW over named variables.
#[derive(Clone, Debug)]
pub struct AdamW {
    config: AdamWConfig,
    parameters: Parameters,
    /// Span of each parameter in the vectors of moments and gradients.
    spans: Arc<Spans>,
    /// First moments of all parameters, `[values]` f32.
    m: Tensor,
    /// Second moments.
    v: Tensor,
    /// Steps of the schedule.
    step: usize,
    /// Skipped steps among them.
    skipped: usize,
    total: usize,
    plateau: Plateau,
}

impl AdamW {
    /// An optimizer with zero moments, for a run of `total` steps.
    ///
    /// # Errors
    /// An error of the tensor library.
    pub fn new(config: AdamWConfig, parameters: Parameters, total: usize) -> Result<Self> {
        let spans = Arc::new(Spans::new(parameters.iter().map(|(_, var)| var.as_tensor())));
        let (m, v) = (spans.zeros()?, spans.zeros()?);
        let plateau = Plateau::default();
        Ok(Self { config, parameters, spans, m, v, step: 0, skipped: 0, total, plateau })
    }

    /// Steps so far, skipped ones included.
    pub fn step_count(&self) -> usize {
        self.step
    }

    /// The variables.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// Learning rate of the next step.
    pub fn lr(&self) -> f64 {
        let AdamWConfig { lr, warmup, schedule, floor, .. } = self.config;
        lr * schedule.share(self.step, warmup, self.total, floor) * self.plateau.scale().max(floor)
    }

    /// Records a held-out loss, for [`Schedule::Plateau`].
    pub(crate) fn observe(&mut self, heldout: f64) {
        self.plateau.observe(heldout, self.config.schedule);
    }

    /// Zero gradients, to which backward passes of the next step add.
    ///
    /// # Errors
    /// An error of the tensor library.
    pub fn gradients(&self) -> Result<Gradients> {
        Ok(Gradients::new(&self.spans)?)
    }

    /// Takes one step. A parameter without a gradient does not change. Returns the gradients' global norm before clipping.
    ///
    /// # Errors
    /// [`TrainError::NotFinite`] if the norm is not a number; nothing has changed then.
    pub fn step(&mut self, stage: &'static str, gradients: Gradients) -> Result<f64> {
        let runs = gradients.into_runs()?;
        let norm = self.norm(stage, &runs)?;
        self.apply(&runs, norm)?;
        Ok(norm)
    }

    /// Global norm of the gradients.
    ///
    /// # Errors
    /// [`TrainError::NotFinite`] if it is not a number.
    pub(crate) fn norm(&self, stage: &'static str, grads: &[Run]) -> Result<f64> {
        let mut squares = 0.0;
        for run in grads {
            let sums = sums_of_squares(&run.gradient)?.to_vec1::<f32>()?;
            squares += sums.into_iter().map(f64::from).sum::<f64>();
        }
        let norm = squares.sqrt();
        if norm.is_finite() {
            return Ok(norm);
        }
        Err(TrainError::NotFinite {
            stage,
            step: self.step,
            what: "the gradient's norm",
            value: norm,
        })
    }

    /// The step along gradients of this norm.
    pub(crate) fn apply(&mut self, grads: &[Run], norm: f64) -> Result<()> {
        let AdamWConfig { beta1, beta2, eps, weight_decay, clip, .. } = self.config;
        let scale = if clip > 0.0 && norm > clip { clip / norm } else { 1.0 };
        let lr = self.lr();
        self.step += 1;
        let taken = (self.step - self.skipped) as i32;
        let correct1 = 1.0 - beta1.powi(taken);
        let correct2 = 1.0 - beta2.powi(taken);
        for Run { tensors, gradient } in grads {
            let range = self.spans.range(tensors);
            let part = |all: &Tensor| all.narrow(0, range.start, range.len());
            let grad = (gradient * scale)?;
            let m = ((part(&self.m)? * beta1)? + (&grad * (1.0 - beta1))?)?;
            let v = ((part(&self.v)? * beta2)? + (grad.sqr()? * (1.0 - beta2))?)?;
            let denominator = ((&v / correct2)?.sqrt()? + eps)?;
            let update = ((&m / correct1)? / denominator)?;
            let vars: Vec<&Var> =
                self.parameters[tensors.clone()].iter().map(|(_, var)| var).collect();
            let values: Vec<&Tensor> = vars.iter().map(|var| var.as_tensor()).collect();
            let decayed = (joined(&values)? * (1.0 - lr * weight_decay))?;
            let values = (decayed - (update * lr)?)?;
            let mut start = 0;
            for var in vars {
                let count = var.elem_count();
                var.set(&values.narrow(0, start, count)?.reshape(var.shape())?)?;
                start += count;
            }
            self.m = self.m.slice_scatter(&m, 0, range.start)?;
            self.v = self.v.slice_scatter(&v, 0, range.start)?;
        }
        Ok(())
    }

    /// Skips a step: only the schedule advances.
    pub(crate) fn skip(&mut self) {
        self.step += 1;
        self.skipped += 1;
    }

    /// Steps skipped so far.
    pub(crate) fn skipped(&self) -> usize {
        self.skipped
    }

    /// The state of [`Schedule::Plateau`].
    pub(crate) fn plateau(&self) -> Plateau {
        self.plateau
    }

    /// Moments by name: `m.` and `v.` before the parameter's name.
    ///
    /// # Errors
    /// An error of the tensor library.
    pub fn state(&self) -> Result<HashMap<String, Tensor>> {
        let mut state = HashMap::new();
        for (n, (name, _)) in self.parameters.iter().enumerate() {
            for (prefix, all) in [("m", &self.m), ("v", &self.v)] {
                state.insert(format!("{prefix}.{name}"), self.spans.of(n, all)?);
            }
        }
        Ok(state)
    }

    /// Restores saved moments, after `step` steps of which `skipped` were skipped.
    ///
    /// # Errors
    /// `foreign` of the name of a moment that is missing or of another shape.
    pub(crate) fn restore(
        &mut self,
        (step, skipped): (usize, usize),
        plateau: Plateau,
        state: &HashMap<String, Tensor>,
        foreign: impl Fn(&str) -> TrainError,
    ) -> Result<()> {
        let moments = |prefix: &str| {
            let moment = |(name, var): &(String, Var)| {
                let key = format!("{prefix}.{name}");
                let saved = state.get(&key).filter(|saved| saved.dims() == var.dims());
                saved.ok_or_else(|| foreign(&key))
            };
            self.parameters.iter().map(moment).collect::<Result<Vec<_>>>()
        };
        let (m, v) = (joined(&moments("m")?)?, joined(&moments("v")?)?);
        (self.m, self.v) = (m.to_device(self.m.device())?, v.to_device(self.v.device())?);
        (self.step, self.skipped, self.plateau) = (step, skipped.min(step), plateau);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn one(value: f32) -> Parameters {
        vec![("x".into(), Var::new(&[value], &Device::Cpu).unwrap())]
    }

    /// A step along one gradient.
    fn step(adam: &mut AdamW, value: f32) -> Result<f64> {
        let mut gradients = adam.gradients().unwrap();
        let gradient = Tensor::new(&[value], &Device::Cpu).unwrap();
        gradients.add(&adam.parameters()[0].1, &gradient).unwrap();
        adam.step("test", gradients)
    }

    fn value(parameters: &Parameters) -> f32 {
        parameters[0].1.to_vec1::<f32>().unwrap()[0]
    }

    #[test]
    fn two_steps_by_hand() {
        let config = AdamWConfig {
            lr: 0.1,
            warmup: 0,
            schedule: Schedule::Cosine,
            floor: 1.0,
            beta1: 0.9,
            beta2: 0.99,
            eps: 0.0,
            weight_decay: 0.5,
            clip: 1e9,
        };
        let parameters = one(1.0);
        let mut adam = AdamW::new(config, parameters.clone(), 10).unwrap();
        // First step: m̂/√v̂ is the gradient's sign.
        step(&mut adam, 2.0).unwrap();
        assert!((value(&parameters) - (0.95 - 0.1)).abs() < 1e-6);
        // Second: m = 0.9·0.2 − 0.1·1 = 0.08, v = 0.99·0.04 + 0.01·1 = 0.0496.
        step(&mut adam, -1.0).unwrap();
        let update = (0.08 / 0.19) / (0.0496_f64 / 0.0199).sqrt();
        let expected = 0.85 * 0.95 - 0.1 * update;
        assert!((f64::from(value(&parameters)) - expected).abs() < 1e-6);
    }

    #[test]
    fn nothing_is_clipped_at_0() {
        let free = AdamWConfig { eps: 1.0, warmup: 0, clip: 1e9, ..AdamWConfig::default() };
        let off = AdamWConfig { clip: 0.0, ..free };
        let (a, b) = (one(0.0), one(0.0));
        for (config, parameters) in [(free, &a), (off, &b)] {
            step(&mut AdamW::new(config, parameters.clone(), 10).unwrap(), 400.0).unwrap();
        }
        assert!(value(&a) != 0.0);
        assert_eq!(value(&a), value(&b));
    }

    #[test]
    fn clipping_scales_and_reports_the_norm_before() {
        let free = AdamWConfig { eps: 1.0, warmup: 0, clip: 1e9, ..AdamWConfig::default() };
        let clipped = AdamWConfig { clip: 0.5, ..free };
        let (a, b) = (one(0.0), one(0.0));
        let norm = step(&mut AdamW::new(clipped, a.clone(), 10).unwrap(), 4.0).unwrap();
        step(&mut AdamW::new(free, b.clone(), 10).unwrap(), 0.5).unwrap();
        assert_eq!(norm, 4.0);
        assert_eq!(value(&a), value(&b));
    }

    #[test]
    fn a_skipped_step_moves_the_schedule_alone() {
        let config = AdamWConfig { warmup: 4, ..AdamWConfig::default() };
        let (skipping, plain) = (one(1.0), one(1.0));
        let mut adam = AdamW::new(config, skipping.clone(), 10).unwrap();
        adam.skip();
        assert_eq!((value(&skipping), adam.step_count(), adam.lr()), (1.0, 1, 0.5e-3));
        // The first update is a first update: the moments' correction counts those alone.
        step(&mut adam, 0.5).unwrap();
        let twice = AdamWConfig { lr: 2e-3, ..config };
        step(&mut AdamW::new(twice, plain.clone(), 10).unwrap(), 0.5).unwrap();
        assert_eq!(value(&skipping), value(&plain));
    }

    #[test]
    fn a_plateau_never_goes_below_the_floor() {
        let schedule = Schedule::Plateau { factor: 0.5, patience: 0, threshold: 1e-4, cooldown: 0 };
        let config = AdamWConfig { lr: 1.0, warmup: 0, schedule, ..AdamWConfig::default() };
        let mut adam = AdamW::new(config, one(1.0), 10).unwrap();
        let mut rates = Vec::new();
        for _ in 0..6 {
            adam.observe(1.0);
            rates.push(adam.lr());
        }
        assert_eq!(rates, [1.0, 0.5, 0.25, 0.125, 0.1, 0.1]);
    }

    #[test]
    fn a_gradient_that_is_not_a_number_changes_nothing() {
        let parameters = one(1.0);
        let mut adam = AdamW::new(AdamWConfig::default(), parameters.clone(), 10).unwrap();
        assert!(matches!(step(&mut adam, f32::NAN), Err(TrainError::NotFinite { .. })));
        assert_eq!((value(&parameters), adam.step_count()), (1.0, 0));
    }
}
