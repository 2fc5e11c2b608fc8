#![doc = include_str!("../README.md")]
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

mod bench;
mod calibrate;
mod checkpoint;
mod data;
mod error;
mod evaluation;
mod exact;
mod finetune;
mod fits;
mod flat;
#[cfg(test)]
mod gradient_check;
mod layer_pass;
mod loss;
mod memory;
mod metrics;
mod optimizer;
mod parameters;
mod plan;
mod recipe;
mod rotations;
mod run;
mod scalar;
mod schedule;
mod spikes;
mod transfer;
mod update;

pub use bench::{StepTiming, time_steps};
pub use calibrate::{
    Budgets, CalibrateOptions, Calibration, HeadReport, Phase, calibrate, calibrated_recipe,
};
pub use data::{DataSummary, Position, Segment, TokenCache, Window, Windows};
pub use error::{Result, TrainError};
pub use evaluation::Evaluation;
pub use finetune::FinetuneStage;
pub use loss::{Target, vocabulary_loss};
pub use memory::free_bytes as free_memory_bytes;
pub use metrics::{Observer, Silent, Stage, StepReport};
pub use optimizer::{AdamW, AdamWConfig, Parameters};
pub use plan::{Plan, StagePlan, plan};
pub use recipe::{
    AttentionRecipe, CalibrationRecipe, CheckpointRecipe, DataRecipe, EvaluationRecipe,
    FinetuneRecipe, GuardRecipe, LossOn, Objective, Recipe, Recompute, Reduction, TransferLoss,
    TransferRecipe,
};
pub use run::{RunDir, checkpoint_bytes, linearize, linearize_in, linearize_windows};
pub use scalar::Scalar;
pub use schedule::Schedule;
pub use transfer::{TransferStage, TransferStep};
