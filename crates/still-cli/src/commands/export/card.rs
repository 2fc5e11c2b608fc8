//! The model card of a shared folder, in Markdown with the metadata of model hubs.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use candle_core::DType;
use clap::Args;
use serde_json::Value;
use still_attention::{Mode, StillConfig};
use still_model::{Model, ModelConfig};

use crate::commands::report::tables_of;
use crate::errors::user;

/// What the model card says and the student's files do not.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Model card")]
pub struct About {
    /// The base model, as people find it: org/name or an address
    #[arg(long, value_name = "NAME", conflicts_with = "gguf")]
    base: Option<String>,
    /// License of the base model, as model hubs spell it: apache-2.0
    #[arg(long, value_name = "NAME", conflicts_with = "gguf")]
    license: Option<String>,
    /// What the student was trained on, in words
    #[arg(long, value_name = "TEXT", conflicts_with = "gguf")]
    data: Option<String>,
    /// Files that `still eval --out` wrote: their tables go into the card
    #[arg(long, value_name = "EVAL.json", num_args = 1.., conflicts_with = "gguf")]
    results: Vec<PathBuf>,
    /// The tables, once they are read.
    #[arg(skip)]
    tables: Option<String>,
}

impl About {
    /// Reads what it names, before any work is done.
    ///
    /// # Errors
    /// A file that holds no results; a value of several lines.
    pub fn read(&self) -> anyhow::Result<Self> {
        for (option, value) in
            [("--base", &self.base), ("--license", &self.license), ("--data", &self.data)]
        {
            if value.as_ref().is_some_and(|value| value.chars().any(char::is_control)) {
                return Err(user(format!("{option} is not one line"), "leave out line breaks"));
            }
        }
        let tables = (!self.results.is_empty()).then(|| tables_of(&self.results)).transpose()?;
        Ok(Self { tables, ..self.clone() })
    }

    /// The base model's name: as it was given, or the hub id that it was loaded by.
    fn base(&self, model: &Model) -> Option<String> {
        let source = &model.base.source;
        let hub = source.split('/').count() == 2
            && !source.starts_with(['/', '.', '~'])
            && !Path::new(source).exists();
        self.base.clone().or_else(|| hub.then(|| source.clone()))
    }

    /// What nobody has said.
    pub fn missing(&self, model: &Model) -> Vec<&'static str> {
        let all = [
            (self.base(model).is_some(), "which model is the base (--base)"),
            (self.license.is_some(), "the base's license (--license)"),
            (self.data.is_some(), "what it was trained on (--data)"),
            (self.tables.is_some(), "how good it is (--results)"),
        ];
        all.into_iter().filter(|(said, _)| !said).map(|(_, what)| what).collect()
    }

    /// The card of a student whose folder will be `dir`.
    ///
    /// # Errors
    /// A model without a student.
    pub fn card(&self, model: &Model, dtype: DType, dir: &Path) -> anyhow::Result<String> {
        let student = model.student.as_ref();
        let student = student.ok_or_else(|| anyhow::anyhow!("a model without a student"))?;
        let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let base = self.base(model);
        let unknown = || "not stated".to_owned();
        let mut card = front_matter(base.as_deref(), self.license.as_deref());
        let kind = model.config().architecture.model_type();
        write!(
            card,
            "# {name}\n\nA {kind} model whose softmax attention was replaced by STILL's hybrid attention: a window of the last \
             tokens and the most salient older ones are attended to exactly, all others are summarized in a state of constant \
             size. It was made with `still`.\n\n\
             ## Use\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n\
             tokenizer = AutoTokenizer.from_pretrained(\"{name}\", trust_remote_code=True)\n\
             model = AutoModelForCausalLM.from_pretrained(\"{name}\", trust_remote_code=True)\n```\n\n\
             `trust_remote_code=True` runs the Python files of this folder. It needs torch and transformers 4.57 or later. \
             `still chat --model {name}` opens the folder too, and is faster.\n\n\
             ## What it is\n\n| | |\n|---|---|\n",
        )?;
        let rows = [
            ("base model", base.unwrap_or_else(unknown)),
            ("license of the base", self.license.clone().unwrap_or_else(unknown)),
            ("trained on", trained_on(self.data.as_deref(), student.recipe.as_ref())),
            ("attention", attention(&student.config)),
            ("exact tokens", budgets(&student.config, model.config())),
            ("weights", format!("{}; what the attention learned is f32", dtype.as_str())),
        ];
        for (what, value) in rows {
            writeln!(card, "| {what} | {} |", value.replace('|', "\\|"))?;
        }
        card.push_str("\n`config.json` has the budget of every head (`still.budgets`) and the recipe (`still_recipe`).\n");
        match &self.tables {
            Some(tables) => write!(card, "\n## Evaluations\n\n{}", tables.replace("## ", "### "))?,
            None => card.push_str("\n## Evaluations\n\nNot stated. `still eval` measures it.\n"),
        }
        Ok(card)
    }
}

/// The metadata. A text in JSON is one in YAML.
fn front_matter(base: Option<&str>, license: Option<&str>) -> String {
    let mut text = String::from("---\nlibrary_name: transformers\npipeline_tag: text-generation\n");
    for (key, value) in [("base_model", base), ("license", license)] {
        if let Some(value) = value {
            text.push_str(&format!("{key}: {}\n", Value::from(value)));
        }
    }
    text.push_str("tags:\n- still\n- linear-attention\n- hybrid-attention\n---\n\n");
    text
}

/// The data in words, and what the recipe says of it.
fn trained_on(data: Option<&str>, recipe: Option<&Value>) -> String {
    let mut text = data.unwrap_or("data that is not stated").to_owned();
    let Some(recipe) = recipe else { return text };
    let numbers = |value: &Value| -> Vec<u64> {
        value.as_array().into_iter().flatten().filter_map(Value::as_u64).collect()
    };
    let mut lengths = numbers(&recipe["data"]["lengths"]);
    lengths.extend(recipe["data"]["length"].as_u64().filter(|_| lengths.is_empty()));
    let lengths: Vec<String> = lengths.iter().map(u64::to_string).collect();
    if !lengths.is_empty() {
        text.push_str(&format!("; windows of {} tokens", lengths.join(", ")));
    }
    for (key, stage) in [("transfer", "attention transfer"), ("finetune", "low-rank finetuning")] {
        if let Some(steps) = recipe[key]["steps"].as_u64() {
            text.push_str(&format!("; {steps} steps of {stage}"));
        }
    }
    text
}

/// The attention in a line.
fn attention(still: &StillConfig) -> String {
    if still.mode == Mode::LinearOnly {
        return format!("linear alone, feature map {}", still.feature_map.name());
    }
    let mut text = format!(
        "chunks of {} tokens, ranked by {}, feature map {}",
        still.chunk,
        still.router.in_words(),
        still.feature_map.name()
    );
    if let Some(cap) = still.cap {
        text.push_str(&format!(", at most {cap} exact tokens a head beyond the window"));
    }
    text
}

/// How many heads keep how many tokens of each chunk.
fn budgets(still: &StillConfig, config: &ModelConfig) -> String {
    let mut heads = BTreeMap::<usize, usize>::new();
    for &budget in still.budgets.iter().flatten() {
        *heads.entry(budget).or_default() += 1;
    }
    let all: usize = heads.values().sum();
    let one = |(&budget, &count): (&usize, &usize)| match budget {
        0 => format!("{count} of {all} heads keep none"),
        budget if budget == still.chunk => format!("{count} of {all} keep every token"),
        budget => format!("{count} of {all} keep {budget} of each {}", still.chunk),
    };
    let mut parts: Vec<String> = heads.iter().rev().map(one).collect();
    let sliding = config.num_hidden_layers - config.full_layers().count();
    if sliding > 0 {
        parts.push(format!("{sliding} layers keep the sliding window of the base"));
    }
    parts.join("; ")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_card_says_what_the_recipe_knows() {
        let recipe = json!({ "data": { "length": 1024, "lengths": [1024, 4096] }, "transfer": { "steps": 7 } });
        let text = trained_on(Some("books"), Some(&recipe));
        assert_eq!(text, "books; windows of 1024, 4096 tokens; 7 steps of attention transfer");
        assert_eq!(trained_on(None, None), "data that is not stated");
    }

    #[test]
    fn metadata_is_quoted() {
        let text = front_matter(Some("org/name: x"), Some("apache-2.0"));
        assert!(text.contains("base_model: \"org/name: x\"\nlicense: \"apache-2.0\"\n"), "{text}");
        assert!(!front_matter(None, None).contains("license"));
    }
}
