//! `still bench`: timings.

mod attention;
mod model;
mod room;
mod train;

use clap::{Args, Subcommand};
use still_model::random::{random_model_on, shape as shape_of};
use still_model::{Model, reset_peak_device_bytes};

use self::attention::AttentionBenchArgs;
use self::model::ModelBenchArgs;
use self::train::TrainBenchArgs;
use super::cache::CacheArgs;
use super::model::{Place, PlaceArgs, load, report_weights};
use crate::args::{BATCH, TOKENS, whole};
use crate::errors::user;
use crate::printer::Printer;
use crate::progress::Bar;

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

/// Of `model` and `train`: a model, or random weights of a known shape, and the contexts at which it is timed.
#[derive(Clone, Debug, Args)]
struct SubjectArgs {
    /// Hugging Face directory, .gguf file, hub id (org/name), or a student made by `still linearize`
    #[arg(long, short, value_name = "MODEL", required_unless_present = "shape")]
    model: Option<String>,
    /// Random weights of this shape instead: smollm2-135m, llama-3.2-1b or llama-3.1-8b
    #[arg(long, value_name = "NAME", conflicts_with = "model")]
    shape: Option<String>,
    /// Where it computes.
    #[command(flatten)]
    device: PlaceArgs,
    /// Tokens of a sequence; of `bench model` those that are read before decoding
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "512,2048,4096,7680", value_parser = whole(0, TOKENS))]
    contexts: Vec<usize>,
}

/// What is timed, where and at which contexts.
#[derive(Debug)]
struct Subject {
    model: Option<String>,
    shape: Option<String>,
    place: Place,
    contexts: Vec<usize>,
}

/// Of `model` and `attention`: what an attention cache is like.
#[derive(Clone, Debug, Args)]
struct StateArgs {
    /// Sequences that are read and decoded together
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = whole(0, BATCH))]
    batch: usize,
    /// Most salient tokens of each head of the variant `still` [default: no limit]
    #[arg(long, value_name = "N", value_parser = whole(0, TOKENS))]
    cap: Option<usize>,
    /// How exact rows are stored.
    #[command(flatten)]
    cache: CacheArgs,
}

/// How results are printed.
#[derive(Clone, Copy, Debug, Args)]
struct OutputArgs {
    /// Print one JSON object a line on stdout instead of the table
    #[arg(long)]
    json: bool,
}

impl SubjectArgs {
    /// # Errors
    /// Contexts of nothing; a device that is not there.
    fn resolve(self) -> anyhow::Result<Subject> {
        something_to_time(&self.contexts)?;
        Ok(Subject {
            model: self.model,
            shape: self.shape,
            place: self.device.resolve()?,
            contexts: self.contexts,
        })
    }
}

impl Subject {
    /// Loads the model or makes it.
    ///
    /// # Errors
    /// A model or shape that is not there.
    fn load(&self, printer: &Printer) -> anyhow::Result<Model> {
        let place = &self.place;
        match (&self.model, &self.shape) {
            (Some(model), _) => load(model, place, printer),
            (None, Some(shape)) => {
                let config = shape_of(shape)?;
                let weights = format!("random weights of {shape}");
                let bar = Bar::uncounted(printer, "Making", &weights);
                let model = random_model_on(config, &place.device, place.dtype, place.weights)?;
                drop(bar);
                report_weights(&model, printer);
                // What they were made from is gone.
                reset_peak_device_bytes(&place.device)?;
                Ok(model)
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
