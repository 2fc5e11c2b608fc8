//! `still bench`: how long things take.

mod attention;
mod model;
mod room;
mod train;

use clap::{Args, Subcommand};
use still_model::Model;
use still_model::random::{random_model_on, shape as shape_of};

use self::attention::AttentionBenchArgs;
use self::model::ModelBenchArgs;
use self::train::TrainBenchArgs;
use super::model::{Place, load};
use crate::errors::user;
use crate::printer::Printer;

const EXAMPLES: &str = "\
Examples:
  still bench model --model my-student --contexts 512,4096
  still bench train --shape llama-3.2-1b --stages finetune
  still bench attention --contexts 2048,8192";

/// `still bench`
#[derive(Clone, Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct BenchArgs {
    /// What is timed.
    #[command(subcommand)]
    what: Bench,
}

/// What is timed.
#[derive(Clone, Debug, Subcommand)]
enum Bench {
    /// Time prefill and decode at several contexts, dense and linearized
    Model(ModelBenchArgs),
    /// Time training steps of each stage, on random ids
    Train(TrainBenchArgs),
    /// Time the attention operator of one layer, compared with what its device reaches at most
    Attention(AttentionBenchArgs),
}

/// Runs the command.
pub fn run(args: BenchArgs, printer: &Printer) -> anyhow::Result<()> {
    match args.what {
        Bench::Model(args) => model::run(&args.resolve()?, printer),
        Bench::Train(args) => train::run(&args.resolve()?, printer),
        Bench::Attention(args) => attention::run(&args.resolve()?, printer),
    }
}

/// A model, or random weights of a known shape.
#[derive(Clone, Debug, Args)]
struct SubjectArgs {
    /// Hugging Face directory, .gguf file, hub id (org/name), or a student made by `still linearize`
    #[arg(long, short, value_name = "MODEL", required_unless_present = "shape")]
    model: Option<String>,
    /// Random weights of this shape instead: smollm2-135m, llama-3.2-1b or llama-3.1-8b
    #[arg(long, value_name = "NAME", conflicts_with = "model")]
    shape: Option<String>,
}

impl SubjectArgs {
    /// Loads the model or makes it.
    ///
    /// # Errors
    /// A model or shape that is not there.
    fn load(&self, place: &Place, printer: &Printer) -> anyhow::Result<Model> {
        match (&self.model, &self.shape) {
            (Some(model), _) => load(model, place, printer),
            (None, Some(shape)) => {
                let config = shape_of(shape)?;
                printer.step("Making", format_args!("random weights of {shape}"));
                Ok(random_model_on(config, &place.device, place.dtype)?)
            }
            (None, None) => {
                Err(user("there is no model to time", "give --model MODEL or --shape NAME"))
            }
        }
    }
}

/// An error if `count`s are not all above 0.
fn something_to_time(counts: &[usize]) -> anyhow::Result<()> {
    if counts.contains(&0) {
        return Err(user("there is nothing to time", "give contexts and counts above 0"));
    }
    Ok(())
}
