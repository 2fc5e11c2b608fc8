//! Output that follows a JSON schema or a grammar.

use std::fmt;

use llguidance::api::TopLevelGrammar;
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};
use still_model::{Constraint, Constraints, Model, ModelError};
use toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};

/// Bytes of a grammar or a schema at most.
const MOST_BYTES: usize = 64 << 10;
/// Brackets within brackets of a grammar at most.
const MOST_DEPTH: usize = 64;
/// Rules of a grammar, and references of a schema, at most: each may lead to the next.
const MOST_RULES: usize = 1000;
/// The library follows brackets, rules and references by recursion. This is enough for the most that there may be.
const STACK_BYTES: usize = 256 << 20;
/// Numbers of a schema are above this: the library computes with negatives in 64 bits, and would call itself for ever.
const BELOW_ALL: f64 = i64::MIN as f64;
/// White space between two parts of JSON: without a limit a small model may write nothing else.
pub(super) const WHITESPACE: &str = r"[\x20\x0A]{1,20}";

/// Makes constraints for one model.
pub struct Grammars {
    factory: ParserFactory,
    end: Vec<u32>,
}

impl fmt::Debug for Grammars {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammars").finish_non_exhaustive()
    }
}

impl Grammars {
    /// Reads the vocabulary: some tenths of a second.
    ///
    /// # Errors
    /// A model without an end-of-sequence token; a vocabulary whose tokens' bytes are not known.
    pub fn new(model: &Model) -> Result<Self, String> {
        let end = model.config().eos_token_ids.clone();
        let Some(&first) = end.first() else {
            return Err(
                "the model has no end-of-sequence token, so that no output could end".into()
            );
        };
        let tokenizer = &model.tokenizer;
        let Some(mut words) = tokenizer.token_bytes() else {
            return Err(
                "the model's tokenizer does not say which bytes its tokens stand for".into()
            );
        };
        for (id, word) in words.iter_mut().enumerate() {
            if tokenizer.is_special(id as u32) || end.contains(&(id as u32)) {
                word.insert(0, TokTrie::SPECIAL_TOKEN_MARKER);
            }
        }
        // Logits may be of more ids than there are tokens.
        words.resize(model.config().vocab_size.max(words.len()), Vec::new());
        let info = TokRxInfo::new(words.len() as u32, first);
        let trie = TokTrie::from(&info, &words).with_eos_tokens(&end);
        let environment: TokEnv = std::sync::Arc::new(ApproximateTokEnv::new(trie));
        let mut factory =
            ParserFactory::new_simple(&environment).map_err(|error| error.to_string())?;
        factory.quiet();
        factory.limits_mut().verbose_errors = false;
        Ok(Self { factory, end })
    }

    /// JSON that a schema describes.
    ///
    /// # Errors
    /// A schema that is malformed, not supported, unsatisfiable or too large.
    pub fn json_schema(&self, schema: &Value) -> Result<Grammar, String> {
        let text = schema.to_string();
        check_size(&text)?;
        check_rules(text.matches("\"$ref\"").count())?;
        check_numbers(schema)?;
        let mut schema = match schema {
            Value::Bool(true) => json!({}),
            schema => schema.clone(),
        };
        if let Some(object) = schema.as_object_mut() {
            object.entry("x-guidance").or_insert(json!({ "whitespace_pattern": WHITESPACE }));
        }
        self.compiled(TopLevelGrammar::from_json_schema(schema))
    }

    /// Any JSON object.
    ///
    /// # Errors
    /// None is known.
    pub fn json_object(&self) -> Result<Grammar, String> {
        self.json_schema(&json!({ "type": "object" }))
    }

    /// Text that a grammar in the library's variant of Lark describes.
    ///
    /// # Errors
    /// A grammar that is malformed or too large.
    pub fn lark(&self, grammar: &str) -> Result<Grammar, String> {
        check_size(grammar)?;
        check_rules(grammar.matches(':').count())?;
        check_depth(grammar)?;
        check_schemas(grammar)?;
        self.compiled(TopLevelGrammar::from_lark(grammar.to_owned()))
    }

    /// Calls of tools: a grammar that the server wrote, of schemas that it did not.
    ///
    /// # Errors
    /// Schemas that are malformed, not supported, unsatisfiable or too large.
    pub fn calls(&self, grammar: &str) -> Result<Grammar, String> {
        check_size(grammar)?;
        check_rules(grammar.matches("\"$ref\"").count() + grammar.matches("%json").count())?;
        check_schemas(grammar)?;
        self.compiled(TopLevelGrammar::from_lark(grammar.to_owned()))
    }

    fn compiled(&self, grammar: TopLevelGrammar) -> Result<Grammar, String> {
        let compile = || {
            let made = llguidance::panic_utils::catch_unwind(std::panic::AssertUnwindSafe(|| {
                self.factory.create_parser(grammar)
            }));
            let mut matcher = Matcher::new(made);
            // A grammar that allows no text at all fails here, not after the prompt was read.
            let first = matcher.compute_mask_or_eos();
            first.map_err(|error| first_line(&error.to_string()))?;
            Ok(Grammar { matcher, end: self.end.clone() })
        };
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("grammar".into()).stack_size(STACK_BYTES);
            let thread = thread.spawn_scoped(scope, compile).map_err(|error| error.to_string())?;
            thread.join().unwrap_or_else(|_| Err("it cannot be compiled".into()))
        })
    }
}

/// A grammar, compiled.
pub struct Grammar {
    matcher: Matcher,
    end: Vec<u32>,
}

impl fmt::Debug for Grammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammar").finish_non_exhaustive()
    }
}

impl Grammar {
    /// What limits the tokens of generations, each by itself.
    pub fn constraints(self) -> Constraints {
        Constraints::new(move || {
            Box::new(Within { matcher: self.matcher.deep_clone(), end: self.end.clone() })
        })
    }
}

fn check_rules(rules: usize) -> Result<(), String> {
    match rules {
        0..=MOST_RULES => Ok(()),
        _ => Err(format!("it has {rules} rules or references, and may have {MOST_RULES}")),
    }
}

fn check_schemas(grammar: &str) -> Result<(), String> {
    for rest in grammar.split("%json").skip(1) {
        // As the library finds the schema; what is none is its error to tell.
        let mut schemas = serde_json::Deserializer::from_str(rest).into_iter::<Value>();
        if let Some(Ok(schema)) = schemas.next() {
            check_numbers(&schema)?;
        }
    }
    Ok(())
}

fn check_numbers(schema: &Value) -> Result<(), String> {
    match schema {
        Value::Number(number) if number.as_f64().is_none_or(|number| number <= BELOW_ALL) => {
            Err(format!("it has the number {number}, and numbers are above {}", i64::MIN))
        }
        Value::Array(items) => items.iter().try_for_each(check_numbers),
        Value::Object(fields) => fields.values().try_for_each(check_numbers),
        _ => Ok(()),
    }
}

fn check_size(text: &str) -> Result<(), String> {
    match text.len() {
        0..=MOST_BYTES => Ok(()),
        bytes => Err(format!("it has {bytes} bytes, and may have {MOST_BYTES}")),
    }
}

fn check_depth(grammar: &str) -> Result<(), String> {
    let (mut depth, mut deepest) = (0_usize, 0);
    for c in grammar.chars() {
        match c {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        deepest = deepest.max(depth);
    }
    match deepest {
        0..=MOST_DEPTH => Ok(()),
        _ => Err(format!("it has {deepest} brackets within each other, and may have {MOST_DEPTH}")),
    }
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}

/// A text within a grammar.
struct Within {
    matcher: Matcher,
    end: Vec<u32>,
}

impl fmt::Debug for Within {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Within").finish_non_exhaustive()
    }
}

impl Constraint for Within {
    fn mask(&mut self, logits: &mut [f32]) -> still_model::Result<()> {
        let mask = self.matcher.compute_mask_or_eos().map_err(failed)?;
        for (id, logit) in logits.iter_mut().enumerate() {
            if id >= mask.len() || !mask.is_allowed(id as u32) {
                *logit = f32::NEG_INFINITY;
            }
        }
        Ok(())
    }

    fn accept(&mut self, id: u32) -> still_model::Result<()> {
        // Nothing comes after the end.
        if self.end.contains(&id) {
            return Ok(());
        }
        self.matcher.consume_token(id).map_err(failed)
    }
}

/// What the error of a generation begins with whose grammar goes beyond its limits.
pub(super) const FAILS: &str = "the output's grammar fails";

fn failed(error: impl fmt::Display) -> ModelError {
    ModelError::Invalid(format!("{FAILS}: {}", first_line(&error.to_string())))
}
