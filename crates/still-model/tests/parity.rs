//! The whole model: prefill = chunked prefill = token by token, and a batch = each alone.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use candle_core::{Device, Tensor};
use still_attention::{RowDtype, StillConfig};
use still_model::random::{random_model, tiny_config};
use still_model::{
    Architecture, Cache, Cancel, ChatSession, FeatureInit, Finish, GenerateOptions, LoraConfig,
    LoraTarget, Model, ModelConfig, ModelError, OnRead, Student, generate,
};
use still_testing::assert_relative_rms;

/// Students with an output gate and low-rank updates that are not zero, over a base with biases and over one with norms
/// on its heads, which are wider than its hidden size divides into.
fn updated_students() -> [Model; 2] {
    let biased = ModelConfig {
        attention_bias: true,
        attention_output_bias: true,
        mlp_bias: true,
        ..tiny_config()
    };
    let normed = ModelConfig { architecture: Architecture::Qwen3, head_dim: 12, ..tiny_config() };
    [biased, normed].map(|config| {
        let teacher = random_model(config, 4).unwrap();
        let config = teacher.config();
        let mut still = StillConfig::uniform(config.num_hidden_layers, config.geometry(), 8, 2);
        still.gate = true;
        let mut student = Student::init(still, config, FeatureInit::Normal, 5).unwrap();
        let lora = LoraConfig { rank: 2, alpha: 4.0, targets: LoraTarget::ALL.to_vec() };
        student.add_lora(config, lora, 6).unwrap();
        let student = student.map_tensors(|_, tensor| Ok((tensor + 0.01)?)).unwrap();
        teacher.with_student(student)
    })
}

fn models() -> [Model; 2] {
    let teacher = random_model(tiny_config(), 4).unwrap();
    let config = teacher.config();
    let still = StillConfig::uniform(config.num_hidden_layers, config.geometry(), 8, 2);
    let student = Student::init(still, config, FeatureInit::Normal, 5).unwrap();
    let student = teacher.with_student(student);
    [teacher, student]
}

fn ids(tokens: usize, seed: usize) -> Vec<u32> {
    (0..tokens).map(|t| ((t * t + seed * 31 + t * 7) % 256) as u32).collect()
}

fn feed(model: &Model, cache: &mut Cache, ids: &[u32]) -> Vec<Vec<f32>> {
    let ids = Tensor::new(ids, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    model.forward(&ids, cache, None).unwrap().squeeze(0).unwrap().to_vec2().unwrap()
}

fn assert_close(got: &[Vec<f32>], expected: &[Vec<f32>]) {
    assert_relative_rms("hidden states", got, expected, 1e-5);
}

#[test]
fn any_split_of_a_prompt_gives_the_same_hidden_states() {
    for model in models().into_iter().chain(updated_students()) {
        let ids = ids(75, 1);
        let whole = feed(&model, &mut model.new_cache(1, RowDtype::F32).unwrap(), &ids);
        for sizes in [vec![75], vec![1; 75], vec![8, 1, 30, 36], vec![64, 11]] {
            let mut cache = model.new_cache(1, RowDtype::F32).unwrap();
            let mut parts = Vec::new();
            let mut start = 0;
            for size in sizes {
                parts.extend(feed(&model, &mut cache, &ids[start..start + size]));
                start += size;
            }
            assert_eq!(cache.position(0), 75);
            assert_close(&parts, &whole);
        }
    }
}

/// Hidden states of a sequence read on `threads` threads after one token, and the state's bytes.
fn read(model: &Model, ids: &[u32], threads: usize) -> (Vec<Vec<f32>>, usize) {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let mut cache = model.new_cache(1, RowDtype::F32).unwrap();
    let first = feed(model, &mut cache, &ids[..1]);
    let blocks = Mutex::new(BTreeMap::new());
    pool.install(|| {
        model.read(&ids[1..], &mut cache, |start, hidden| {
            blocks.lock().unwrap().insert(start, hidden.to_vec2()?);
            Ok::<_, ModelError>(())
        })
    })
    .unwrap();
    assert_eq!(cache.position(0), ids.len());
    let rest = blocks.into_inner().unwrap().into_values().flatten();
    (first.into_iter().chain(rest).collect(), cache.size_bytes())
}

#[test]
fn reading_in_lanes_equals_one_pass_whatever_the_threads() {
    for model in models().into_iter().chain(updated_students()) {
        let ids = ids(1100, 1);
        let mut cache = model.new_cache(1, RowDtype::F32).unwrap();
        let whole = feed(&model, &mut cache, &ids);
        let (one, bytes) = read(&model, &ids, 1);
        assert_eq!(bytes, cache.size_bytes());
        assert_close(&one, &whole);
        for threads in [2, 3, 7] {
            assert_eq!(read(&model, &ids, threads), (one.clone(), bytes), "{threads} threads");
        }
    }
}

/// Prefill leaves out what only other tokens' hidden states need.
#[test]
fn prefill_leaves_what_reading_every_hidden_state_leaves() {
    for model in models().into_iter().chain(updated_students()) {
        for tokens in [200, 512, 1100] {
            let ids = ids(tokens, 1);
            let mut read = model.new_cache(1, RowDtype::F32).unwrap();
            let last = Mutex::new(None);
            let keep_last = |start: usize, hidden: Tensor| {
                if start + hidden.dim(0)? == tokens {
                    *last.lock().unwrap() = Some(hidden.to_vec2::<f32>()?.pop().unwrap());
                }
                Ok::<_, ModelError>(())
            };
            model.read(&ids, &mut read, keep_last).unwrap();
            let told = Arc::new(AtomicUsize::new(0));
            let counts = told.clone();
            let on_read = OnRead::new(move |more, of| {
                assert_eq!(of, tokens);
                counts.fetch_add(more, Ordering::Relaxed);
            });
            let mut cache = model.new_cache(1, RowDtype::F32).unwrap();
            let cancel = Cancel::default();
            let hidden = model.prefill_until(&ids, &mut cache, &cancel, &on_read).unwrap();
            assert_eq!(told.load(Ordering::Relaxed), tokens);
            assert_eq!(hidden.to_vec2::<f32>().unwrap().pop(), last.into_inner().unwrap());
            assert_eq!(feed(&model, &mut cache, &[7, 8]), feed(&model, &mut read, &[7, 8]));
        }
    }
}

#[test]
fn a_lane_that_fails_ends_them_all() {
    let [teacher, student] = models();
    for model in [teacher, student] {
        let mut cache = model.new_cache(1, RowDtype::F32).unwrap();
        let mut ids = ids(1500, 1);
        let refuse = |start: usize, _| match start {
            512.. => Err(ModelError::Invalid("enough".into())),
            _ => Ok(()),
        };
        let error = model.read(&ids, &mut cache, refuse).unwrap_err();
        assert_eq!(error.to_string(), "enough");
        ids[700] = 9999;
        let mut cache = model.new_cache(1, RowDtype::F32).unwrap();
        let error = model.prefill(&ids, &mut cache).unwrap_err();
        assert!(error.to_string().contains("9999"), "{error}");
    }
}

#[test]
fn a_batch_of_unequal_lengths_equals_each_alone() {
    for model in models() {
        let sequences = [ids(40, 1), ids(75, 2), ids(9, 3)];
        let mut cache = model.new_cache(3, RowDtype::F32).unwrap();
        let mut alone: Vec<Cache> =
            (0..3).map(|_| model.new_cache(1, RowDtype::F32).unwrap()).collect();
        // Two calls: in the second the sequences stand at different positions.
        for (begin, end) in [(0, 20), (20, 75)] {
            let parts: Vec<&[u32]> = sequences
                .iter()
                .map(|ids| &ids[begin.min(ids.len())..end.min(ids.len())])
                .collect();
            let lengths: Vec<usize> = parts.iter().map(|part| part.len()).collect();
            let widest = *lengths.iter().max().unwrap();
            let padded: Vec<u32> = parts
                .iter()
                .flat_map(|part| part.iter().copied().chain(std::iter::repeat(0)).take(widest))
                .collect();
            let batch = Tensor::from_vec(padded, (3, widest), &Device::Cpu).unwrap();
            let hidden = model.forward(&batch, &mut cache, Some(&lengths)).unwrap();
            for (i, part) in parts.iter().enumerate().filter(|(_, part)| !part.is_empty()) {
                let got = hidden.get(i).unwrap().narrow(0, 0, part.len()).unwrap();
                assert_close(&got.to_vec2().unwrap(), &feed(&model, &mut alone[i], part));
            }
        }
        for (i, ids) in sequences.iter().enumerate() {
            assert_eq!(cache.position(i), ids.len());
        }
    }
}

#[test]
fn steps_of_a_batch_equal_each_alone() {
    for model in models().into_iter().chain(updated_students()) {
        let sequences = [ids(40, 1), ids(40, 2), ids(40, 3)];
        let mut cache = model.new_cache(3, RowDtype::F32).unwrap();
        let mut steps: Vec<Vec<Vec<f32>>> = vec![Vec::new(); 3];
        for t in 0..40 {
            let column: Vec<u32> = sequences.iter().map(|ids| ids[t]).collect();
            let column = Tensor::from_vec(column, (3, 1), &Device::Cpu).unwrap();
            let hidden = model.forward(&column, &mut cache, None).unwrap();
            for (sequence, steps) in steps.iter_mut().enumerate() {
                steps.extend(hidden.get(sequence).unwrap().to_vec2::<f32>().unwrap());
            }
        }
        for (steps, ids) in steps.iter().zip(&sequences) {
            let mut alone = model.new_cache(1, RowDtype::F32).unwrap();
            assert_close(steps, &feed(&model, &mut alone, ids));
        }
    }
}

/// Threads share the keys of a head that keeps all tokens, in pieces of one size whatever the threads.
#[test]
fn a_step_over_whole_heads_equals_one_pass_whatever_the_threads() {
    let teacher = random_model(tiny_config(), 4).unwrap();
    let config = teacher.config();
    let still = StillConfig::uniform(config.num_hidden_layers, config.geometry(), 8, 8);
    let student = Student::init(still, config, FeatureInit::Normal, 5).unwrap();
    let model = teacher.with_student(student);
    // More than two pieces' rows have retired.
    let (ids, read) = (ids(2085, 1), 2070);
    let mut before = model.new_cache(1, RowDtype::F32).unwrap();
    model.prefill(&ids[..read], &mut before).unwrap();
    let whole = feed(&model, &mut before.clone(), &ids[read..]);
    let steps = |threads: usize| -> Vec<Vec<f32>> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let mut cache = before.clone();
        pool.install(|| {
            ids[read..].iter().flat_map(|&id| feed(&model, &mut cache, &[id])).collect()
        })
    };
    let one = steps(1);
    assert_close(&one, &whole);
    for threads in [2, 3, 7] {
        assert_eq!(steps(threads), one, "{threads} threads");
    }
}

#[test]
fn an_id_outside_the_vocabulary_is_an_error() {
    let [teacher, _] = models();
    let mut cache = teacher.new_cache(1, RowDtype::F32).unwrap();
    let error = teacher.prefill(&[3, 258], &mut cache).unwrap_err();
    assert!(error.to_string().contains("258"), "{error}");
    assert!(teacher.prefill(&[], &mut cache).is_err());
}

#[test]
fn generation_is_seeded_and_says_how_it_ended() {
    let [_, student] = models();
    let run = |options: &GenerateOptions| {
        let mut cache = student.new_cache(1, RowDtype::F32).unwrap();
        let mut streamed = String::new();
        let generation = generate(&student, &ids(30, 1), &mut cache, options, &mut |text| {
            streamed.push_str(text);
            std::ops::ControlFlow::Continue(())
        })
        .unwrap();
        assert_eq!(streamed, generation.text);
        assert_eq!(cache.position(0), 30 + generation.fed);
        generation
    };
    let options =
        GenerateOptions { max_new_tokens: 12, temperature: 1.0, seed: 9, ..Default::default() };
    let (first, second) = (run(&options), run(&options));
    assert_eq!((&first.ids, first.finish), (&second.ids, second.finish));
    assert_ne!(run(&GenerateOptions { seed: 10, ..options.clone() }).ids, first.ids);
    let nothing = run(&GenerateOptions { max_new_tokens: 0, ..options });
    assert_eq!((nothing.ids.len(), nothing.finish), (0, Finish::Length));
}

#[test]
fn an_interrupted_generation_says_nothing_more() {
    let [_, student] = models();
    let options =
        GenerateOptions { max_new_tokens: 40, temperature: 1.0, seed: 9, ..Default::default() };
    let mut cache = student.new_cache(1, RowDtype::F32).unwrap();
    let mut calls = 0;
    let generation = generate(&student, &ids(30, 1), &mut cache, &options, &mut |_| {
        calls += 1;
        std::ops::ControlFlow::Break(())
    })
    .unwrap();
    assert_eq!((calls, generation.finish), (1, Finish::Interrupted));
    assert_eq!(cache.position(0), 30 + generation.fed);
}

#[test]
fn sampling_out_of_range_is_refused() {
    let [_, student] = models();
    for (temperature, top_p) in [(-1.0, 1.0), (f64::NAN, 1.0), (1.0, 0.0), (1.0, 1.5)] {
        let options = GenerateOptions { temperature, top_p, ..Default::default() };
        let mut cache = student.new_cache(1, RowDtype::F32).unwrap();
        let mut ignore = |_: &str| std::ops::ControlFlow::Continue(());
        assert!(generate(&student, &ids(3, 1), &mut cache, &options, &mut ignore).is_err());
        assert_eq!(cache.position(0), 0);
    }
}

#[test]
fn generation_beyond_the_trained_positions_warns() {
    let mut config = tiny_config();
    config.max_position_embeddings = 32;
    let model = random_model(config, 4).unwrap();
    let mut cache = model.new_cache(1, RowDtype::F32).unwrap();
    let options = GenerateOptions { max_new_tokens: 4, ..Default::default() };
    let mut ignore = |_: &str| std::ops::ControlFlow::Continue(());
    let generation = generate(&model, &ids(40, 1), &mut cache, &options, &mut ignore).unwrap();
    assert!(generation.warning.unwrap().contains("32"));
}

#[test]
fn a_conversation_reads_only_what_is_new() {
    let [_, student] = models();
    let options =
        GenerateOptions { max_new_tokens: 6, temperature: 1.0, seed: 2, ..Default::default() };
    let mut ignore = |_: &str| std::ops::ControlFlow::Continue(());
    let mut session = ChatSession::new(student.clone(), RowDtype::F32, None).unwrap();
    let first = session.send("hello", &options, &mut ignore).unwrap();
    assert!(!first.reread);
    let second = session.send("and again", &options, &mut ignore).unwrap();
    let rendered = student.tokenizer.chat_template().unwrap();
    let all = rendered.render(&session.messages()[..3], true).unwrap();
    let total = student.tokenizer.encode(&all, false).unwrap().len();
    if second.reread {
        // Bytes that are no UTF-8 came out: their text does not encode to the same ids.
        assert_eq!(second.read, total);
    } else {
        assert!(second.read < total, "{} of {total} tokens were read", second.read);
    }

    // Read at once or turn by turn, the state is the same: so is the next answer.
    let greedy = GenerateOptions { max_new_tokens: 6, ..Default::default() };
    let turn_by_turn = session.send("third", &greedy, &mut ignore).unwrap().generation.ids;
    let text = rendered.render(&session.messages()[..5], true).unwrap();
    let ids = student.tokenizer.encode(&text, false).unwrap();
    let mut cache = student.new_cache(1, RowDtype::F32).unwrap();
    let at_once = generate(&student, &ids, &mut cache, &greedy, &mut ignore).unwrap().ids;
    assert_eq!(turn_by_turn, at_once);
}
