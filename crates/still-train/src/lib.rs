//! Two-stage linearization: attention transfer, then low-rank finetuning.

mod calibrate;
mod checkpoint;
mod data;
mod error;
mod finetune;
mod loss;
mod metrics;
mod optimizer;
mod parameters;
mod recipe;
mod run;
mod schedule;
mod transfer;

pub use calibrate::{
    Budgets, CalibrateOptions, Calibration, HeadReport, Phase, calibrate, calibrated_recipe,
};
pub use data::{DataSummary, Position, Segment, TokenCache, Window, Windows};
pub use error::{Result, TrainError};
pub use finetune::FinetuneStage;
pub use loss::{Target, vocabulary_loss};
pub use metrics::{Observer, Silent, Stage, StepReport};
pub use optimizer::{AdamW, AdamWConfig, Parameters};
pub use recipe::{
    AttentionRecipe, CalibrationRecipe, CheckpointRecipe, DataRecipe, FinetuneRecipe, LossOn,
    Objective, Recipe, TransferRecipe,
};
pub use run::{linearize, linearize_windows};
pub use schedule::warmup_cosine;
pub use transfer::{TransferStage, TransferStep};
