//! What ends a generation: tokens that GGUF files do not name, stop strings that are tokens or lie across tokens.

use std::ops::ControlFlow;
use std::path::Path;

use candle_core::quantized::{GgmlDType, QTensor, gguf_file};
use candle_core::{Device, Tensor};
use gguf_file::Value;
use still_attention::RowDtype;
use still_model::{Finish, GenerateOptions, Generation, Model, generate};

const WIDTH: usize = 32;
/// Ids of the tokens below.
const SOME: [&str; 7] = ["<|eos|>", "<|im_end|>", "<|note|>", "a", "b", "c", "Ġ"];

/// A GGUF file of a model that writes the tokens `cycle` over and over, whatever it is given.
fn write_model(path: &Path, cycle: &[usize]) {
    // A token's embedding is a direction of its own; the head of its successor points there.
    let mut embedding = vec![0_f32; SOME.len() * WIDTH];
    let mut head = embedding.clone();
    for token in 0..SOME.len() {
        embedding[token * WIDTH + token] = 1.0;
        let at = cycle.iter().position(|&id| id == token);
        let next = at.map_or(cycle[0], |at| cycle[(at + 1) % cycle.len()]);
        head[next * WIDTH + token] = 1.0;
    }
    let tensor = |values: Vec<f32>, shape: (usize, usize)| {
        let tensor = Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
        QTensor::quantize(&tensor, GgmlDType::F32).unwrap()
    };
    let norm = || {
        let ones = Tensor::from_vec(vec![1_f32; WIDTH], WIDTH, &Device::Cpu).unwrap();
        QTensor::quantize(&ones, GgmlDType::F32).unwrap()
    };
    let mut tensors = vec![
        ("token_embd.weight".to_owned(), tensor(embedding, (SOME.len(), WIDTH))),
        ("output.weight".to_owned(), tensor(head, (SOME.len(), WIDTH))),
        ("output_norm.weight".to_owned(), norm()),
        ("blk.0.attn_norm.weight".to_owned(), norm()),
        ("blk.0.ffn_norm.weight".to_owned(), norm()),
    ];
    for name in ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"] {
        let zeros = tensor(vec![0.0; WIDTH * WIDTH], (WIDTH, WIDTH));
        tensors.push((format!("blk.0.{name}.weight"), zeros));
    }
    let number = |n: usize| Value::U32(n as u32);
    let texts =
        |all: &[&str]| Value::Array(all.iter().map(|t| Value::String((*t).into())).collect());
    let kinds = SOME.iter().map(|token| Value::I32(if token.starts_with('<') { 3 } else { 1 }));
    let metadata = [
        ("general.architecture", Value::String("llama".into())),
        ("llama.embedding_length", number(WIDTH)),
        ("llama.feed_forward_length", number(WIDTH)),
        ("llama.block_count", number(1)),
        ("llama.attention.head_count", number(1)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
        ("llama.context_length", number(512)),
        ("tokenizer.ggml.model", Value::String("gpt2".into())),
        ("tokenizer.ggml.pre", Value::String("gpt-2".into())),
        ("tokenizer.ggml.tokens", texts(&SOME)),
        ("tokenizer.ggml.token_type", Value::Array(kinds.collect())),
        ("tokenizer.ggml.merges", texts(&[])),
        ("tokenizer.ggml.eos_token_id", number(0)),
    ];
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let mut file = std::fs::File::create(path).unwrap();
    gguf_file::write(&mut file, &metadata, &tensors).unwrap();
}

/// Ten tokens at most; the text must come as it is emitted.
fn run(cycle: &[usize], stop: &[&str]) -> Generation {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    write_model(&path, cycle);
    let model = Model::load(path.to_str().unwrap()).unwrap();
    let mut cache = model.new_cache(1, RowDtype::F32).unwrap();
    let stop = stop.iter().map(|text| (*text).to_owned()).collect();
    let options = GenerateOptions { max_new_tokens: 10, stop, ..GenerateOptions::default() };
    let mut emitted = String::new();
    let generation = generate(&model, &[6], &mut cache, &options, &mut |text| {
        emitted.push_str(text);
        ControlFlow::Continue(())
    });
    let generation = generation.unwrap();
    assert_eq!(emitted, generation.text);
    generation
}

#[test]
fn tokens_that_llama_cpp_knows_end_a_generation_though_no_entry_names_them() {
    let generation = run(&[3, 4, 1, 5], &[]);
    assert_eq!((generation.text.as_str(), &generation.finish), ("ab", &Finish::EndOfSequence));
    // A special token that is none of them does not.
    let generation = run(&[3, 4, 2, 5], &[]);
    assert_eq!((generation.text.as_str(), &generation.finish), ("abcabcab", &Finish::Length));
}

#[test]
fn a_stop_string_may_be_a_special_token() {
    let generation = run(&[3, 4, 2, 5], &["<|note|>"]);
    assert_eq!((generation.text.as_str(), &generation.finish), ("ab", &Finish::StopString));
    assert_eq!((generation.ids.as_slice(), generation.fed), (&[3, 4, 2][..], 2));
    // What was held back, as the beginning of another stop string, is text after all.
    let generation = run(&[3, 4, 2, 5], &["bd", "<|note|>"]);
    assert_eq!((generation.text.as_str(), &generation.finish), ("ab", &Finish::StopString));
}

#[test]
fn a_stop_string_may_be_a_token_or_lie_across_tokens() {
    for (stop, text) in [("b", "a"), ("bc", "a"), ("c a", "ab"), ("ca", ""), ("ab", "")] {
        let generation = run(&[3, 4, 5, 6], &[stop]);
        let expected = if stop == "ca" { "abc abc ab" } else { text };
        assert_eq!(generation.text, expected, "{stop}");
        let finish = if stop == "ca" { Finish::Length } else { Finish::StopString };
        assert_eq!(generation.finish, finish, "{stop}");
    }
    // "Ġ" is the token of a space, and its name is not its text.
    assert_eq!(run(&[3, 4, 5, 6], &["Ġ"]).finish, Finish::Length);
    assert_eq!(run(&[3, 4, 5, 6], &[" "]).text, "abc");
}
