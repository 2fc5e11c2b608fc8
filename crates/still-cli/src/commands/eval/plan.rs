//! Which tasks are asked.

use still_eval::long::{LongFiles, LongOptions, LongTask};
use still_eval::task::{STANDARD, StandardOptions, Task, WindowOptions, standard, windows};
use still_model::Model;

use crate::args::EvalArgs;
use crate::commands::read_text;
use crate::errors::user;

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
    /// Everything that `--tasks` names, in its order; what can be read without a model is read now.
    pub fn of(args: &EvalArgs) -> anyhow::Result<Vec<Self>> {
        if args.limit == Some(0) {
            return Err(user("--limit 0 asks nothing", "use 1 or more, or leave it out"));
        }
        if args.shots.is_some() && !args.tasks.iter().any(|name| name == "mmlu") {
            return Err(user("--shots is of mmlu, which is not asked", "leave it out"));
        }
        let perplexity_asked = args.tasks.iter().any(|name| name == "perplexity");
        if args.stride.is_some() && !perplexity_asked {
            return Err(user(
                "--stride is of the task perplexity, which is not asked",
                "add perplexity to --tasks, or leave it out",
            ));
        }
        let long_asked = args.tasks.iter().any(|name| !long_tasks(name).is_empty());
        if args.text.is_some() && !(perplexity_asked || long_asked || args.branches) {
            return Err(user(
                "--text is of perplexity, --branches and the long-context tasks: none is asked",
                "add perplexity to --tasks, or leave it out",
            ));
        }
        let of_long = [
            ("--chat", args.chat),
            ("--squad", args.squad.is_some()),
            ("--hotpotqa", args.hotpotqa.is_some()),
            ("--babi", args.babi.is_some()),
        ];
        if let Some((flag, _)) = of_long.iter().find(|(_, given)| *given && !long_asked) {
            return Err(user(
                format!("{flag} is of the long-context tasks: none is asked"),
                "add one to --tasks, or leave it out",
            ));
        }
        let mut plans = Vec::new();
        for (n, name) in args.tasks.iter().enumerate() {
            if args.tasks[..n].contains(name) {
                return Err(user(format!("{name} is named twice in --tasks"), "name it once"));
            }
            match name.as_str() {
                "perplexity" => plans.extend(perplexity(args)?),
                name if STANDARD.contains(&name) => {
                    let options = StandardOptions { limit: args.limit, shots: args.shots };
                    plans.push(Self::Ready(standard(name, &args.data_dir, &options)?));
                }
                other => {
                    let tasks = long_tasks(other);
                    if tasks.is_empty() {
                        let known = STANDARD.into_iter().chain(["perplexity", "ruler", "babilong"]);
                        let long = LongTask::ALL.map(LongTask::name);
                        let known: Vec<&str> = known.chain(long).collect();
                        return Err(user(
                            format!("no task is called {other}"),
                            format!("known: {}", known.join(", ")),
                        ));
                    }
                    for task in tasks {
                        plans.extend(long(task, args));
                    }
                }
            }
        }
        Ok(plans)
    }
}

fn perplexity(args: &EvalArgs) -> anyhow::Result<Vec<Plan>> {
    let Some(path) = &args.text else {
        return Err(user("the task perplexity needs a text", "give one with --text"));
    };
    let text: std::rc::Rc<str> = read_text(path)?.into();
    let plan = |&length: &usize| {
        let (text, limit, stride) = (text.clone(), args.limit, args.stride);
        let options = WindowOptions { length, stride, limit };
        Plan::Made(Box::new(move |model: &Model| windows(&text, &model.tokenizer, &options)))
    };
    Ok(args.lengths.iter().map(plan).collect())
}

/// Items of a long-context task, if nothing is said.
const LONG_ITEMS: usize = 50;

/// The long-context tasks that a name stands for; none if it is no such name.
fn long_tasks(name: &str) -> Vec<LongTask> {
    match name {
        "ruler" => LongTask::ruler().to_vec(),
        "babilong" => (1..=5).map(LongTask::BabiLong).collect(),
        other => LongTask::from_name(other).into_iter().collect(),
    }
}

/// One task for each length.
fn long(task: LongTask, args: &EvalArgs) -> impl Iterator<Item = Plan> {
    let files = LongFiles {
        text: args.text.clone(),
        squad: args.squad.clone(),
        hotpotqa: args.hotpotqa.clone(),
        babi: Some(args.babi.clone().unwrap_or_else(|| args.data_dir.join("babi"))),
    };
    let (items, seed, chat) = (args.limit.unwrap_or(LONG_ITEMS), args.seed, args.chat);
    args.lengths.iter().map(move |&length| {
        let files = files.clone();
        Plan::Made(Box::new(move |model: &Model| {
            let options = LongOptions { length, items, seed, chat };
            let vocab_size = model.config().vocab_size;
            let mut made = task.build(&model.tokenizer, vocab_size, &files, options)?;
            made.name = format!("{}_{length}", made.name);
            Ok(made)
        }))
    })
}
