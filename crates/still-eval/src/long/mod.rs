//! Long-context tasks, generated with the model's own tokenizer: RULER, BABILong, pass keys, repeated text, planted
//! facts.
//!
//! A task is a *family* of prompts that grow with a number of units (lines of noise, words of an essay, documents, …).
//! Each item takes as many units as fit into the length asked for, the answer's tokens left out. Items are a function of
//! the seed, the task and their index: more items begin with the same ones. docs/long_context.md compares templates,
//! counts and metrics with the originals.

mod babilong;
mod cwe;
mod draft;
mod facts;
mod family;
mod fit;
mod fwe;
mod judge;
mod niah;
mod pass_keys;
mod qa;
mod repeated;
mod text;
mod vt;
mod words;

use std::path::PathBuf;

use still_model::Tokenizer;

use crate::error::{EvalError, Result};
use crate::task::{Metric, Task};
use draft::ItemBuilder;
use niah::Niah;
use text::Text;

pub use draft::LongItem;
pub use judge::Judge;
pub use repeated::random_tokens;

/// The tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LongTask {
    /// RULER: one needle in repeated noise.
    NiahSingle1,
    /// RULER: one needle in an essay.
    NiahSingle2,
    /// RULER: one needle in an essay, its value a UUID.
    NiahSingle3,
    /// RULER: four needles with keys of their own in an essay, one asked for.
    NiahMultikey1,
    /// RULER: one needle among needles.
    NiahMultikey2,
    /// RULER: the same, keys and values UUIDs.
    NiahMultikey3,
    /// RULER: four values of one key in an essay.
    NiahMultivalue,
    /// RULER: four needles in an essay, all asked for.
    NiahMultiquery,
    /// RULER: a chain of variable assignments in noise.
    Vt,
    /// RULER: the ten most common words of a list.
    Cwe,
    /// RULER: the three most frequent words of a coded text.
    Fwe,
    /// RULER: questions of SQuAD over many paragraphs.
    Qa1,
    /// RULER: questions of HotpotQA over many paragraphs.
    Qa2,
    /// BABILong: bAbI's task 1 to 5 with its facts scattered in a text.
    BabiLong(u8),
    /// A five-digit key in filler sentences.
    Passkey,
    /// How likely is the second copy of a random sequence?
    RepeatedText,
    /// Ten facts planted in a text, each asked for in words.
    PlantedFacts,
}

/// Files that some of the tasks are made from.
#[derive(Clone, Debug, Default)]
pub struct LongFiles {
    /// Plain text in UTF-8: RULER's essays, BABILong's background.
    pub text: Option<PathBuf>,
    /// Questions in SQuAD's JSON format (1.1 or 2.0).
    pub squad: Option<PathBuf>,
    /// `hotpot_dev_distractor_v1.json`.
    pub hotpotqa: Option<PathBuf>,
    /// Directory with bAbI's `qa1_test.txt` … `qa5_test.txt`.
    pub babi: Option<PathBuf>,
}

/// What items of a task are wanted.
#[derive(Clone, Copy, Debug)]
pub struct LongOptions {
    /// Tokens of prompt and answer together, at most.
    pub length: usize,
    /// Items; fewer if a task's data has no more that fit.
    pub items: usize,
    /// What chance decides is decided by it.
    pub seed: u64,
    /// Prompts are a user's turn in the model's chat template. RULER does so with models that have one.
    pub chat: bool,
}

impl LongTask {
    /// All of them.
    pub const ALL: [Self; 21] = [
        Self::NiahSingle1,
        Self::NiahSingle2,
        Self::NiahSingle3,
        Self::NiahMultikey1,
        Self::NiahMultikey2,
        Self::NiahMultikey3,
        Self::NiahMultivalue,
        Self::NiahMultiquery,
        Self::Vt,
        Self::Cwe,
        Self::Fwe,
        Self::Qa1,
        Self::Qa2,
        Self::BabiLong(1),
        Self::BabiLong(2),
        Self::BabiLong(3),
        Self::BabiLong(4),
        Self::BabiLong(5),
        Self::Passkey,
        Self::RepeatedText,
        Self::PlantedFacts,
    ];

    /// RULER's 13 tasks.
    pub fn ruler() -> &'static [Self] {
        &Self::ALL[..13]
    }

    /// RULER's names; the others' as lm-evaluation-harness has them, where it does.
    pub fn name(self) -> &'static str {
        match self {
            Self::NiahSingle1 => "niah_single_1",
            Self::NiahSingle2 => "niah_single_2",
            Self::NiahSingle3 => "niah_single_3",
            Self::NiahMultikey1 => "niah_multikey_1",
            Self::NiahMultikey2 => "niah_multikey_2",
            Self::NiahMultikey3 => "niah_multikey_3",
            Self::NiahMultivalue => "niah_multivalue",
            Self::NiahMultiquery => "niah_multiquery",
            Self::Vt => "vt",
            Self::Cwe => "cwe",
            Self::Fwe => "fwe",
            Self::Qa1 => "qa_1",
            Self::Qa2 => "qa_2",
            Self::BabiLong(1) => "babilong_qa1",
            Self::BabiLong(2) => "babilong_qa2",
            Self::BabiLong(3) => "babilong_qa3",
            Self::BabiLong(4) => "babilong_qa4",
            Self::BabiLong(_) => "babilong_qa5",
            Self::Passkey => "passkey",
            Self::RepeatedText => "repeated_text",
            Self::PlantedFacts => "planted_facts",
        }
    }

    /// The task of a name: [`LongTask::name`], or what lm-evaluation-harness calls RULER's (`ruler_vt`, `ruler_qa_squad`, …).
    pub fn from_name(name: &str) -> Option<Self> {
        let name = match name {
            "ruler_qa_squad" => "qa_1",
            "ruler_qa_hotpot" => "qa_2",
            other => other.strip_prefix("ruler_").unwrap_or(other),
        };
        Self::ALL.into_iter().find(|task| task.name() == name)
    }

    /// Tokens that an answer may have: RULER's and BABILong's allowances.
    fn new_tokens(self) -> usize {
        match self {
            Self::Vt => 30,
            Self::Cwe => 120,
            Self::Fwe => 50,
            Self::Qa1 | Self::Qa2 => 32,
            Self::BabiLong(_) => 15,
            Self::PlantedFacts => 24,
            // Their items have allowances of their own.
            Self::Passkey | Self::RepeatedText => 0,
            _ => 128,
        }
    }

    /// Whether a file is given for everything that the task is made of: known before a model is loaded or asked.
    ///
    /// # Errors
    /// Names what is not given.
    pub fn check_files(self, files: &LongFiles) -> Result<()> {
        let needed: &[_] = match self {
            Self::NiahSingle2
            | Self::NiahSingle3
            | Self::NiahMultikey1
            | Self::NiahMultivalue
            | Self::NiahMultiquery
            | Self::PlantedFacts => &[(TEXT, &files.text)],
            Self::Qa1 => &[(SQUAD, &files.squad)],
            Self::Qa2 => &[(HOTPOTQA, &files.hotpotqa)],
            Self::BabiLong(_) => &[(BABI, &files.babi), (TEXT, &files.text)],
            _ => &[],
        };
        needed.iter().try_for_each(|&(what, path)| given(self.name(), what, path).map(|_| ()))
    }

    /// Makes the task's items.
    ///
    /// `vocab_size` is the model's (random sequences are drawn from it), `tokenizer` its own.
    ///
    /// # Errors
    /// A file that the task needs and that is missing or malformed; a length that holds no item.
    pub fn build(
        self,
        tokenizer: &Tokenizer,
        vocab_size: usize,
        files: &LongFiles,
        options: LongOptions,
    ) -> Result<Task> {
        let name = self.name();
        let options = match self {
            // A user has no other way to ask a model that has a chat template.
            Self::PlantedFacts => {
                LongOptions { chat: tokenizer.chat_template().is_some(), ..options }
            }
            _ => options,
        };
        let builder = ItemBuilder::new(name, self.new_tokens(), tokenizer, options)?;
        let text = || Text::read(given(name, TEXT, &files.text)?);
        let essay = |make: fn(Text) -> Niah| Ok::<_, EvalError>(make(text()?));
        let items = match self {
            Self::NiahSingle1 => builder.items(&Niah::single_1()),
            Self::NiahSingle2 => builder.items(&essay(Niah::single_2)?),
            Self::NiahSingle3 => builder.items(&essay(Niah::single_3)?),
            Self::NiahMultikey1 => builder.items(&essay(Niah::multikey_1)?),
            Self::NiahMultikey2 => builder.items(&Niah::multikey_2()),
            Self::NiahMultikey3 => builder.items(&Niah::multikey_3()),
            Self::NiahMultivalue => builder.items(&essay(Niah::multivalue)?),
            Self::NiahMultiquery => builder.items(&essay(Niah::multiquery)?),
            Self::Vt => builder.items(&vt::VariableTracking::new(tokenizer)?),
            Self::Cwe => builder.items(&cwe::CommonWords::new(options.length)),
            Self::Fwe => builder.items(&fwe::FrequentWords::new(options.length)),
            Self::Qa1 => builder.items(&qa::Questions::squad(given(name, SQUAD, &files.squad)?)?),
            Self::Qa2 => {
                builder.items(&qa::Questions::hotpotqa(given(name, HOTPOTQA, &files.hotpotqa)?)?)
            }
            Self::BabiLong(number) => {
                let facts = given(name, BABI, &files.babi)?.join(format!("qa{number}_test.txt"));
                builder.items(&babilong::BabiLong::new(number, &facts, text()?, tokenizer)?)
            }
            Self::Passkey => pass_keys::items(tokenizer, options),
            Self::RepeatedText => repeated::items(vocab_size, options),
            Self::PlantedFacts => facts::items(&builder, &text()?),
        }?;
        let metric = if self == Self::RepeatedText { Metric::Perplexity } else { Metric::Score };
        Ok(Task { name: name.into(), items, metrics: vec![metric], length: Some(options.length) })
    }
}

const TEXT: &str = "a plain text to hide things in";
const SQUAD: &str = "questions in SQuAD's JSON format";
const HOTPOTQA: &str = "HotpotQA's hotpot_dev_distractor_v1.json";
const BABI: &str = "the directory of bAbI's test files (qa1_test.txt, …)";

fn given<'a>(
    task: &'static str,
    what: &'static str,
    path: &'a Option<PathBuf>,
) -> Result<&'a PathBuf> {
    path.as_ref().ok_or(EvalError::NoFile { task, what })
}
