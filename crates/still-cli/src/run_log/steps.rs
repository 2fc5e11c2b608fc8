//! Steps of a run, by stage.

use serde::{Deserialize, Deserializer, Serialize};

/// One line of `metrics.jsonl`.
#[derive(Clone, Debug, Deserialize)]
pub struct Step {
    /// Its stage.
    pub stage: String,
    /// Steps of the stage done, this one included.
    pub step: usize,
    /// Mean squared error per value (transfer) or nats per token (finetune).
    #[serde(deserialize_with = "number")]
    pub loss: f64,
    /// Global norm of the gradient before clipping.
    #[serde(deserialize_with = "number")]
    pub grad_norm: f64,
    /// Learning rate.
    pub lr: f64,
    /// Tokens of the step.
    pub tokens: usize,
    /// Which layers have the losses below; those from 0 on if it does not say.
    #[serde(default)]
    pub layers: Vec<usize>,
    /// Loss of each layer that learns (transfer).
    #[serde(default)]
    pub layer_losses: Vec<f64>,
    /// The step was a spike: the weights were left as they were.
    #[serde(default)]
    pub skipped: bool,
    /// Wall-clock seconds, where the run noted them.
    #[serde(default)]
    pub seconds: Option<f64>,
}

/// JSON has no word for what is not a number but `null`.
fn number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

/// The steps of one stage.
#[derive(Clone, Debug)]
pub struct StageLog {
    /// `"transfer"`, `"finetune"`.
    pub name: String,
    /// In their order.
    pub steps: Vec<Step>,
}

/// How far a layer came in attention transfer.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct LayerLoss {
    /// In the model, counted from 0.
    pub layer: usize,
    /// Mean squared error at the first step.
    pub first_loss: f64,
    /// At the end, on the same windows; of a run that has not come there at the last step, on its own.
    pub last_loss: f64,
    /// Last by first: below 1 is better.
    pub ratio: f64,
}

impl StageLog {
    /// Steps by stage, in the order the stages began.
    pub(super) fn split(steps: Vec<Step>) -> Vec<Self> {
        let mut stages: Vec<Self> = Vec::new();
        for step in steps {
            match stages.iter_mut().find(|stage| stage.name == step.stage) {
                Some(stage) => stage.steps.push(step),
                None => stages.push(Self { name: step.stage.clone(), steps: vec![step] }),
            }
        }
        stages
    }

    /// Steps done.
    pub fn done(&self) -> usize {
        self.steps.iter().map(|step| step.step).max().unwrap_or(0)
    }

    /// Tokens read.
    pub fn tokens(&self) -> usize {
        self.steps.iter().map(|step| step.tokens).sum()
    }

    /// Wall-clock seconds; unknown if a step does not say.
    pub fn seconds(&self) -> Option<f64> {
        self.steps.iter().map(|step| step.seconds).sum()
    }

    /// Steps whose update was made.
    pub fn taken(&self) -> impl DoubleEndedIterator<Item = &Step> {
        self.steps.iter().filter(|step| !step.skipped)
    }

    /// Steps that were left out as spikes.
    pub fn skipped(&self) -> impl Iterator<Item = &Step> {
        self.steps.iter().filter(|step| step.skipped)
    }

    /// First and last loss of every layer; empty where layers have no losses of their own. `end`: those at the stage's end, on the
    /// windows of the first step.
    pub fn layers(&self, end: Option<&[f64]>) -> Vec<LayerLoss> {
        let mut of_layers = self.taken().filter(|step| !step.layer_losses.is_empty());
        let Some(first) = of_layers.next() else { return Vec::new() };
        // A first step that was a spike is not the one whose windows were read again.
        let end = end.filter(|end| first.step == 1 && end.len() == first.layer_losses.len());
        let last = match end {
            Some(end) => end,
            None => &of_layers.next_back().unwrap_or(first).layer_losses,
        };
        let pairs = first.layer_losses.iter().zip(last).enumerate();
        pairs
            .map(|(n, (&first_loss, &last_loss))| LayerLoss {
                layer: first.layers.get(n).copied().unwrap_or(n),
                first_loss,
                last_loss,
                ratio: last_loss / first_loss,
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stages(lines: &[&str]) -> Vec<StageLog> {
        StageLog::split(lines.iter().map(|line| serde_json::from_str(line).unwrap()).collect())
    }

    #[test]
    fn layers_go_from_the_first_to_the_last_step_taken() {
        let stages = stages(&[
            r#"{"stage":"transfer","step":1,"loss":4,"grad_norm":1,"lr":0.1,"tokens":8,"layer_losses":[2,8]}"#,
            r#"{"stage":"transfer","step":2,"loss":2,"grad_norm":1,"lr":0.1,"tokens":8,"layer_losses":[1,2]}"#,
            r#"{"stage":"transfer","step":3,"loss":null,"grad_norm":null,"lr":0.1,"tokens":8,"layer_losses":[99,99],"skipped":true,"later":1}"#,
            r#"{"stage":"finetune","step":1,"loss":1,"grad_norm":1,"lr":0.1,"tokens":8}"#,
        ]);
        assert_eq!(stages.len(), 2);
        assert_eq!((stages[0].done(), stages[0].tokens(), stages[0].seconds()), (3, 24, None));
        assert_eq!(stages[0].skipped().count(), 1);
        let ratios: Vec<_> = stages[0].layers(None).iter().map(|l| (l.layer, l.ratio)).collect();
        assert_eq!(ratios, [(0, 0.5), (1, 0.25)]);
        let same = stages[0].layers(Some(&[1.5, 4.0]));
        assert_eq!(same.iter().map(|layer| layer.ratio).collect::<Vec<_>>(), [0.75, 0.5]);
        assert!(stages[1].layers(None).is_empty());
    }

    #[test]
    fn layers_that_learn_have_their_own_numbers() {
        let line = r#"{"stage":"transfer","step":1,"loss":4,"grad_norm":1,"lr":0.1,"tokens":8,"layers":[5,11],"layer_losses":[2,8]}"#;
        let layers = stages(&[line])[0].layers(None);
        assert_eq!(layers.iter().map(|layer| layer.layer).collect::<Vec<_>>(), [5, 11]);
    }
}
