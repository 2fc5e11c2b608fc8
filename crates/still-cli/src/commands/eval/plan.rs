//! The tasks of an evaluation.

use std::path::PathBuf;
use std::rc::Rc;

use still_eval::long::{LongFiles, LongOptions, LongTask};
use still_eval::task::{STANDARD, StandardOptions, Task, WindowOptions, standard, windows};
use still_model::Model;

use crate::commands::input::read_text;
use crate::errors::user;

/// A task that is asked, by what its name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// One of the usual short tasks.
    Standard(&'static str),
    /// In windows of a text.
    Perplexity,
    /// A long-context task.
    Long(LongTask),
}

impl Asked {
    /// What names stand for, in their order: some for several tasks.
    ///
    /// # Errors
    /// A name that there is not, or one that is given twice.
    pub fn of(names: &[String]) -> anyhow::Result<Vec<Self>> {
        let mut asked = Vec::new();
        for (n, name) in names.iter().enumerate() {
            if names[..n].contains(name) {
                return Err(user(format!("{name} is named twice in --tasks"), "name it once"));
            }
            asked.extend(Self::named(name)?);
        }
        Ok(asked)
    }

    fn named(name: &str) -> anyhow::Result<Vec<Self>> {
        if let Some(name) = STANDARD.into_iter().find(|known| *known == name) {
            return Ok(vec![Self::Standard(name)]);
        }
        let long: Vec<LongTask> = match name {
            "perplexity" => return Ok(vec![Self::Perplexity]),
            "ruler" => LongTask::ruler().to_vec(),
            "babilong" => (1..=5).map(LongTask::BabiLong).collect(),
            other => LongTask::from_name(other).into_iter().collect(),
        };
        if long.is_empty() {
            let known = STANDARD.into_iter().chain(["perplexity", "ruler", "babilong"]);
            let known: Vec<&str> = known.chain(LongTask::ALL.map(LongTask::name)).collect();
            return Err(user(
                format!("no task is called {name}"),
                format!("known: {}", known.join(", ")),
            ));
        }
        Ok(long.into_iter().map(Self::Long).collect())
    }
}

/// What is asked of every task.
#[derive(Clone, Debug)]
pub struct Questions {
    /// Where the usual tasks' data files are.
    pub data_dir: PathBuf,
    /// What long-context tasks are made of; its text is that of perplexity too.
    pub files: LongFiles,
    /// Most items of a task.
    pub limit: Option<usize>,
    /// Examples before each question of mmlu.
    pub shots: Option<usize>,
    /// Tokens of windows and long prompts.
    pub lengths: Vec<usize>,
    /// By which windows slide.
    pub stride: Option<usize>,
    /// Whether long prompts are a user's turn.
    pub chat: bool,
    /// Of generated items.
    pub seed: u64,
}

/// Makes a task for a model.
pub type Make = Box<dyn Fn(&Model) -> still_eval::Result<Task>>;

/// A task, or how to make it for a model: what depends on the tokenizer has to wait for it.
pub enum Plan {
    /// The same for every model.
    Ready(Task),
    /// Made of a model's own tokens.
    Made(Make),
}

impl Plan {
    /// Everything that is asked, in its order; what can be read without a model is read now.
    ///
    /// # Errors
    /// Files that are missing or cannot be used.
    pub fn of(tasks: &[Asked], questions: &Questions) -> anyhow::Result<Vec<Self>> {
        let mut plans = Vec::new();
        for &task in tasks {
            match task {
                Asked::Standard(name) => {
                    let options =
                        StandardOptions { limit: questions.limit, shots: questions.shots };
                    plans.push(Self::Ready(standard(name, &questions.data_dir, &options)?));
                }
                Asked::Perplexity => plans.extend(perplexity(questions)?),
                Asked::Long(task) => {
                    task.check_files(&questions.files)?;
                    plans.extend(long(task, questions));
                }
            }
        }
        Ok(plans)
    }
}

fn perplexity(questions: &Questions) -> anyhow::Result<Vec<Plan>> {
    let Some(path) = &questions.files.text else {
        return Err(user("the task perplexity needs a text", "give one with --text"));
    };
    let text: Rc<str> = read_text(path)?.into();
    let plan = |&length: &usize| {
        let (text, limit, stride) = (text.clone(), questions.limit, questions.stride);
        let options = WindowOptions { length, stride, limit };
        Plan::Made(Box::new(move |model: &Model| windows(&text, &model.tokenizer, &options)))
    };
    Ok(questions.lengths.iter().map(plan).collect())
}

/// Items of a long-context task, if nothing is said.
const LONG_ITEMS: usize = 50;

/// One task for each length.
fn long(task: LongTask, questions: &Questions) -> impl Iterator<Item = Plan> {
    let items = questions.limit.unwrap_or(LONG_ITEMS);
    questions.lengths.iter().map(move |&length| {
        let files = questions.files.clone();
        let options = LongOptions { length, items, seed: questions.seed, chat: questions.chat };
        Plan::Made(Box::new(move |model: &Model| {
            let vocab_size = model.config().vocab_size;
            let mut made = task.build(&model.tokenizer, vocab_size, &files, options)?;
            made.name = format!("{}_{length}", made.name);
            Ok(made)
        }))
    })
}
