//! GGUF files that contradict themselves: each is an error that names the file and what is wrong in it. Nothing a file says
//! may crash the reader.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use candle_core::{Device, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use still_attention::RowDtype;
use still_model::{Model, ModelError, Result};

use crate::common::{Entry, Gguf, array, f32, f64, flag, i32, text, texts, u8, u32, u64};

fn load(dir: &Path, bytes: &[u8]) -> Result<Model> {
    let path = dir.join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    Model::load(path.to_str().unwrap())
}

/// The error names the file and `what`, and says what to do.
fn refused(file: &Gguf, what: &str) -> ModelError {
    let dir = tempfile::tempdir().unwrap();
    let error = load(dir.path(), &file.bytes()).expect_err(what);
    let said = error.to_string();
    assert!(said.contains("model.gguf") && said.contains(what), "{what}: {said}");
    assert!(!said.contains('\n') && error.hint().is_some(), "{said}");
    error
}

fn logits(model: &Model) -> Vec<f32> {
    let ids = Tensor::new(&[[5_u32, 9, 63]], &Device::Cpu).unwrap();
    let mut cache = model.new_cache(1, RowDtype::F32).unwrap();
    let hidden = model.forward(&ids, &mut cache, None).unwrap();
    model.logits(&hidden).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn the_sound_file_is_read_in_every_version_and_alignment() {
    let dir = tempfile::tempdir().unwrap();
    let tiny = Gguf::tiny();
    let model = load(dir.path(), &tiny.bytes()).unwrap();
    let config = model.config();
    assert_eq!((config.head_dim, config.num_key_value_heads, config.vocab_size), (16, 1, 64));
    assert_eq!((config.bos_token_id, &config.eos_token_ids[..]), (Some(0), &[1][..]));
    assert_eq!((config.rms_norm_eps, config.rope_theta), (1e-5, 10_000.0));
    assert_eq!(model.tokenizer.encode("abc", false).unwrap(), [3]);
    let expected = logits(&model);
    for alignment in [1, 8, 4096] {
        let mut file = tiny.clone().with("general.alignment", u32(alignment));
        file.alignment = alignment as usize;
        file.version = 2;
        assert_eq!(logits(&load(dir.path(), &file.bytes()).unwrap()), expected);
    }
    // Integers of another width are integers; sizes given for each layer may agree.
    let file = tiny
        .with("llama.block_count", u64(2))
        .with("llama.embedding_length", i32(32))
        .with("llama.attention.head_count", array(4, &[u32(2), u32(2)]))
        .with("llama.feed_forward_length", array(5, &[i32(64), i32(64)]))
        .with("llama.attention.scale", f32(0.0))
        .with("llama.expert_count", u32(0))
        .with("llama.attention.causal", flag(1));
    assert_eq!(logits(&load(dir.path(), &file.bytes()).unwrap()), expected);
}

#[test]
fn metadata_of_the_wrong_type_or_range_names_its_key() {
    let nothing = [text("2"), f32(2.0), flag(1), u32(0), i32(-2), u64(1 << 40), array(4, &[])];
    for key in [
        "llama.block_count",
        "llama.context_length",
        "llama.embedding_length",
        "llama.feed_forward_length",
        "llama.attention.head_count",
        "llama.attention.head_count_kv",
        "llama.attention.key_length",
        "llama.rope.dimension_count",
    ] {
        for value in &nothing {
            refused(&Gguf::tiny().with(key, value.clone()), key);
        }
    }
    for key in [
        "llama.block_count",
        "llama.context_length",
        "llama.embedding_length",
        "llama.feed_forward_length",
        "llama.attention.head_count",
        "general.architecture",
        "tokenizer.ggml.model",
        "tokenizer.ggml.tokens",
    ] {
        refused(&Gguf::tiny().without(key), key);
    }
    for (key, values) in [
        ("general.architecture", vec![u32(1), flag(1)]),
        ("general.alignment", vec![u32(0), u32(24), i32(-32), text("32"), u8(32), u64(32)]),
        (
            "llama.attention.layer_norm_rms_epsilon",
            vec![f32(f32::NAN), f32(-1e-5), f32(1e30), u32(1), text("1e-5"), f64(1e308)],
        ),
        (
            "llama.rope.freq_base",
            vec![f32(0.0), f32(-1.0), f32(f32::INFINITY), f64(f64::NAN), u32(10_000)],
        ),
        ("llama.rope.scaling.type", vec![u32(1), text("yarn"), text("longrope")]),
        ("llama.rope.scaling.factor", vec![f32(-2.0), f32(f32::NAN), u32(2), text("2")]),
        ("llama.rope.scale_linear", vec![f32(-2.0), u32(2)]),
        ("llama.rope.scaling.attn_factor", vec![f32(0.5), u32(1)]),
        ("llama.rope.dimension_count", vec![u32(8)]),
        ("llama.attention.value_length", vec![u32(8)]),
        (
            "llama.attention.head_count",
            vec![u32(3), array(4, &[u32(2)]), array(4, &[u32(2), u32(0)])],
        ),
        (
            "llama.attention.head_count_kv",
            vec![array(4, &[u32(1), u32(2)]), array(8, &[text("1"), text("1")])],
        ),
        ("llama.attention.scale", vec![f32(0.25)]),
        ("llama.attention.causal", vec![flag(0), u32(1)]),
        ("llama.attention.sliding_window", vec![u32(64), i32(-1), f32(64.0)]),
        ("llama.expert_count", vec![u32(8)]),
        ("llama.block_count", vec![u32(1), u32(3), u32(u32::MAX)]),
        ("tokenizer.ggml.tokens", vec![text("a"), array(4, &[u32(1)]), texts(["a", "b"])]),
        ("tokenizer.ggml.bos_token_id", vec![u32(64), i32(-1), f32(1.0), u64(1 << 32)]),
        ("tokenizer.ggml.eos_token_id", vec![u32(u32::MAX), text("</s>")]),
    ] {
        for value in values {
            refused(&Gguf::tiny().with(key, value), key);
        }
    }
    refused(&Gguf::tiny().with("llama.attention.head_count_kv", u32(4)), "num_key_value_heads 4");
    refused(&Gguf::tiny().with("llama.attention.causal", flag(2)), "llama.attention.causal");
    for name in ["gemma2", "mistral", ""] {
        refused(&Gguf::tiny().with("general.architecture", text(name)), "architecture \"");
    }
}

#[test]
fn tensors_that_contradict_the_file_are_named() {
    let tiny = Gguf::tiny;
    let q = "blk.1.attn_q.weight";
    // In themselves.
    refused(&tiny().tensor("blk.0.attn_norm.weight", |norm| norm.dims.clear()), "blk.0.attn_norm");
    refused(&tiny().tensor(q, |q| q.dims = vec![32, 0]), q);
    refused(&tiny().tensor(q, |q| q.dims = vec![1 << 40, 1 << 40]), q);
    refused(&tiny().tensor(q, |q| q.dims = vec![32, 1, 1, 1, 32]), q);
    // As many values, but in rows that are no whole blocks.
    refused(&tiny().tensor(q, |q| q.dims = vec![16, 64]), "whole blocks of 32");
    for (kind, name) in [(9, "Q8_1"), (15, "Q8_K"), (20, "IQ4_NL"), (28, "F64"), (39, "MXFP4")] {
        let error = refused(&tiny().tensor(q, |q| q.kind = kind), name);
        assert!(error.hint().unwrap().contains("Q4_0"), "{error}");
    }
    refused(&tiny().tensor(q, |q| q.kind = 1234), "type 1234");
    refused(&tiny().tensor(q, |q| q.kind = 10), "blocks of 256");
    // In the file.
    for offset in [7, u64::MAX, u64::MAX - 31, 1 << 40] {
        refused(&tiny().tensor(q, |q| q.offset = Some(offset)), q);
    }
    refused(&tiny().tensor(q, |q| q.offset = Some(0)), "overlap");
    let twice = |mut file: Gguf| {
        file.tensors.push(file.tensors[4].clone());
        file
    };
    refused(&twice(tiny()), "twice");
    let mut keys = tiny();
    keys.entries.push(("llama.block_count".into(), u32(2)));
    refused(&keys, "llama.block_count is there twice");
    // In the model.
    refused(&tiny().tensor(q, |q| q.dims = vec![32, 16]), q);
    refused(&tiny().tensor(q, |q| q.dims = vec![32, 32, 1]), q);
    refused(&tiny().tensor(q, |q| q.name = "blk.1.attn_qkv.weight".into()), q);
    refused(&tiny().tensor(q, |q| q.name = "a\u{1b}[31m".into()), "is not a name");
    refused(&tiny().tensor("token_embd.weight", |t| t.dims = vec![64 * 32]), "token_embd.weight");
    let with = |entry| {
        let mut file = tiny();
        file.tensors.push(entry);
        file
    };
    for extra in
        ["blk.0.attn_sinks.weight", "blk.0.ffn_gate_inp.weight", "rope_factors_long.weight"]
    {
        refused(&with(Entry::f32(extra, &[8], |_| 1.0)), extra);
    }
    refused(&with(Entry::f32("blk.2.attn_norm.weight", &[32], |_| 1.0)), "tensors of 3 layers");
    let far = with(Entry::f32("blk.4294967294.attn_norm.weight", &[32], |_| 1.0));
    refused(&far.with("llama.block_count", u32(u32::MAX)), "llama.block_count");
}

#[test]
fn headers_of_other_kinds_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    for (version, what) in [(3_u32.swap_bytes(), "big-endian"), (0, "version 0"), (4, "version 4")]
    {
        let mut file = Gguf::tiny();
        file.version = version;
        refused(&file, what);
    }
    // Arrays of arrays, and more elements than fit in memory at 32 bytes each.
    let mut nested = u32(1);
    for _ in 0..8 {
        nested = array(9, &[nested]);
    }
    refused(&Gguf::tiny().with("nested", nested), "nested");
    let mut many = [9_u32.to_le_bytes(), 0_u32.to_le_bytes()].concat();
    many.extend((1_u64 << 25).to_le_bytes());
    many.resize(many.len() + (1 << 25), 7);
    refused(&Gguf::tiny().with("many", many), "many");
    assert!(load(dir.path(), b"GGUF").is_err());
}

/// A few thousand files that differ from a sound one by a few bytes, mostly of the header.
#[test]
fn no_mutation_crashes_the_reader() {
    let dir = tempfile::tempdir().unwrap();
    let sound = Gguf::tiny().bytes();
    let header =
        sound.windows(18).rposition(|window| window == b"blk.1.ffn_down.wei").unwrap() + 64;
    let mut loaded = 0;
    for seed in 0..2000 {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut bytes = sound.clone();
        for _ in 0..rng.random_range(1..4) {
            let within = if rng.random_bool(0.95) { header } else { bytes.len() };
            let at = rng.random_range(0..within.min(bytes.len()));
            match rng.random_range(0..5) {
                0 => bytes[at] ^= 1 << rng.random_range(0..8),
                1 => bytes[at] = rng.random(),
                2 => {
                    // A number of any size, where numbers are likely.
                    let number = [0, 1, u64::MAX, 1 << 31, 1 << 62][rng.random_range(0..5)];
                    let end = (at + 8).min(bytes.len());
                    bytes[at..end].copy_from_slice(&number.to_le_bytes()[..end - at]);
                }
                3 => {
                    let length = rng.random_range(1..40).min(bytes.len() - at);
                    let from = rng.random_range(0..bytes.len() - length);
                    let copied = bytes[from..from + length].to_vec();
                    bytes[at..at + length].copy_from_slice(&copied);
                }
                _ => bytes.truncate(at.max(1)),
            }
        }
        let outcome = catch_unwind(AssertUnwindSafe(|| match load(dir.path(), &bytes) {
            Ok(model) => {
                logits(&model);
                true
            }
            Err(error) => {
                assert!(error.to_string().contains("model.gguf"), "{error}");
                assert!(error.hint().is_some(), "{error}");
                false
            }
        }));
        match outcome {
            Ok(sound) => loaded += usize::from(sound),
            Err(_) => panic!("seed {seed}"),
        }
    }
    // Names of tokens and numbers of weights may change unnoticed.
    assert!(loaded > 50 && loaded < 1500, "{loaded} of 2000 were read");
}
