#![doc = include_str!("../README.md")]
//!
//! # Files
//!
//! | file | content |
//! |---|---|
//! | `run` | a whole run: both stages, evaluations, checkpoints |
//! | `transfer` | stage 1 |
//! | `finetune` | stage 2 |
//! | `layer_pass` | one layer of stage 2, forward and backward |
//! | `rotations` | RoPE angles kept for the next sequences of a length |
//! | `loss` | losses and their gradients |
//! | `parameters` | a student whose learned tensors are variables |
//! | `flat` | values in one vector |
//! | `optimizer` | AdamW |
//! | `schedule` | learning rates |
//! | `update` | the end of a step: take it, skip it, or refuse it |
//! | `spikes` | steps with an outlying loss or gradient |
//! | `scalar` | a number on the device that computed it |
//! | `evaluation` | measurements while a run goes on |
//! | `metrics` | reports of a run: steps, evaluations, progress |
//! | `checkpoint` | atomic checkpoints |
//! | `exact` | numbers that a checkpoint gives back bit for bit |
//! | `data` | files to windows of token ids |
//! | `calibrate` | budgets of heads before training |
//! | `recipe` | all settings of a run |
//! | `plan`, `cache_plan` | estimates of a run's parameters, tokens, memory and time, and of its student's cache |
//! | `fits`, `memory` | whether a run fits into memory; how much is free |
//! | `bench` | timed steps |
//! | `gradient_check` | tests of gradients by differences of the loss |
//! | `error` | errors of training |
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

mod bench;
mod cache_plan;
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
pub use cache_plan::CachePlan;
pub use calibrate::{
    Budgets, CalibrateOptions, Calibration, CalibrationPlan, HeadReport, Outcome, Outlook, Phase,
    PhasePlan, calibrate, calibrated_recipe, plan_calibration, plan_training_free,
};
pub use data::{
    DataSummary, Position, Segment, TokenCache, Window, Windows, check_data_file, data_files_in,
    is_data_file,
};
pub use error::{Result, TrainError};
pub use evaluation::{Evaluation, TEACHER_FILE};
pub use finetune::FinetuneStage;
pub use loss::{Target, vocabulary_loss};
pub use memory::free_bytes as free_memory_bytes;
pub use metrics::{Observer, OnItem, Silent, Stage, StepReport};
pub use optimizer::{AdamW, AdamWConfig, Parameters};
pub use plan::{Plan, StagePlan, plan};
pub use recipe::{
    AttentionRecipe, BuiltIn, CalibrationRecipe, CheckpointRecipe, DataRecipe, EvaluationRecipe,
    FinetuneRecipe, GuardRecipe, LossOn, Objective, Recipe, Recompute, Reduction, TransferLoss,
    TransferRecipe,
};
pub use run::{
    RunDir, checkpoint_bytes, linearize, linearize_in, linearize_windows, training_free,
};
pub use scalar::Scalar;
pub use schedule::Schedule;
pub use transfer::{TransferStage, TransferStep};
