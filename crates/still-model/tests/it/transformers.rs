//! Students in transformers: what `python/still_transformers` computes, recorded by `python/students.py`, and the folders that it
//! opens.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use safetensors::SafeTensors;
use serde_json::{Value, json};
use still_attention::RowDtype;
use still_model::random::{random_model, tiny_config};
use still_model::{
    Architecture, ExportKind, Model, ModelConfig, StudentTarget, export_transformers, save_student,
};
use still_testing::relative_rms;

use crate::checkpoints::logits;
use crate::students_on_disk::student;

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data")
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// A student of a base in `families`, and what transformers computed with it.
struct Recorded {
    name: String,
    model: Model,
    ids: Vec<u32>,
    positions: Vec<usize>,
    logits: Vec<Vec<f32>>,
    generated: Vec<u32>,
}

impl Recorded {
    fn open(path: &Path) -> Self {
        let bytes = fs::read(path).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let about = header.metadata().clone().unwrap();
        let base = data().join("families").join(&about["family"]);
        let mut tensors = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
        let mut take = |name: &str| tensors.remove(name).unwrap();
        let numbers = |tensor: Tensor| -> Vec<u32> {
            tensor.to_vec1::<i64>().unwrap().into_iter().map(|id| id as u32).collect()
        };
        let (ids, generated) = (numbers(take("ids")), numbers(take("generated")));
        let positions = numbers(take("positions")).into_iter().map(|t| t as usize).collect();
        let logits = take("logits").to_vec2().unwrap();

        // Written by hand, without a `still_format`: no digest is asked for.
        let dir = tempfile::tempdir().unwrap();
        let mut config = read_json(&base.join("config.json"));
        config["still"] = serde_json::from_str(&about["still"]).unwrap();
        fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let weights = candle_core::safetensors::load(base.join("model.safetensors"), &Device::Cpu);
        let all: HashMap<_, _> = weights.unwrap().into_iter().chain(tensors).collect();
        candle_core::safetensors::save(&all, dir.path().join("model.safetensors")).unwrap();
        random_model(tiny_config(), 0).unwrap().tokenizer.save(dir.path()).unwrap();
        let model = Model::load(dir.path().to_str().unwrap()).unwrap();
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        Self { name, model, ids, positions, logits, generated }
    }

    /// Logits where they were recorded, of ids that are read in parts of so many tokens.
    fn logits(&self, tokens: usize) -> Vec<Vec<f32>> {
        let mut cache = self.model.new_cache(1, RowDtype::F32).unwrap();
        let parts = self.ids.chunks(tokens).map(|ids| {
            let ids = Tensor::new(ids, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
            self.model.forward(&ids, &mut cache, None).unwrap().squeeze(0).unwrap()
        });
        let hidden = Tensor::cat(&parts.collect::<Vec<_>>(), 0).unwrap();
        let all: Vec<Vec<f32>> = self.model.logits(&hidden).unwrap().to_vec2().unwrap();
        self.positions.iter().map(|&t| all[t].clone()).collect()
    }

    /// As many greedy tokens as were recorded, after the first half of the ids.
    fn greedy(&self) -> Vec<u32> {
        let mut cache = self.model.new_cache(1, RowDtype::F32).unwrap();
        let best = |logits: &[f32]| {
            let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
            best.unwrap() as u32
        };
        let prompt = Tensor::new(&self.ids[..self.ids.len() / 2], &Device::Cpu).unwrap();
        let hidden = self.model.forward(&prompt.unsqueeze(0).unwrap(), &mut cache, None).unwrap();
        let logits = self.model.logits(&hidden.squeeze(0).unwrap()).unwrap();
        let mut tokens = vec![best(logits.to_vec2::<f32>().unwrap().last().unwrap())];
        while tokens.len() < self.generated.len() {
            let last = *tokens.last().unwrap();
            tokens.push(best(self.model.decode(&[last], &mut cache).unwrap()));
        }
        tokens
    }
}

fn recorded() -> Vec<Recorded> {
    let files = data().join("students").read_dir().unwrap();
    let mut files: Vec<PathBuf> = files.map(|file| file.unwrap().path()).collect();
    files.sort();
    assert!(files.len() >= 27, "{} students", files.len());
    files.iter().map(|path| Recorded::open(path)).collect()
}

#[test]
fn logits_and_generations_are_those_of_transformers() {
    for student in recorded() {
        let name = &student.name;
        for tokens in [student.ids.len(), 37, 1] {
            let error = relative_rms(&student.logits(tokens), &student.logits);
            assert!(error <= 1e-4, "{name}, {tokens} tokens a call: relative RMS {error:e}");
        }
        assert_eq!(student.greedy(), student.generated, "{name}");
    }
}

/// A student with low-rank updates, of a family.
fn tiny_student(architecture: Architecture) -> Model {
    let config = ModelConfig { architecture, bos_token_id: Some(256), ..tiny_config() };
    let model = random_model(config, 1).unwrap();
    student(&model)
}

/// Names of a safetensors file's tensors.
fn names(path: &Path) -> Vec<String> {
    let bytes = fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    tensors.names().into_iter().map(str::to_owned).collect()
}

#[test]
fn a_full_student_lies_beside_the_code_that_opens_it() {
    for architecture in [Architecture::Llama, Architecture::Phi3] {
        let dir = tempfile::tempdir().unwrap();
        let (plain, shared) = (dir.path().join("plain"), dir.path().join("shared"));
        let student = tiny_student(architecture);
        save_student(&plain, &student, ExportKind::Full(DType::F32)).unwrap();
        let target = StudentTarget::claim(&shared).unwrap();
        export_transformers(&target, &student, DType::F32, "# A student\n").unwrap();
        // Once more: what lies there is a student and nothing else.
        export_transformers(&target, &student, DType::F32, "# A student\n").unwrap();
        drop(target);
        let card = shared.join("README.md");
        assert!(fs::read_to_string(&card).unwrap().starts_with("# A student\n\n<!-- still export"));
        assert!(!plain.join("README.md").exists());
        for folder in [&plain, &shared] {
            let config = read_json(&folder.join("config.json"));
            assert_eq!(config["model_type"], "still");
            for (class, file) in
                [("AutoConfig", "configuration"), ("AutoModelForCausalLM", "modeling")]
            {
                let place = config["auto_map"][class].as_str().unwrap();
                let (module, name) = place.split_once('.').unwrap();
                assert_eq!(module, format!("{file}_still"));
                let code = fs::read_to_string(folder.join(format!("{module}.py"))).unwrap();
                assert!(code.contains(&format!("class {name}(")), "{place}");
                for line in code.lines().filter_map(|line| line.strip_prefix("from .")) {
                    let other = line.split(' ').next().unwrap();
                    assert!(folder.join(format!("{other}.py")).exists(), "{other}");
                }
            }
            assert_eq!(config["base_config"]["eos_token_id"], json!([257]));
            let tokenizer = read_json(&folder.join("tokenizer_config.json"));
            assert_eq!(tokenizer["tokenizer_class"], "PreTrainedTokenizerFast");
            assert_eq!(tokenizer["pad_token"], tokenizer["eos_token"]);
            assert!(tokenizer["eos_token"].is_string());
            assert_eq!(tokenizer["model_input_names"], json!(["input_ids", "attention_mask"]));
            let names = names(&folder.join("model.safetensors"));
            let fused = architecture == Architecture::Phi3;
            let has = |name: &str| names.contains(&format!("model.layers.1.{name}.weight"));
            assert_eq!(has("self_attn.qkv_proj") && has("mlp.gate_up_proj"), fused);
            assert_eq!(has("self_attn.q_proj") || has("mlp.up_proj"), !fused);
            assert!(has("self_attn.feature_map_k.mlp.linears.1"));
            let again = Model::load(folder.to_str().unwrap()).unwrap();
            assert!(relative_rms(&logits(&again), &logits(&student)) <= 1e-6);
        }
        // A card that somebody edited is theirs.
        fs::write(&card, fs::read_to_string(&card).unwrap().replace("A student", "Mine")).unwrap();
        let refused = StudentTarget::claim(&shared).unwrap_err().to_string();
        assert!(refused.contains("README.md"), "{refused}");
    }
}
