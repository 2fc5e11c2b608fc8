//! A real model, SmolLM2-135M-Instruct Q4_1, against the logits of an independent float32 forward.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::OnceLock;

use candle_core::{Device, Tensor};
use still_attention::{RowDtype, StillConfig};
use still_model::{
    Cancel, ChatSession, FeatureInit, GenerateOptions, Message, Model, Student, Weight,
};
use still_testing::{assert_relative_rms, facts};

fn model() -> &'static Model {
    static MODEL: OnceLock<Model> = OnceLock::new();
    MODEL.get_or_init(|| {
        let path = still_model::fetch::demo_model(&mut |line| eprintln!("{line}")).unwrap();
        Model::load(path.to_str().unwrap()).unwrap()
    })
}

struct Golden {
    tensors: HashMap<String, Tensor>,
    text: String,
    mean_nll: f64,
}

fn golden() -> Golden {
    let path =
        concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/model_smollm2_135m_q4_1.safetensors");
    let bytes = std::fs::read(path).unwrap();
    let (_, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let metadata = metadata.metadata().clone().unwrap();
    Golden {
        tensors: candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).unwrap(),
        text: metadata["text"].clone(),
        mean_nll: metadata["mean_nll"].parse().unwrap(),
    }
}

fn ids(golden: &Golden) -> Vec<u32> {
    let ids = golden.tensors["ids"].to_vec1::<i64>().unwrap();
    ids.into_iter().map(|id| id as u32).collect()
}

/// Logits `[N][vocab]` of a whole sequence fed at once.
fn logits(model: &Model, ids: &[u32]) -> Vec<Vec<f32>> {
    let mut cache = model.new_cache(1, RowDtype::F32).unwrap();
    let ids = Tensor::new(ids, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let hidden = model.forward(&ids, &mut cache, None).unwrap().squeeze(0).unwrap();
    model.logits(&hidden).unwrap().to_vec2().unwrap()
}

fn mean_nll(logits: &[Vec<f32>], ids: &[u32]) -> f64 {
    let nll = |(row, &id): (&Vec<f32>, &u32)| {
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = row.iter().map(|&x| f64::from(x - max).exp()).sum();
        sum.ln() - f64::from(row[id as usize] - max)
    };
    let all: Vec<f64> = logits.iter().zip(&ids[1..]).map(nll).collect();
    all.iter().sum::<f64>() / all.len() as f64
}

#[test]
fn tokenizer_gives_the_golden_ids() {
    let golden = golden();
    let expected = ids(&golden);
    // The stored text goes on after the stored ids.
    let got = model().tokenizer.encode(&golden.text, false).unwrap();
    assert_eq!(got[..expected.len()], expected);
    assert!(golden.text.starts_with(&model().tokenizer.decode(&expected, false).unwrap()));
}

#[test]
fn dense_logits_match() {
    let golden = golden();
    let ids = ids(&golden);
    let got = logits(model(), &ids);
    let positions = golden.tensors["positions"].to_vec1::<i64>().unwrap();
    let expected = golden.tensors["logits"].to_vec2::<f32>().unwrap();
    for (position, expected) in positions.iter().zip(&expected) {
        let got = &got[*position as usize];
        assert_relative_rms(&format!("position {position}"), got, expected, 1e-4);
    }
    let nll = mean_nll(&got, &ids);
    assert!((nll - golden.mean_nll).abs() <= 1e-4, "mean NLL {nll} vs {}", golden.mean_nll);
}

#[test]
fn a_full_budget_student_is_the_teacher() {
    let golden = golden();
    let ids = ids(&golden);
    let config = model().config();
    let still = StillConfig::uniform(config.num_hidden_layers, config.geometry(), 64, 64);
    let student = Student::init(still, config, FeatureInit::Identity, 0).unwrap();
    let nll = mean_nll(&logits(&model().with_student(student), &ids), &ids);
    assert!((nll - golden.mean_nll).abs() <= 1e-4, "mean NLL {nll} vs {}", golden.mean_nll);
}

#[test]
fn quantized_decode_steps_equal_prefill() {
    assert!(matches!(model().decoder.lm_head, Weight::Packed(_)), "the weights were widened");
    let golden = golden();
    let ids = &ids(&golden)[..150];
    let config = model().config();
    let still = StillConfig::uniform(config.num_hidden_layers, config.geometry(), 16, 2);
    let student = Student::init(still, config, FeatureInit::Identity, 0).unwrap();
    for model in [model().clone(), model().with_student(student)] {
        let expected = logits(&model, ids);
        let mut cache = model.new_cache(1, RowDtype::F32).unwrap();
        for (position, (&id, expected)) in ids.iter().zip(&expected).enumerate() {
            let id = Tensor::new(&[[id]], &Device::Cpu).unwrap();
            let hidden = model.forward(&id, &mut cache, None).unwrap().squeeze(0).unwrap();
            let got = model.logits(&hidden).unwrap().squeeze(0).unwrap().to_vec1::<f32>().unwrap();
            assert_relative_rms(&format!("position {position}"), &got, expected, 1e-4);
        }
    }
}

#[test]
fn chat_template_renders_the_models_own_format() {
    let template = model().tokenizer.chat_template().unwrap();
    let messages = [Message::new("system", "Be brief."), Message::new("user", "Hello")];
    let expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(template.render(&messages, true).unwrap(), expected);
    let ids = model().tokenizer.encode(expected, false).unwrap();
    assert_eq!(ids[0], model().tokenizer.token_id("<|im_start|>").unwrap());
}

/// Ten facts among sentences that say little: the document is read once, and most questions about it are answered.
#[test]
fn questions_about_a_document_are_answered() {
    let mut session = ChatSession::new(model().clone(), RowDtype::Bf16, None).unwrap();
    let document = facts::document(250, 1);
    session.read_document(document, &Cancel::default(), |_, _| {}).unwrap();
    let options = GenerateOptions { max_new_tokens: 20, ..Default::default() };
    let mut answers = Vec::new();
    for fact in facts::FACTS {
        let mut ignore = |_: &str| ControlFlow::Continue(());
        let reply = session.ask(fact.question, &options, &mut ignore).unwrap();
        assert!(reply.read < 40 && !reply.reread, "{} tokens", reply.read);
        answers.push((fact.is_in(&reply.generation.text), reply.generation.text));
    }
    let right = answers.iter().filter(|(right, _)| *right).count();
    assert!(right >= 5, "{answers:#?}");
}

/// The student in the program is one of the pinned base, whole or not, wherever its delta lies.
#[test]
fn the_student_that_ships_is_the_pinned_bases() {
    use still_model::{DEMO_STUDENT, ExportKind, PINNED_BASE, save_student};

    let shipped = Model::load(DEMO_STUDENT).unwrap();
    let student = shipped.student.as_ref().unwrap();
    assert_eq!(shipped.base.source, PINNED_BASE);
    let config = &student.config;
    let heads = || config.budgets.iter().flatten();
    let whole = heads().filter(|&&budget| budget == config.chunk).count();
    assert!(whole >= 8, "{whole} of {} heads keep every token", heads().count());
    assert!(shipped.decoder.layers.len() == model().decoder.layers.len());
    assert!(Model::load(PINNED_BASE).unwrap().student.is_none());

    // A delta of it, saved elsewhere, finds the base by its name.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("delta");
    save_student(&path, &shipped, ExportKind::Delta).unwrap();
    let config = std::fs::read_to_string(path.join("config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_str(&config).unwrap();
    assert_eq!(config["still_base"]["source"], PINNED_BASE);
    assert!(config["still_base"].get("path").is_none());
    let again = Model::load(path.to_str().unwrap()).unwrap();
    let ids: Vec<u32> = (0..20).map(|n| 1000 + 37 * n).collect();
    assert_eq!(logits(&again, &ids), logits(&shipped, &ids));
}
