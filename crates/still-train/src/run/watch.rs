//! What evaluations say of a run: which student is the best, when a stage has had enough, when a run is lost.

use serde::{Deserialize, Serialize};

use crate::exact::Exact;
use crate::recipe::GuardRecipe;

/// Held-out losses so far. Saved with every checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Watch {
    /// Of the whole run.
    best: Option<Exact>,
    last: Option<Exact>,
    /// Of this stage, at its beginning and at best.
    start: Option<Exact>,
    best_of_stage: Option<Exact>,
    /// Evaluations since the best one of this stage.
    waited: usize,
}

impl Watch {
    /// A stage begins; its student is the one that was measured last, if one was.
    pub fn begin_stage(&mut self) {
        self.start = self.last;
        self.best_of_stage = self.last;
        self.waited = 0;
    }

    /// Takes note of a held-out loss; whether it is the run's lowest.
    pub fn observe(&mut self, heldout: f64) -> bool {
        let below = |than: Option<Exact>| than.is_none_or(|than| heldout < than.get());
        let is_best = below(self.best);
        if below(self.best_of_stage) {
            self.best_of_stage = Some(heldout.into());
            self.waited = 0;
        } else {
            self.waited += 1;
        }
        if is_best {
            self.best = Some(heldout.into());
        }
        self.start = self.start.or(Some(heldout.into()));
        self.last = Some(heldout.into());
        is_best
    }

    /// Whether the stage has gone `patience` evaluations without getting better.
    pub fn has_had_enough(&self, patience: usize) -> bool {
        patience > 0 && self.waited >= patience
    }

    /// Why the run is to be given up, if it is.
    pub fn diverged(&self, guard: &GuardRecipe) -> Option<String> {
        let (start, last) = (self.start?.get(), self.last?.get());
        let grown = guard.max_heldout_growth > 0.0 && last > guard.max_heldout_growth * start;
        grown.then(|| format!("the held-out loss rose from {start:.3} to {last:.3} nats per token"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_is_the_runs_and_patience_the_stages() {
        let mut watch = Watch::default();
        watch.begin_stage();
        assert_eq!([4.0, 3.0, 3.5].map(|loss| watch.observe(loss)), [true, true, false]);
        assert!(watch.has_had_enough(1) && !watch.has_had_enough(2) && !watch.has_had_enough(0));
        // The next stage starts from the last student and has patience of its own.
        watch.begin_stage();
        assert!(!watch.has_had_enough(1));
        assert!(!watch.observe(3.2), "better than its start, not than the run's best");
        assert!(!watch.has_had_enough(1));
        assert!(watch.observe(2.9));
    }

    #[test]
    fn a_loss_that_grows_past_its_start_is_divergence() {
        let guard = GuardRecipe::default();
        let mut watch = Watch::default();
        watch.begin_stage();
        assert_eq!(watch.diverged(&guard), None);
        watch.observe(2.0);
        watch.observe(3.9);
        assert_eq!(watch.diverged(&guard), None);
        watch.observe(4.1);
        assert!(watch.diverged(&guard).unwrap().contains("from 2.000 to 4.100"));
        assert_eq!(watch.diverged(&GuardRecipe::off()), None);
    }
}
