//! Arguments and settings of `still eval`.

use std::path::PathBuf;

use clap::Args;
use still_attention::RowDtype;
use still_eval::Factors;
use still_eval::compress::Compression;
use still_eval::long::LongFiles;

use super::plan::{Asked, Questions};
use crate::args::{BATCH, COUNT, TOKENS, seed, whole};
use crate::commands::cache::{CacheArgs, CacheRows};
use crate::commands::model::{ModelArg, Place, PlaceArgs};
use crate::errors::user;

const EXAMPLES: &str = "\
Examples:
  still eval --model my-student --compare base --tasks piqa --out results.json
  still eval --model my-student --tasks perplexity --text a.txt --lengths 4096
  still eval --model my-student --tasks niah_single_1 --lengths 4096,16384
  still eval --model my-student --tasks piqa --samples samples.jsonl --resume
  still eval --model my-student --tasks passkey --ablate router+budgets
  still eval --model base --tasks niah_single_1 --compress snapkv:0.1,h2o:0.1
  still eval --model my-student --efficiency 1024,32768";

/// `still eval`
#[derive(Clone, Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct EvalArgs {
    /// The model.
    #[command(flatten)]
    model: ModelArg,
    /// Where it computes.
    #[command(flatten)]
    device: PlaceArgs,
    /// Items read together on each thread; answers do not depend on it
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = whole(1, BATCH))]
    batch_size: usize,
    /// How exact rows are stored.
    #[command(flatten)]
    cache: CacheArgs,
    /// Seed of the bootstrap and of the items that are generated
    #[arg(long, value_name = "SEED", default_value_t = 0, value_parser = seed)]
    seed: u64,
    /// What is asked.
    #[command(flatten)]
    tasks: TaskArgs,
    /// What else is measured.
    #[command(flatten)]
    comparison: ComparisonArgs,
    /// What is written.
    #[command(flatten)]
    files: FileArgs,
}

/// What is asked.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Tasks")]
struct TaskArgs {
    /// piqa, arc_easy, arc_challenge, hellaswag, winogrande, mmlu, lambada_openai; perplexity; niah_single_1 and RULER's other
    /// twelve (or all of them: ruler), babilong_qa1 to 5 (babilong), passkey, repeated_text, planted_facts
    #[arg(
        long,
        short,
        value_name = "T,…",
        value_delimiter = ',',
        required_unless_present = "efficiency"
    )]
    tasks: Vec<String>,
    /// Tokens of the windows of the task perplexity and of the prompts of long-context tasks; several make several tasks
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "1024", value_parser = whole(1, TOKENS))]
    lengths: Vec<usize>,
    /// Text of the task perplexity and of --branches; what long-context tasks hide things in
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Ask only the first N items of a task; of mmlu N in all, spread over its subjects [default of long-context tasks: 50]
    #[arg(long, value_name = "N", value_parser = whole(1, COUNT))]
    limit: Option<usize>,
    /// Directory with the tasks' data files (docs/evaluation.md says what they hold)
    #[arg(long, value_name = "DIR", default_value = "data")]
    data_dir: PathBuf,
    /// Examples before each question of mmlu [default: 5]; the other tasks have none
    #[arg(long, value_name = "K", value_parser = whole(0, COUNT))]
    shots: Option<usize>,
    /// Slide the windows of the task perplexity by so many tokens, instead of laying them side by side
    #[arg(long, value_name = "N", value_parser = whole(1, TOKENS))]
    stride: Option<usize>,
    /// Questions of the task qa_1, in SQuAD's JSON format
    #[arg(long, value_name = "FILE")]
    squad: Option<PathBuf>,
    /// Questions of the task qa_2: hotpot_dev_distractor_v1.json
    #[arg(long, value_name = "FILE")]
    hotpotqa: Option<PathBuf>,
    /// Directory with bAbI's qa1_test.txt … qa5_test.txt [default: babi in --data-dir]
    #[arg(long, value_name = "DIR")]
    babi: Option<PathBuf>,
    /// Give long-context prompts as a user's turn in the model's chat template
    #[arg(long)]
    chat: bool,
}

/// What else is measured.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Comparisons")]
struct ComparisonArgs {
    /// Models to ask the same; every difference comes with its paired bootstrap interval
    #[arg(long, value_name = "MODEL", num_args = 1..)]
    compare: Vec<String>,
    /// Ask the student with parts of it changed too: branches, router, budgets, cap, feature_map, linear_norm, recall_cache,
    /// one at a time; parts joined by + in every combination, as in router+budgets
    #[arg(long, value_name = "PART,…", value_delimiter = ',')]
    ablate: Vec<String>,
    /// Ask dense models with their cache compressed to a fraction of its bytes too: snapkv (sees the question), kvzip,
    /// duo_attention, h2o, streaming_llm, random, as in kvzip:0.1
    #[arg(long, value_name = "METHOD:FRACTION,…", value_delimiter = ',')]
    compress: Vec<String>,
    /// Show what each branch carries, layer by layer, over the first 2,048 tokens of --text
    #[arg(long, requires = "text")]
    branches: bool,
    /// Time every model's prefill and decode after so many tokens too, and report the bytes of its cache there
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = whole(1, TOKENS))]
    efficiency: Vec<usize>,
}

/// What is written.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Files")]
struct FileArgs {
    /// Write the results here (JSON): `still report eval` draws them
    #[arg(long, short, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Print one JSON object, what --out writes, on stdout instead of the tables
    #[arg(long)]
    json: bool,
    /// Append a line for every answer here, as it comes (JSON lines)
    #[arg(long, value_name = "FILE")]
    samples: Option<PathBuf>,
    /// Go on with the answers that are in the file of --samples
    #[arg(long, requires = "samples")]
    resume: bool,
}

/// What is asked of which models.
#[derive(Debug)]
pub struct Settings {
    /// Each once; the first is compared with the others.
    pub models: Vec<String>,
    pub place: Place,
    /// In the order of `--tasks`.
    pub tasks: Vec<Asked>,
    pub questions: Questions,
    pub factors: Vec<Factors>,
    /// Asked of every dense model.
    pub compressions: Vec<Compression>,
    /// The text over which each branch's share is measured.
    pub branches: Option<PathBuf>,
    pub efficiency: Vec<usize>,
    pub batch_size: usize,
    pub rows: CacheRows,
    pub out: Option<PathBuf>,
    pub json: bool,
    pub samples: Option<PathBuf>,
    pub resume: bool,
    /// Of the bootstrap and of generated items.
    pub seed: u64,
}

impl EvalArgs {
    /// # Errors
    /// Models or tasks named twice, a task that there is not, options of tasks that are not asked, a device that is not there.
    pub fn resolve(self) -> anyhow::Result<Settings> {
        let models: Vec<String> =
            [self.model.model.clone()].into_iter().chain(self.comparison.compare.clone()).collect();
        if let Some((_, twice)) =
            models.iter().enumerate().find(|(n, name)| models[..*n].contains(name))
        {
            return Err(user(
                format!("{twice} is to be compared with itself"),
                "name every model once",
            ));
        }
        let tasks = Asked::of(&self.tasks.tasks)?;
        self.check_options(&tasks)?;
        let factors = self.comparison.ablate.iter().map(|names| names.parse());
        let compressions = self.comparison.compress.iter().map(|text| text.parse());
        let place = self.device.resolve()?;
        Ok(Settings {
            models,
            rows: self.cache.resolve(&place, RowDtype::F32)?,
            place,
            tasks,
            factors: factors.collect::<still_eval::Result<_>>()?,
            compressions: compressions.collect::<still_eval::Result<_>>()?,
            branches: self.tasks.text.clone().filter(|_| self.comparison.branches),
            questions: Questions {
                limit: self.tasks.limit,
                shots: self.tasks.shots,
                lengths: self.tasks.lengths,
                stride: self.tasks.stride,
                files: LongFiles {
                    text: self.tasks.text,
                    squad: self.tasks.squad,
                    hotpotqa: self.tasks.hotpotqa,
                    babi: Some(self.tasks.babi.unwrap_or_else(|| self.tasks.data_dir.join("babi"))),
                },
                data_dir: self.tasks.data_dir,
                chat: self.tasks.chat,
                seed: self.seed,
            },
            efficiency: self.comparison.efficiency,
            batch_size: self.batch_size,
            out: self.files.out,
            json: self.files.json,
            samples: self.files.samples,
            resume: self.files.resume,
            seed: self.seed,
        })
    }

    /// Every option has a task that it is of.
    fn check_options(&self, tasks: &[Asked]) -> anyhow::Result<()> {
        if self.tasks.shots.is_some() && !self.tasks.tasks.iter().any(|name| name == "mmlu") {
            return Err(user("--shots is of mmlu, which is not asked", "leave it out"));
        }
        let perplexity_asked = tasks.contains(&Asked::Perplexity);
        if self.tasks.stride.is_some() && !perplexity_asked {
            return Err(user(
                "--stride is of the task perplexity, which is not asked",
                "add perplexity to --tasks, or leave it out",
            ));
        }
        let long_asked = tasks.iter().any(|task| matches!(task, Asked::Long(_)));
        if self.tasks.text.is_some()
            && !(perplexity_asked || long_asked || self.comparison.branches)
        {
            return Err(user(
                "--text is of perplexity, --branches and the long-context tasks: none is asked",
                "add perplexity to --tasks, or leave it out",
            ));
        }
        let of_long = [
            ("--chat", self.tasks.chat),
            ("--squad", self.tasks.squad.is_some()),
            ("--hotpotqa", self.tasks.hotpotqa.is_some()),
            ("--babi", self.tasks.babi.is_some()),
        ];
        match of_long.iter().find(|(_, given)| *given && !long_asked) {
            Some((flag, _)) => Err(user(
                format!("{flag} is of the long-context tasks: none is asked"),
                "add one to --tasks, or leave it out",
            )),
            None => Ok(()),
        }
    }
}
