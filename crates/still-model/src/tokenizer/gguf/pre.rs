//! How byte-level vocabularies cut a text before the merges (`tokenizer.ggml.pre`).
//!
//! The names are llama.cpp's; the expressions are those of the models' own `tokenizer.json`, which llama.cpp rewrites for
//! an engine of its own.

use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{PreTokenizerWrapper, SplitDelimiterBehavior};

use super::vocabulary::Vocabulary;
use crate::error::Result;

/// A way to cut.
pub(super) struct Pre {
    names: &'static [&'static str],
    cuts: &'static [Cut],
    /// A piece that is a token is not merged from its parts.
    pub ignore_merges: bool,
    /// Documents begin with `bos` where the file does not say.
    pub add_bos: bool,
    /// Characters are composed first.
    pub nfc: bool,
}

#[derive(Clone, Copy)]
enum Cut {
    /// What the expression matches is a piece, and what is between.
    Regex(&'static str),
    /// Every digit is a piece.
    Digits,
    /// GPT-2's words.
    Words,
}

use Cut::{Digits as EachDigit, Regex, Words};

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const SEED_CODER: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+";
const BAILING: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";
const DEEPSEEK_V3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;
/// Han, and what DeepSeek's authors put between U+0800 and it.
const DEEPSEEK_HAN: &str = "[\u{4e00}-\u{9fa5}\u{800}-\u{4e00}\u{ac00}-\u{d7ff}]+";
/// Letters with a case. Those that Unicode composes of others are spelled as numbers.
const DEEPSEEK_LETTERS: &str = r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝ\x{1f5f}-\x{1f7d}ᾀ-ᾴᾶ-\x{1fbc}\x{1fbe}\x{1fc2}-ῄῆ-ῌ\x{1fd0}-\x{1fd3}\x{1fd6}-\x{1fdb}ῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝ\x{2124}\x{2126}\x{2128}\x{212a}-\x{212d}ℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+";
const BLOOM: &str = r" ?[^(\s|.,!?…。，、।۔،)]+";

const PLAIN: Pre = Pre { names: &[], cuts: &[], ignore_merges: false, add_bos: false, nfc: false };

/// All that are known.
static KNOWN: &[Pre] = &[
    Pre {
        names: &["default"],
        cuts: &[Regex(r"[\p{P}\$\+<=>\^~\|]+"), Words, Regex(r"\p{N}+"), Regex("[0-9][0-9][0-9]")],
        ..PLAIN
    },
    Pre {
        names: &[
            "llama3",
            "llama-v3",
            "llama-bpe",
            "falcon3",
            "falcon-h1",
            "pixtral",
            "midm-2.0",
            "lfm2",
        ],
        cuts: &[Regex(LLAMA3)],
        ignore_merges: true,
        add_bos: true,
        ..PLAIN
    },
    Pre { names: &["dbrx", "smaug-bpe", "glm4", "chatglm-bpe"], cuts: &[Regex(LLAMA3)], ..PLAIN },
    Pre {
        names: &[
            "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4", "gigachat", "a.x-4.0",
            "mellum",
        ],
        cuts: &[Words],
        ..PLAIN
    },
    Pre {
        names: &[
            "smollm",
            "starcoder",
            "refact",
            "command-r",
            "codeshell",
            "exaone",
            "minerva-7b",
            "mellum2",
        ],
        cuts: &[EachDigit, Words],
        ..PLAIN
    },
    Pre { names: &["qwen2", "deepseek-r1-qwen"], cuts: &[Regex(QWEN2)], nfc: true, ..PLAIN },
    Pre {
        names: &["stablelm2", "hunyuan", "megrez", "kormo", "solar-open", "grok-2"],
        cuts: &[Regex(QWEN2)],
        ..PLAIN
    },
    Pre { names: &["qwen35"], cuts: &[Regex(QWEN35)], nfc: true, ..PLAIN },
    Pre { names: &["tekken"], cuts: &[Regex(TEKKEN)], ignore_merges: true, add_bos: true, ..PLAIN },
    Pre { names: &["gpt-4o", "llama4", "kanana2", "minimax-m2"], cuts: &[Regex(GPT4O)], ..PLAIN },
    Pre {
        names: &["deepseek-llm"],
        cuts: &[
            Regex(r"[\r\n]"),
            Regex(DEEPSEEK_LETTERS),
            Regex(r"\s?[!-/:-~！-／：-～‘-‟　-。]+"),
            Regex(r"\s+$"),
            Regex(DEEPSEEK_HAN),
            EachDigit,
        ],
        ..PLAIN
    },
    Pre {
        names: &["deepseek-coder"],
        cuts: &[
            Regex(r"[\r\n]"),
            Regex(r"\s?\p{L}+"),
            Regex(r"\s?\p{P}+"),
            Regex(DEEPSEEK_HAN),
            EachDigit,
        ],
        ..PLAIN
    },
    Pre {
        names: &["deepseek-v3", "hunyuan-dense", "joyai-llm"],
        cuts: &[Regex(r"\p{N}{1,3}"), Regex("[一-龥\u{3040}-ゟ゠-ヿ]+"), Regex(DEEPSEEK_V3)],
        ..PLAIN
    },
    Pre {
        names: &["falcon"],
        cuts: &[Regex(r"[\p{P}\$\+<=>\^~\|`]+"), Words, Regex("[0-9][0-9][0-9]")],
        ..PLAIN
    },
    Pre { names: &["seed-coder"], cuts: &[Regex(SEED_CODER)], ..PLAIN },
    Pre { names: &["bailingmoe", "bailingmoe2", "llada-moe"], cuts: &[Regex(BAILING)], ..PLAIN },
    Pre { names: &["bloom", "poro-chat", "gpt3-finnish"], cuts: &[Regex(BLOOM)], ..PLAIN },
    Pre { names: &["viking"], cuts: &[Regex(BLOOM), EachDigit], ..PLAIN },
];

/// The way of a name; without one, llama.cpp's default.
pub(super) fn find(vocabulary: &Vocabulary<'_>, name: Option<&str>) -> Result<&'static Pre> {
    let name = name.unwrap_or("default");
    KNOWN.iter().find(|pre| pre.names.contains(&name)).ok_or_else(|| {
        let known: Vec<_> = KNOWN.iter().flat_map(|pre| pre.names).copied().collect();
        let hint = format!("known: {}; use the safetensors checkpoint", known.join(", "));
        vocabulary.unsupported(format!("tokenizer.ggml.pre \"{name}\""), hint)
    })
}

impl Pre {
    /// The library's steps; the last spells bytes.
    pub fn steps(&self) -> tokenizers::Result<Vec<PreTokenizerWrapper>> {
        let spell = |words| PreTokenizerWrapper::from(ByteLevel::new(false, true, words));
        let mut steps = self
            .cuts
            .iter()
            .map(|cut| match cut {
                EachDigit => Ok(Digits::new(true).into()),
                Words => isolated(GPT2),
                Regex(pattern) => isolated(pattern),
            })
            .collect::<tokenizers::Result<Vec<_>>>()?;
        // The library knows GPT-2's words by itself.
        if matches!(self.cuts.last(), Some(Words)) {
            steps.pop();
            steps.push(spell(true));
        } else {
            steps.push(spell(false));
        }
        Ok(steps)
    }
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

fn isolated(pattern: &str) -> tokenizers::Result<PreTokenizerWrapper> {
    let behavior = SplitDelimiterBehavior::Isolated;
    Ok(Split::new(SplitPattern::Regex(pattern.into()), behavior, false)?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_expression_compiles_and_names_are_unique() {
        let mut names = std::collections::HashSet::new();
        for pre in KNOWN {
            assert!(!pre.cuts.is_empty());
            assert!(pre.steps().unwrap().len() >= pre.cuts.len(), "{:?}", pre.names);
            assert!(pre.names.iter().all(|name| names.insert(name)));
        }
    }
}
