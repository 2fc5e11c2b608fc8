//! A model on a CUDA GPU against the same model on the CPU.
//!
//! Needs a GPU, and fails without one: it is built only where the feature `cuda` asks for it. It runs on a machine without
//! Rust or the checkout.

use std::cell::RefCell;
use std::ops::{ControlFlow, RangeInclusive};
use std::sync::Mutex;
use std::thread;

use candle_core::{DType, Device, Tensor};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use still_attention::{RowDtype, StillConfig};
use still_compute::random::normal;
use still_model::decoder::ops::split_heads;
use still_model::random::{random_model, tiny_config, tiny_kernel_config, tiny_student};
use still_model::{
    Architecture, Cache, ChatSession, FeatureInit, Feed, GenerateOptions, LoraConfig, LoraTarget,
    Model, ModelConfig, ModelError, RopeScaling, Student, device, generate, generate_together,
};
use still_testing::{Errors, assert_max_error, assert_relative_rms, random_f32, relative_rms};

fn gpu() -> Device {
    device("cuda").unwrap_or_else(|error| panic!("these tests need a CUDA GPU: {error}"))
}

/// A teacher and a student of some budgets, on the CPU.
fn models() -> [Model; 2] {
    let config = tiny_kernel_config();
    let teacher = random_model(config.clone(), 3).unwrap();
    let student = tiny_student(&config, |_| {}).unwrap();
    [teacher.clone(), teacher.with_student(student)]
}

/// The same on both sides, in f32.
fn pairs() -> Vec<[Model; 2]> {
    let device = gpu();
    let pair = |model: Model| {
        let there = model.to_device(&device, DType::F32).unwrap();
        [model, there]
    };
    models().map(pair).into()
}

fn ids(tokens: usize, seed: u64) -> Vec<u32> {
    (0..tokens as u64).map(|i| (((i + seed) * 2_654_435_761) >> 7) as u32 % 256).collect()
}

fn cache(model: &Model, batch: usize) -> Cache {
    model.new_cache(batch, RowDtype::F32).unwrap()
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn assert_close(got: &[f32], expected: &[f32], case: &str) {
    println!("{:.1e} {case}", Errors::of(case, got, expected).relative_rms());
    assert_relative_rms(case, got, expected, 1e-3);
}

/// Feeds one token after the other to every sequence of both, and compares all logits.
fn decode_both([a, b]: [(&Model, &mut Cache); 2], tokens: &[Vec<u32>], case: &str) {
    let (mut got, mut expected) = (Vec::new(), Vec::new());
    for ids in tokens {
        expected.extend_from_slice(a.0.decode(ids, a.1).unwrap());
        got.extend_from_slice(b.0.decode(ids, b.1).unwrap());
    }
    assert_close(&got, &expected, case);
}

/// So many tokens for each of `batch` sequences, by step.
fn steps(tokens: usize, batch: usize, seed: u64) -> Vec<Vec<u32>> {
    (0..tokens).map(|n| ids(batch, seed + (n * batch) as u64)).collect()
}

/// A GPU makes the angles of many tokens itself, the host those of few.
#[test]
fn heads_are_rotated_as_on_the_cpu() {
    let [cpu, _] = models();
    let there = cpu.to_device(&gpu(), DType::F32).unwrap();
    let head_dim = cpu.config().head_dim;
    for (starts, tokens) in
        [(vec![0], 5000), (vec![130_000], 3000), (vec![7, 90_001], 2048), (vec![3], 9)]
    {
        let x = random_f32(&[starts.len(), tokens, 2 * head_dim], 5);
        let [expected, got] = [&cpu, &there].map(|model| {
            let rotation = model.decoder.rotation_at(&starts, tokens).unwrap();
            let x = x.to_device(model.device()).unwrap();
            let heads = split_heads(&x, head_dim, Some(&rotation)).unwrap();
            heads.contiguous().unwrap().to_device(&Device::Cpu).unwrap()
        });
        assert_max_error(&format!("{tokens} tokens from {starts:?} on"), &got, &expected, 1e-6);
    }
}

#[test]
fn greedy_generation_is_the_same() {
    for models in pairs() {
        for prompt in [1, 64, 150] {
            let options = GenerateOptions { max_new_tokens: 140, ..GenerateOptions::default() };
            let [expected, got] = models.each_ref().map(|model| {
                let mut cache = cache(model, 1);
                let on_text = &mut |_: &str| ControlFlow::Continue(());
                let text = generate(model, &ids(prompt, 9), &mut cache, &options, on_text).unwrap();
                (text.ids, cache.position(0))
            });
            assert_eq!(got.0.len(), options.max_new_tokens);
            assert_eq!(got, expected, "after {prompt} tokens");
        }
    }
}

#[test]
fn sequences_of_different_lengths_decode_together() {
    for [cpu, gpu] in pairs() {
        let lengths = [150, 1, 64, 97];
        let sequences = [0, 1, 2, 3].map(|seed| ids(150, 20 + seed));
        let batch = |model: &Model| {
            let ids: Vec<u32> = sequences.concat();
            Tensor::from_vec(ids, (4, 150), model.decoder.device()).unwrap()
        };
        let (mut on_cpu, mut on_gpu) = (cache(&cpu, 4), cache(&gpu, 4));
        let expected = cpu.forward(&batch(&cpu), &mut on_cpu, Some(&lengths)).unwrap();
        let got = gpu.forward(&batch(&gpu), &mut on_gpu, Some(&lengths)).unwrap();
        for (sequence, &length) in lengths.iter().enumerate() {
            let own = |x: &Tensor| flat(&x.get(sequence).unwrap().narrow(0, 0, length).unwrap());
            assert_close(&own(&got), &own(&expected), "hidden states");
        }
        let both = [(&cpu, &mut on_cpu), (&gpu, &mut on_gpu)];
        decode_both(both, &steps(140, 4, 50), "decoded together");
    }
}

/// Matrices of both heights that the kernel of small batches tells apart; biases, heads' norms and low-rank updates.
fn many_kinds() -> Vec<Model> {
    let kinds = [
        (Architecture::Qwen2, [true, true, false], 1096, vec![]),
        (Architecture::Qwen3, [false; 3], 8248, vec![LoraTarget::Q, LoraTarget::O]),
        (Architecture::Llama, [false; 3], 256, vec![LoraTarget::Q, LoraTarget::K, LoraTarget::V]),
        // A part of each head is rotated, and scaled.
        (Architecture::Phi3, [false; 3], 256, vec![LoraTarget::Q]),
        // A step of a small batch has no kernel for biases of the MLP.
        (Architecture::Llama, [true; 3], 256, vec![LoraTarget::O]),
    ];
    let kind = |(architecture, biases, intermediate_size, targets): (_, [bool; 3], _, Vec<_>)| {
        let [attention_bias, attention_output_bias, mlp_bias] = biases;
        let config = ModelConfig {
            architecture,
            attention_bias,
            attention_output_bias,
            mlp_bias,
            intermediate_size,
            hidden_size: 184,
            num_attention_heads: 3,
            num_key_value_heads: 3,
            head_dim: 64,
            vocab_size: 4101,
            ..tiny_config()
        };
        let config = match architecture {
            Architecture::Phi3 => long_rope(config),
            _ => config,
        };
        let teacher = random_model(config.clone(), 5).unwrap();
        let still = StillConfig::uniform(config.num_hidden_layers, config.geometry(), 64, 4);
        let mut student = Student::init(still, &config, FeatureInit::Normal, 3).unwrap();
        if !targets.is_empty() {
            let lora = LoraConfig { rank: 5, alpha: 8.0, targets };
            student.add_lora(&config, lora, 4).unwrap();
            // Updates start as zeros.
            let mut rng = ChaCha8Rng::seed_from_u64(6);
            let moved = student.map_tensors(|name, tensor| match name.contains("lora_B") {
                true => Ok(normal(&mut rng, tensor.dims(), 0.3)?),
                false => Ok(tensor.clone()),
            });
            student = moved.unwrap();
        }
        teacher.with_student(student)
    };
    kinds.map(kind).into()
}

/// Phi-4-mini's rotation, for sequences longer than the original context.
fn long_rope(config: ModelConfig) -> ModelConfig {
    let partial_rotary_factor = 0.75;
    let pairs = config.head_dim * 3 / 8;
    let rope_scaling = RopeScaling::LongRope {
        short_factor: vec![1.0; pairs],
        long_factor: (0..pairs).map(|i| 1.0 + 0.2 * i as f64).collect(),
        attention_factor: 1.2,
        original_max_position_embeddings: 64,
        declared_length: config.max_position_embeddings,
    };
    ModelConfig { partial_rotary_factor, rope_scaling: Some(rope_scaling), ..config }
}

fn decode_alike(batches: RangeInclusive<usize>) {
    let device = gpu();
    for cpu in many_kinds().into_iter().flat_map(|student| [student.teacher(), student]) {
        let gpu = cpu.to_device(&device, DType::F32).unwrap();
        let narrow = cpu.to_device(&device, DType::BF16).unwrap();
        for batch in batches.clone() {
            let attention = if cpu.student.is_some() { "hybrid" } else { "dense" };
            let case = format!("{:?}, {attention}, {batch} sequences", cpu.config().architecture);
            let (mut on_cpu, mut on_gpu) = (cache(&cpu, batch), cache(&gpu, batch));
            let both = [(&cpu, &mut on_cpu), (&gpu, &mut on_gpu)];
            decode_both(both, &steps(20, batch, 70), &case);
            let mut in_bf16 = narrow.new_cache(batch, RowDtype::Bf16).unwrap();
            let mut on_cpu = cache(&cpu, batch);
            let (mut got, mut expected) = (Vec::new(), Vec::new());
            for ids in steps(20, batch, 70) {
                expected.extend_from_slice(cpu.decode(&ids, &mut on_cpu).unwrap());
                got.extend_from_slice(narrow.decode(&ids, &mut in_bf16).unwrap());
            }
            let error = relative_rms(&got, &expected);
            println!("{case}: bf16 {error:.1e}");
            assert!(error <= 0.1, "{case}: bf16 {error:e}");
        }
    }
}

/// Small batches have a kernel of their own.
#[test]
fn small_batches_decode_alike() {
    decode_alike(1..=3);
}

#[test]
fn more_sequences_decode_alike() {
    decode_alike(4..=5);
}

/// Long enough for a student's store to move under the graph, which finds it, and for a dense cache, whose step is captured anew.
#[test]
fn a_long_generation() {
    for [cpu, gpu] in pairs() {
        let (mut on_cpu, mut on_gpu) = (cache(&cpu, 1), cache(&gpu, 1));
        for (model, cache) in [(&cpu, &mut on_cpu), (&gpu, &mut on_gpu)] {
            model.prefill(&ids(130, 1), cache).unwrap();
        }
        let before = on_gpu.size_bytes();
        let both = [(&cpu, &mut on_cpu), (&gpu, &mut on_gpu)];
        decode_both(both, &steps(1300, 1, 60), "1300 tokens");
        assert!(on_gpu.size_bytes() > before);
    }
}

/// What one thread has captured it takes with it when it ends.
#[test]
fn a_cache_goes_from_thread_to_thread() {
    for [cpu, gpu] in pairs() {
        let (mut on_cpu, mut on_gpu) = (cache(&cpu, 4), cache(&gpu, 4));
        for turn in 0..3 {
            let both = [(&cpu, &mut on_cpu), (&gpu, &mut on_gpu)];
            let decode = || decode_both(both, &steps(5, 4, 100 + turn), "another thread");
            thread::scope(|scope| scope.spawn(decode).join().unwrap());
        }
    }
}

/// As a conversation goes: read, decode, read on, decode; and a copy that takes another way.
#[test]
fn turns_and_copies() {
    for [cpu, gpu] in pairs() {
        let (mut on_cpu, mut on_gpu) = (cache(&cpu, 1), cache(&gpu, 1));
        for turn in 0..3 {
            let [expected, got] =
                [(&cpu, &mut on_cpu), (&gpu, &mut on_gpu)].map(|(model, cache)| {
                    let hidden = model.prefill(&ids(70, turn), cache).unwrap();
                    flat(&model.logits(&hidden).unwrap())
                });
            assert_close(&got, &expected, "a prompt's logits");
            let (mut copy_on_cpu, mut copy_on_gpu) = (on_cpu.clone(), on_gpu.clone());
            let both = [(&cpu, &mut on_cpu), (&gpu, &mut on_gpu)];
            decode_both(both, &steps(40, 1, 70 + turn), "an answer");
            let both = [(&cpu, &mut copy_on_cpu), (&gpu, &mut copy_on_gpu)];
            decode_both(both, &steps(70, 1, 80 + turn), "a copy's answer");
        }
        // Another model of the same kind must not run by the weights of the one whose step was captured.
        let other = random_model(cpu.config().clone(), 4).unwrap();
        let other = Model { student: cpu.student.clone(), ..other };
        let there = other.to_device(gpu.decoder.device(), DType::F32).unwrap();
        let both = [(&other, &mut on_cpu), (&there, &mut on_gpu)];
        decode_both(both, &steps(3, 1, 90), "another model");
    }
}

/// A cache that was saved on either device goes on on both, and one that was cut back within a chunk too; where a step had been
/// captured before, it reads the new state.
#[test]
fn caches_go_from_device_to_device() {
    for models in pairs() {
        let batch = 2;
        let [cpu, gpu] = &models;
        for from in [cpu, gpu] {
            let mut state = cache(from, batch);
            for ids in steps(190, batch, 3) {
                from.decode(&ids, &mut state).unwrap();
            }
            state.truncate(0, 186).unwrap();
            let saved = state.save().unwrap();
            let (mut on_cpu, mut on_gpu) = (cache(cpu, batch), cache(gpu, batch));
            // Somewhere else before.
            gpu.decode(&[1, 2], &mut on_gpu).unwrap();
            on_gpu.restore(saved.clone()).unwrap();
            on_cpu.restore(saved).unwrap();
            assert_eq!((on_gpu.position(0), on_gpu.position(1)), (186, 190));
            let both = [(cpu, &mut on_cpu), (gpu, &mut on_gpu)];
            decode_both(both, &steps(80, batch, 500), "restored on both");
            let mut again = cache(from, batch);
            again.restore(on_gpu.save().unwrap()).unwrap();
            let both = [(cpu, &mut on_cpu), (gpu, &mut on_gpu)];
            decode_both(both, &steps(3, batch, 700), "saved again");
            assert_eq!((again.position(0), again.position(1)), (266, 270));
        }
    }
}

/// A conversation whose file is written on one device and opened on both goes on as on either device it would have. The two may
/// differ: in a text that repeats, tokens have scores that are equal but for rounding, and each device may keep others.
#[test]
fn sessions_go_from_device_to_device() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.still");
    let options = GenerateOptions { max_new_tokens: 5, ..Default::default() };
    let message = "The ship sails at noon. ".repeat(9);
    for [cpu, gpu] in pairs() {
        for [from, to] in [[&cpu, &gpu], [&gpu, &cpu]] {
            let send = |session: &mut ChatSession, text: &str| {
                let on_text = &mut |_: &str| ControlFlow::Continue(());
                session.send(text, &options, on_text).unwrap().generation.ids
            };
            let mut session = ChatSession::new(from.clone(), RowDtype::F32, None).unwrap();
            let first = send(&mut session, &message);
            session.save(&path).unwrap();
            let mut here = ChatSession::open(from.clone(), &path).unwrap();
            let mut there = ChatSession::open(to.clone(), &path).unwrap();
            let mut anew = ChatSession::new(to.clone(), RowDtype::F32, None).unwrap();
            assert_eq!(send(&mut anew, &message), first);
            assert_eq!((here.tokens(), there.tokens()), (session.tokens(), session.tokens()));
            for text in ["Who?", "And when?"] {
                assert_eq!(send(&mut here, text), send(&mut session, text));
                assert_eq!(send(&mut there, text), send(&mut anew, text));
            }
            let mut other = ChatSession::new(to.clone(), RowDtype::F32, None).unwrap();
            other.load(&path).unwrap();
            assert_eq!(other.messages().len(), 2);
        }
    }
}

#[test]
fn blocks_of_a_long_read_come_in_order() {
    for [cpu, gpu] in pairs() {
        let ids = ids(1500, 5);
        let expected = Mutex::new(vec![Vec::new(); ids.len()]);
        let read = cpu.read(&ids, &mut cache(&cpu, 1), |start, hidden| {
            for (n, row) in hidden.to_vec2::<f32>()?.into_iter().enumerate() {
                expected.lock().unwrap()[start + n] = row;
            }
            Ok::<_, ModelError>(())
        });
        read.unwrap();
        let got = Mutex::new(Vec::new());
        let read = gpu.read(&ids, &mut cache(&gpu, 1), |start, hidden| {
            let mut got = got.lock().unwrap();
            assert_eq!(start, got.len());
            got.extend(hidden.to_vec2::<f32>()?);
            Ok::<_, ModelError>(())
        });
        read.unwrap();
        let (got, expected) = (got.into_inner().unwrap(), expected.into_inner().unwrap());
        assert_close(&got.concat(), &expected.concat(), "hidden states");
    }
}

/// A long prompt is read in pieces, which leave what reading it at once leaves.
#[test]
fn a_long_prompt_is_read_in_pieces() {
    let device = gpu();
    for model in models() {
        let gpu = model.to_device(&device, DType::F32).unwrap();
        let prompt = ids(16 * 1024 + 700, 8);
        let (mut at_once, mut in_pieces) = (cache(&gpu, 1), cache(&gpu, 1));
        let column = Tensor::from_slice(&prompt, (1, prompt.len()), gpu.decoder.device()).unwrap();
        let expected = flat(&gpu.forward(&column, &mut at_once, None).unwrap());
        let got = Mutex::new(Vec::new());
        let read = gpu.read(&prompt, &mut in_pieces, |start, hidden| {
            let mut got = got.lock().unwrap();
            assert_eq!(start * gpu.config().hidden_size, got.len());
            got.extend(flat(&hidden));
            Ok::<_, ModelError>(())
        });
        read.unwrap();
        assert_close(&got.into_inner().unwrap(), &expected, "hidden states");
        let both = [(&gpu, &mut at_once), (&gpu, &mut in_pieces)];
        decode_both(both, &steps(70, 1, 90), "decoded after");
    }
}

/// Prompts of different lengths in one cache, read in several pieces, and written on together.
#[test]
fn answers_written_together_are_the_same() {
    for [cpu, gpu] in pairs() {
        let prompts = [ids(5000, 0), ids(4700, 1), ids(1, 2), ids(129, 3)];
        let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
        let limits = [80, 3, 40, 70];
        let [expected, got] = [&cpu, &gpu].map(|model| {
            let mut cache = cache(model, prompts.len());
            let written = generate_together(model, &prompts, &limits, &mut cache).unwrap();
            written.into_iter().map(|generation| generation.ids).collect::<Vec<_>>()
        });
        assert_eq!(got, expected);
    }
}

#[test]
fn feeds_that_share_products_are_as_alone() {
    for [cpu, gpu] in pairs() {
        let sequences = [ids(300, 0), ids(7, 1), ids(1, 2), ids(200, 3)];
        let [expected, got] = [&cpu, &gpu].map(|model| {
            let mut caches = vec![cache(model, 1); sequences.len()];
            let all = RefCell::new(vec![Vec::new(); sequences.len()]);
            // The second time, each goes on from what it has.
            for cut in [0, 1] {
                let mut feeds: Vec<Feed<'_>> = sequences
                    .iter()
                    .zip(&mut caches)
                    .map(|(ids, cache)| {
                        let middle = ids.len() * 9 / 10;
                        let ids = if cut == 0 { &ids[..middle] } else { &ids[middle..] };
                        Feed { ids, cache }
                    })
                    .collect();
                let read = model.read_packed(&mut feeds, |feed, _, hidden| {
                    all.borrow_mut()[feed].extend(flat(&hidden));
                    Ok::<_, ModelError>(())
                });
                read.unwrap();
            }
            all.into_inner().concat()
        });
        assert_close(&got, &expected, "packed");
    }
}

#[test]
fn bf16_is_near() {
    near_in_bf16(&models());
}

/// Such heads have kernels in bf16 alone.
#[test]
fn heads_of_256_channels_are_near_in_bf16() {
    let config = ModelConfig { head_dim: 256, ..tiny_kernel_config() };
    let teacher = random_model(config.clone(), 3).unwrap();
    let student = tiny_student(&config, |_| {}).unwrap();
    near_in_bf16(&[teacher.clone(), teacher.with_student(student)]);
}

fn near_in_bf16(models: &[Model]) {
    let device = gpu();
    for cpu in models {
        let gpu = cpu.to_device(&device, DType::BF16).unwrap();
        let mut on_gpu = gpu.new_cache(1, RowDtype::Bf16).unwrap();
        let mut on_cpu = cache(cpu, 1);
        let (mut got, mut expected) = (Vec::new(), Vec::new());
        for (model, cache, to) in [(cpu, &mut on_cpu, &mut expected), (&gpu, &mut on_gpu, &mut got)]
        {
            let hidden = model.prefill(&ids(200, 7), cache).unwrap();
            to.extend(flat(&model.logits(&hidden).unwrap()));
            for ids in steps(100, 1, 8) {
                to.extend_from_slice(model.decode(&ids, cache).unwrap());
            }
        }
        let error = relative_rms(&got, &expected);
        println!("bf16: {error:.1e}");
        assert!(error <= 0.1, "relative RMS {error:e}");
    }
}

/// Steps in a graph and pieces of a prompt, against steps alone; a window that is f32 on the GPU is bf16 on the CPU, so that there
/// only the rounding may differ.
#[test]
fn rows_in_few_bits() {
    for ([cpu, gpu], rows) in pairs()
        .iter()
        .flat_map(|pair| [RowDtype::Int8, RowDtype::Int4].map(|rows| (pair.each_ref(), rows)))
    {
        let prompt = ids(330, 3);
        let mut caches = [gpu, gpu, cpu].map(|model| model.new_cache(1, rows).unwrap());
        let [whole, pieces, on_cpu] = &mut caches;
        gpu.prefill(&prompt, whole).unwrap();
        for piece in [&prompt[..100], &prompt[100..101], &prompt[101..]] {
            gpu.prefill(piece, pieces).unwrap();
        }
        cpu.prefill(&prompt, on_cpu).unwrap();
        let (mut got, mut split, mut expected) = (Vec::new(), Vec::new(), Vec::new());
        for ids in steps(150, 1, 40) {
            got.extend_from_slice(gpu.decode(&ids, whole).unwrap());
            split.extend_from_slice(gpu.decode(&ids, pieces).unwrap());
            expected.extend_from_slice(cpu.decode(&ids, on_cpu).unwrap());
        }
        assert_close(&split, &got, &format!("{rows} rows in pieces"));
        assert_relative_rms(&format!("{rows} rows on the CPU"), &got, &expected, 3e-2);
        let mut plain = cache(gpu, 1);
        gpu.prefill(&prompt, &mut plain).unwrap();
        assert!(whole.size_bytes() < plain.size_bytes());
    }
}

#[test]
fn what_does_not_fit_is_named() {
    for [cpu, gpu] in pairs() {
        let error = gpu.new_cache(1, RowDtype::Bf16).unwrap_err();
        assert!(error.to_string().contains("Bf16 rows"), "{error}");
        assert!(error.hint().unwrap().contains("f32"));
        let mut elsewhere = cache(&cpu, 1);
        let error = gpu.decode(&[1], &mut elsewhere).unwrap_err().to_string();
        assert!(error.contains("another device"), "{error}");
        let mut elsewhere = cache(&gpu, 1);
        let error = cpu.decode(&[1], &mut elsewhere).unwrap_err().to_string();
        assert!(error.contains("another device"), "{error}");
        let vocab = gpu.config().vocab_size as u32;
        assert!(gpu.decode(&[vocab], &mut elsewhere).is_err());
        assert!(gpu.decode(&[1, 2], &mut elsewhere).is_err());
        assert_eq!(elsewhere.position(0), 0);
    }
}
