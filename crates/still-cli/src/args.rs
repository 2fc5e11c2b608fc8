//! The command line, declared.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::ranges::{BATCH, COUNT, TOKENS, WIDTH, number, seed, share, whole};

/// Linearize pretrained transformers with STILL, and run the result.
#[derive(Debug, Parser)]
#[command(name = "still", version, about)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Options of every command.
    #[command(flatten)]
    pub global: Global,
}

/// Options of every command.
#[derive(Clone, Copy, Debug, Args)]
pub struct Global {
    /// Say nothing on stderr but warnings and errors
    #[arg(long, short, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
    /// Say more on stderr; twice for everything
    #[arg(long, short, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// Colours on stderr (NO_COLOR is honoured too)
    #[arg(long, global = true, value_enum, default_value_t = Color::Auto)]
    pub color: Color,
    /// Threads that compute, 1 to 1024 [default: RAYON_NUM_THREADS, or as many as the system grants]
    #[arg(long, global = true, value_name = "N")]
    pub threads: Option<usize>,
}

/// When to use colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Color {
    /// On a terminal, unless NO_COLOR is set.
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Linearize a small model on this machine, start to end, and show what each step bought
    Demo(DemoArgs),
    /// Turn a pretrained model into a STILL student
    Linearize(LinearizeArgs),
    /// Find how many tokens each head should keep, at a given share of the dense cache
    Calibrate(CalibrateArgs),
    /// Draw a run of `still linearize` as one HTML page (curves, layers, budgets, evaluations, recipe), or results of `still eval`
    Report(ReportArgs),
    /// Write a student with quantized weights to one .gguf file
    Export(ExportArgs),
    /// Continue a prompt
    Generate(GenerateArgs),
    /// Talk to a model; its attention state is kept between turns
    Chat(ChatArgs),
    /// Show which tokens each layer and head keeps of a text, and why
    Inspect(InspectArgs),
    /// Time reading and writing at several contexts, dense and linearized
    Bench(BenchArgs),
    /// Ask a model the questions of benchmarks, as lm-evaluation-harness does, and compare it with others
    Eval(Box<EvalArgs>),
    /// Show versions, CPU features, devices and where files are cached
    Doctor(DoctorArgs),
}

/// The model to use.
#[derive(Clone, Debug, Args)]
pub struct ModelArg {
    /// Hugging Face directory, .gguf file, hub id (org/name), or a student made by `still linearize`
    #[arg(long, short, value_name = "MODEL")]
    pub model: String,
}

/// Where a model computes.
#[derive(Clone, Debug, Args)]
pub struct DeviceArgs {
    /// cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub device: String,
    /// Number format of base weights and activations [default: f32 on the CPU, bf16 on CUDA]
    #[arg(long, value_name = "DTYPE", value_enum)]
    pub compute_dtype: Option<ComputeDtype>,
}

impl DeviceArgs {
    /// Of commands that only the CPU has.
    pub fn cpu() -> Self {
        Self { device: "cpu".into(), compute_dtype: None }
    }
}

/// Number format of base weights and activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ComputeDtype {
    /// 4 bytes a value.
    F32,
    /// 2 bytes a value; on CUDA alone.
    Bf16,
}

/// `still demo`
#[derive(Clone, Debug, Args)]
pub struct DemoArgs {
    /// Print one JSON object on stdout instead of the table
    #[arg(long)]
    pub json: bool,
    /// Model to linearize instead of the pinned SmolLM2-135M-Instruct
    #[arg(long, short, value_name = "MODEL")]
    pub model: Option<String>,
    /// Stage 1 steps, each of one window of 1024 tokens
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = whole(0, COUNT), allow_negative_numbers = true)]
    pub transfer_steps: usize,
    /// Stage 2 steps, each of one window of 1024 tokens
    #[arg(long, value_name = "N", default_value_t = 6, value_parser = whole(0, COUNT), allow_negative_numbers = true)]
    pub finetune_steps: usize,
    /// Held-out windows of 4096 tokens
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = whole(0, COUNT), allow_negative_numbers = true)]
    pub windows: usize,
    /// Pass keys to ask each model for
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = whole(0, COUNT), allow_negative_numbers = true)]
    pub keys: usize,
    /// Decode steps timed at each context
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = whole(0, COUNT), allow_negative_numbers = true)]
    pub decode_steps: usize,
    /// Seed of everything
    #[arg(long, value_name = "SEED", default_value_t = 0, value_parser = seed, allow_negative_numbers = true)]
    pub seed: u64,
    /// Keep the finished student here
    #[arg(long, short, value_name = "DIR")]
    pub out: Option<PathBuf>,
}

/// `still linearize`
#[derive(Clone, Debug, Args)]
pub struct LinearizeArgs {
    /// The teacher.
    #[command(flatten)]
    pub model: ModelArg,
    /// Where it computes.
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Training data: .txt, .jsonl or .jsonl.zst (a text or chat messages a line), .bin (token ids); several may be
    /// given, mixed by data.weights
    #[arg(long, short, value_name = "FILE", num_args = 1.., required = true)]
    pub data: Vec<PathBuf>,
    /// Where the student is written; must not exist yet
    #[arg(long, short, value_name = "DIR")]
    pub out: PathBuf,
    /// Training recipe (TOML); built-in defaults without it
    #[arg(long, short, value_name = "FILE")]
    pub recipe: Option<PathBuf>,
    /// Override one recipe value, such as --set transfer.steps=200
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Go on from the newest checkpoint of an interrupted run
    #[arg(long)]
    pub resume: bool,
    /// Where checkpoints and metrics go [default: OUT with ".run" appended]
    #[arg(long, value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
    /// Write no TensorBoard event files (they go to the run directory's tensorboard/)
    #[arg(long)]
    pub no_tensorboard: bool,
    /// Write only what differs from the base model, which is named and hashed
    #[arg(long, conflicts_with = "dtype")]
    pub delta: bool,
    /// Weights of a full student
    #[arg(long, value_enum, default_value_t = ExportDtype::F32)]
    pub dtype: ExportDtype,
    /// Replace OUT if it exists
    #[arg(long)]
    pub overwrite: bool,
    /// Say what would be trained and read, and what memory and time it would take; train nothing
    #[arg(long, conflicts_with_all = ["resume", "overwrite"])]
    pub dry_run: bool,
    /// Print one JSON object on stdout
    #[arg(long)]
    pub json: bool,
}

/// `still calibrate`
#[derive(Clone, Debug, Args)]
pub struct CalibrateArgs {
    /// The teacher.
    #[command(flatten)]
    pub model: ModelArg,
    /// Where it computes.
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Text to calibrate on: .txt, .jsonl or .jsonl.zst (field "text"); several may be given
    #[arg(long, short, value_name = "FILE", num_args = 1.., required = true)]
    pub data: Vec<PathBuf>,
    /// Bytes to spend, as a share of the dense cache with 16-bit rows
    #[arg(long, value_name = "SHARE", default_value_t = 0.2, value_parser = share, allow_negative_numbers = true)]
    pub cache_fraction: f64,
    /// Tokens of context at which that share holds, windows and linear states included
    #[arg(long, value_name = "N", default_value_t = 8192, value_parser = whole(1, TOKENS), allow_negative_numbers = true)]
    pub at_length: usize,
    /// Tokens of text to read
    #[arg(long, value_name = "N", default_value_t = 65_536, value_parser = whole(1, TOKENS), allow_negative_numbers = true)]
    pub tokens: usize,
    /// Tokens of a window of text
    #[arg(long, value_name = "N", default_value_t = 2048, value_parser = whole(1, TOKENS), allow_negative_numbers = true)]
    pub window: usize,
    /// Recipe whose attention is calibrated; built-in defaults without it
    #[arg(long, short, value_name = "FILE")]
    pub recipe: Option<PathBuf>,
    /// Override one recipe value, such as --set attention.router=received_attention
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Write the budgets here (JSON)
    #[arg(long, short, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Draw budgets and what decided them, layer by head, as one HTML page
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Replace what exists
    #[arg(long)]
    pub overwrite: bool,
    /// Print one JSON object with every estimate on stdout instead of the table
    #[arg(long)]
    pub json: bool,
}

/// `still report`
#[derive(Clone, Debug, Args)]
pub struct ReportArgs {
    /// Run directory of `still linearize`, of a finished run or one that goes on; or files that `still eval --json` wrote
    #[arg(value_name = "RUN_DIR | EVAL.json …", required = true, num_args = 1..)]
    pub paths: Vec<PathBuf>,
    /// The page to write [default: report.html in RUN_DIR; the first EVAL.json with .html for .json]
    #[arg(long, short, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Write the table of evaluations here too, as Markdown
    #[arg(long, value_name = "FILE")]
    pub markdown: Option<PathBuf>,
    /// Print one JSON object on stdout instead of the tables
    #[arg(long)]
    pub json: bool,
}

/// Number format of exported weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ExportDtype {
    /// 4 bytes a weight.
    F32,
    /// 2 bytes a weight.
    Bf16,
}

/// `still export`
#[derive(Clone, Debug, Args)]
pub struct ExportArgs {
    /// The student.
    #[command(flatten)]
    pub model: ModelArg,
    /// Format of the weights; low-rank updates are merged first
    #[arg(long, value_name = "FORMAT", value_enum)]
    pub gguf: GgufArg,
    /// File to write; its name must end in .gguf
    #[arg(long, short, value_name = "FILE")]
    pub out: PathBuf,
    /// Replace OUT if it exists
    #[arg(long)]
    pub overwrite: bool,
    /// Print one JSON object on stdout
    #[arg(long)]
    pub json: bool,
}

/// Number format of quantized weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[allow(non_camel_case_types, reason = "the names are GGUF's own")]
pub enum GgufArg {
    /// 8 bits a weight and a scale for each 32.
    #[value(name = "q8_0")]
    Q8_0,
    /// 4 bits a weight, scale and minimum for each 32.
    #[value(name = "q4_1")]
    Q4_1,
    /// 4 bits a weight in blocks of 256; q4_1 where rows are no whole blocks.
    #[value(name = "q4_k")]
    Q4K,
}

/// How the next token is chosen.
#[derive(Clone, Debug, Args)]
pub struct SamplingArgs {
    /// Most tokens to generate
    #[arg(long, short = 'n', value_name = "N", default_value_t = 256, value_parser = whole(0, TOKENS), allow_negative_numbers = true)]
    pub max_new_tokens: usize,
    /// 0 takes the likeliest token every time
    #[arg(long, value_name = "T", default_value_t = 0.0, value_parser = number(0.0, 1e6), allow_negative_numbers = true)]
    pub temperature: f64,
    /// Sample among the likeliest tokens that together have this probability
    #[arg(long, value_name = "P", value_parser = share, allow_negative_numbers = true)]
    pub top_p: Option<f64>,
    /// Sample among this many of the likeliest tokens
    #[arg(long, value_name = "K", value_parser = whole(1, TOKENS), allow_negative_numbers = true)]
    pub top_k: Option<usize>,
    /// Seed of the sampling
    #[arg(long, value_name = "SEED", default_value_t = 0, value_parser = seed, allow_negative_numbers = true)]
    pub seed: u64,
    /// End when this text appears (it is not printed); may be repeated
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// How the attention cache stores exact keys and values [default: bf16; on CUDA as --compute-dtype]
    #[arg(long, value_enum)]
    pub cache_dtype: Option<CacheDtype>,
}

/// Number format of exact rows in the attention cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CacheDtype {
    /// 4 bytes a value.
    F32,
    /// 2 bytes a value.
    Bf16,
    /// 2 bytes a value.
    F16,
    /// 1 byte a value; a student's window stays bf16.
    Int8,
}

/// `still generate`
#[derive(Clone, Debug, Args)]
pub struct GenerateArgs {
    /// The model.
    #[command(flatten)]
    pub model: ModelArg,
    /// Where it computes.
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Text to continue; standard input without this and --prompt-file
    #[arg(long, short, value_name = "TEXT", conflicts_with = "prompt_file")]
    pub prompt: Option<String>,
    /// File to continue
    #[arg(long, value_name = "FILE")]
    pub prompt_file: Option<PathBuf>,
    /// Sampling.
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// Print one JSON object at the end instead of streaming text
    #[arg(long)]
    pub json: bool,
}

/// `still chat`
#[derive(Clone, Debug, Args)]
pub struct ChatArgs {
    /// The model.
    #[command(flatten)]
    pub model: ModelArg,
    /// Where it computes.
    #[command(flatten)]
    pub device: DeviceArgs,
    /// System message
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Sampling.
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

/// `still inspect`
#[derive(Clone, Debug, Args)]
pub struct InspectArgs {
    /// The model.
    #[command(flatten)]
    pub model: ModelArg,
    /// Text to read
    #[arg(long, short, value_name = "FILE")]
    pub text: PathBuf,
    /// Write a self-contained HTML page here
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Read at most this many tokens of the text
    #[arg(long, value_name = "N", default_value_t = 2048, value_parser = whole(0, TOKENS), allow_negative_numbers = true)]
    pub max_tokens: usize,
    /// Tokens kept of each chunk of 64, for a model that is not a student yet
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = whole(0, TOKENS), allow_negative_numbers = true)]
    pub budget: usize,
    /// Print one JSON object on stdout
    #[arg(long)]
    pub json: bool,
}

/// `still bench`
#[derive(Clone, Debug, Args)]
pub struct BenchArgs {
    /// Hugging Face directory, .gguf file, hub id (org/name), or a student made by `still linearize`
    #[arg(long, short, value_name = "MODEL", required_unless_present_any = ["shape", "op"])]
    pub model: Option<String>,
    /// Random weights of this shape instead: smollm2-135m, llama-3.2-1b or llama-3.1-8b
    #[arg(long, value_name = "NAME", conflicts_with = "model")]
    pub shape: Option<String>,
    /// One operator of a layer instead of a model.
    #[command(flatten)]
    pub operator: OperatorArgs,
    /// Where it computes.
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Tokens read before decoding [default: 512,2048,4096,7680; with --op 8192,131072 on CUDA, 2048,8192 on the CPU]
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = whole(0, TOKENS), allow_negative_numbers = true)]
    pub contexts: Option<Vec<usize>>,
    /// Tokens decoded at each context
    #[arg(long, value_name = "N", default_value_t = 48, conflicts_with = "op", value_parser = whole(0, TOKENS), allow_negative_numbers = true)]
    pub new_tokens: usize,
    /// Read all contexts first, then decode 16 tokens of each in turn: a drift of the machine's speed is then the same for all
    #[arg(long, conflicts_with_all = ["op", "stages"])]
    pub in_turn: bool,
    /// Sequences read and decoded together
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = whole(0, BATCH), allow_negative_numbers = true)]
    pub batch: usize,
    /// Attention to time, each at every context
    #[arg(
        long,
        value_name = "V,…",
        value_delimiter = ',',
        value_enum,
        default_value = "dense,still"
    )]
    pub variants: Vec<Variant>,
    /// Most salient tokens of each head of the variant `still` [default: no limit]
    #[arg(long, value_name = "N", value_parser = whole(0, TOKENS), allow_negative_numbers = true)]
    pub cap: Option<usize>,
    /// How the attention cache stores exact keys and values [default: bf16; on CUDA as --compute-dtype]
    #[arg(long, value_enum)]
    pub cache_dtype: Option<CacheDtype>,
    /// Time training steps of these stages instead: one sequence of each context, random ids
    #[arg(long, value_name = "S,…", value_delimiter = ',', value_enum, conflicts_with = "op")]
    pub stages: Vec<TrainingStage>,
    /// Steps timed of each stage
    #[arg(long, value_name = "N", default_value_t = 5, requires = "stages", value_parser = whole(1, COUNT), allow_negative_numbers = true)]
    pub steps: usize,
    /// Recipe of the stages (TOML); built-in defaults without it
    #[arg(long, value_name = "FILE", requires = "stages")]
    pub recipe: Option<PathBuf>,
    /// Override one recipe value, such as --set finetune.objective=cross_entropy
    #[arg(long, value_name = "KEY=VALUE", requires = "stages")]
    pub set: Vec<String>,
    /// Print one JSON object a line on stdout instead of the table
    #[arg(long)]
    pub json: bool,
}

/// A stage of training.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TrainingStage {
    /// Attention transfer.
    Transfer,
    /// Low-rank finetuning.
    Finetune,
}

/// `still bench --op`
#[derive(Clone, Debug, Args)]
pub struct OperatorArgs {
    /// Time this operator of one layer alone, at the heads of --shape [default: llama-3.1-8b] or those given
    #[arg(long, value_name = "OP", value_enum, conflicts_with = "model")]
    pub op: Option<Op>,
    /// Query heads of --op
    #[arg(long, value_name = "N", requires = "op", value_parser = whole(0, WIDTH), allow_negative_numbers = true)]
    pub heads: Option<usize>,
    /// Key/value heads of --op
    #[arg(long, value_name = "N", requires = "op", value_parser = whole(0, WIDTH), allow_negative_numbers = true)]
    pub kv_heads: Option<usize>,
    /// Channels of a head of --op
    #[arg(long, value_name = "N", requires = "op", value_parser = whole(0, WIDTH), allow_negative_numbers = true)]
    pub head_dim: Option<usize>,
    /// Salient tokens of every 64 in --op [default: 4]
    #[arg(long, value_name = "N", requires = "op", value_parser = whole(0, TOKENS), allow_negative_numbers = true)]
    pub budget: Option<usize>,
    /// Passes of --op [default: all that a variant has]
    #[arg(long, value_name = "P,…", value_delimiter = ',', value_enum, requires = "op")]
    pub passes: Option<Vec<OpPass>>,
    /// Repetitions of --op that are timed [default: 10]
    #[arg(long, value_name = "N", requires = "op", value_parser = whole(1, COUNT), allow_negative_numbers = true)]
    pub repetitions: Option<usize>,
}

/// Operators that `still bench` times alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Op {
    /// Attention of one layer.
    Attention,
}

/// Passes of an operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OpPass {
    /// Whole sequences.
    Forward,
    /// Whole sequences and the gradients of everything they are made from; of the variant `still`.
    ForwardBackward,
    /// A token after a prefix.
    Decode,
}

/// Attention that `still bench` times.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Variant {
    /// The base's softmax attention.
    Dense,
    /// Nothing but the sliding window.
    Window,
    /// 4 tokens kept of every 64 by every KV head, whatever the model.
    Still,
    /// The student as it is.
    Student,
}

/// `still eval`
#[derive(Clone, Debug, Args)]
pub struct EvalArgs {
    /// The model.
    #[command(flatten)]
    pub model: ModelArg,
    /// Where it computes.
    #[command(flatten)]
    pub device: DeviceArgs,
    /// piqa, arc_easy, arc_challenge, hellaswag, winogrande, mmlu, lambada_openai; perplexity; niah_single_1 and RULER's other
    /// twelve (or all of them: ruler), babilong_qa1 to 5 (babilong), passkey, repeated_text
    #[arg(
        long,
        short,
        value_name = "T,…",
        value_delimiter = ',',
        required_unless_present = "efficiency"
    )]
    pub tasks: Vec<String>,
    /// Directory with the tasks' data files (docs/evaluation.md says what they hold)
    #[arg(long, value_name = "DIR", default_value = "data")]
    pub data_dir: PathBuf,
    /// Ask only the first N items of a task; of mmlu N in all, spread over its subjects [default of long-context tasks: 50]
    #[arg(long, value_name = "N", value_parser = whole(1, COUNT), allow_negative_numbers = true)]
    pub limit: Option<usize>,
    /// Examples before each question of mmlu [default: 5]; the other tasks have none
    #[arg(long, value_name = "K", value_parser = whole(0, COUNT), allow_negative_numbers = true)]
    pub shots: Option<usize>,
    /// Text of the task perplexity and of --branches; what long-context tasks hide things in
    #[arg(long, value_name = "FILE")]
    pub text: Option<PathBuf>,
    /// Tokens of the windows of the task perplexity and of the prompts of long-context tasks; several make several tasks
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "1024", value_parser = whole(1, TOKENS), allow_negative_numbers = true)]
    pub lengths: Vec<usize>,
    /// Slide the windows of the task perplexity by so many tokens, instead of laying them side by side
    #[arg(long, value_name = "N", value_parser = whole(1, TOKENS), allow_negative_numbers = true)]
    pub stride: Option<usize>,
    /// Models to ask the same; every difference comes with its paired bootstrap interval
    #[arg(long, value_name = "MODEL", num_args = 1..)]
    pub compare: Vec<String>,
    /// Questions of the task qa_1, in SQuAD's JSON format
    #[arg(long, value_name = "FILE")]
    pub squad: Option<PathBuf>,
    /// Questions of the task qa_2: hotpot_dev_distractor_v1.json
    #[arg(long, value_name = "FILE")]
    pub hotpotqa: Option<PathBuf>,
    /// Directory with bAbI's qa1_test.txt … qa5_test.txt [default: babi in --data-dir]
    #[arg(long, value_name = "DIR")]
    pub babi: Option<PathBuf>,
    /// Give long-context prompts as a user's turn in the model's chat template
    #[arg(long)]
    pub chat: bool,
    /// Ask the student with parts of it changed too: branches, router, budgets, cap, feature_map, linear_norm, recall_cache,
    /// one at a time; parts joined by + in every combination, as in router+budgets
    #[arg(long, value_name = "PART,…", value_delimiter = ',')]
    pub ablate: Vec<String>,
    /// Show what each branch carries, layer by layer, over the first 2,048 tokens of --text
    #[arg(long, requires = "text")]
    pub branches: bool,
    /// Time every model's prefill and decode after so many tokens too, and tell the bytes of its cache there
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = whole(1, TOKENS), allow_negative_numbers = true)]
    pub efficiency: Vec<usize>,
    /// Items read together on each thread; answers do not depend on it
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = whole(1, BATCH), allow_negative_numbers = true)]
    pub batch_size: usize,
    /// Write the results here (JSON)
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Append a line for every answer here, as it comes (JSON lines)
    #[arg(long, value_name = "FILE")]
    pub samples: Option<PathBuf>,
    /// Go on with the answers that are in the file of --samples
    #[arg(long, requires = "samples")]
    pub resume: bool,
    /// How the attention cache stores exact keys and values [default: f32; on CUDA as --compute-dtype]
    #[arg(long, value_enum)]
    pub cache_dtype: Option<CacheDtype>,
    /// Seed of the bootstrap and of the items that are generated
    #[arg(long, value_name = "SEED", default_value_t = 0, value_parser = seed, allow_negative_numbers = true)]
    pub seed: u64,
}

/// `still doctor`
#[derive(Clone, Debug, Args)]
pub struct DoctorArgs {
    /// Print one JSON object on stdout
    #[arg(long)]
    pub json: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_declaration_is_sound() {
        Cli::command().debug_assert();
    }
}
