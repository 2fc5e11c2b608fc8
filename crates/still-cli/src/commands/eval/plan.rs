//! Which tasks are asked.

use still_eval::task::{STANDARD, StandardOptions, Task, WindowOptions, standard, windows};
use still_model::Model;

use crate::args::EvalArgs;
use crate::commands::read_text;
use crate::errors::user;

/// A task, or how to make it for a model: what depends on the tokenizer has to wait for it.
pub enum Plan {
    /// The same for every model.
    Ready(Task),
    /// Made of a model's own tokens.
    Made(Box<dyn Fn(&Model) -> still_eval::Result<Task>>),
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
        let asks_text = args.tasks.iter().any(|name| name == "perplexity");
        if !asks_text && (args.text.is_some() || args.stride.is_some()) {
            return Err(user(
                "--text and --stride are of the task perplexity, which is not asked",
                "add perplexity to --tasks, or leave them out",
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
                    let known = STANDARD.join(", ");
                    return Err(user(
                        format!("no task is called {other}"),
                        format!("known: {known}, perplexity"),
                    ));
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
