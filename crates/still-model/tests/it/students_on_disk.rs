//! What a student on disk says of itself: its form, its digests, its base.

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};
use still_attention::{KeyExponents, RowDtype, StillConfig};
use still_model::random::{random_model, save_base, tiny_config};
use still_model::{
    ExportKind, FeatureInit, GgufFormat, LoraConfig, LoraTarget, Model, ModelConfig, ModelError,
    Student, export_gguf, save_student,
};

/// A model's student with low-rank updates and nothing at its initial value.
pub fn student(model: &Model) -> Model {
    let config = model.config();
    let still = StillConfig::uniform(config.num_hidden_layers, config.geometry(), 8, 2);
    let mut student = Student::init(still, config, FeatureInit::Normal, 5).unwrap();
    let lora = LoraConfig { rank: 2, alpha: 4.0, targets: LoraTarget::ALL.to_vec() };
    student.add_lora(config, lora, 6).unwrap();
    let moved = student.map_tensors(|_, tensor| Ok((tensor + 0.01)?)).unwrap();
    model.with_student(moved)
}

fn load(path: &Path) -> Result<Model, ModelError> {
    Model::load(path.to_str().unwrap())
}

/// The error of a model that must not load.
#[track_caller]
fn refused(path: &Path) -> String {
    let error = load(path).expect_err("it loads");
    let hint = error.hint().expect("no hint");
    format!("{error}\n{hint}")
}

fn logits(model: &Model) -> Vec<f32> {
    let ids: Vec<u32> = (0..60).map(|t| (t * 37 + 5) % 256).collect();
    let mut cache = model.new_cache(1, RowDtype::F32).unwrap();
    let ids = Tensor::new(ids, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let hidden = model.forward(&ids, &mut cache, None).unwrap();
    model.logits(&hidden).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn edit(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut json = read_json(path);
    change(&mut json);
    fs::write(path, json.to_string()).unwrap();
}

/// A base and a delta of it side by side, and the delta's student in memory.
struct Pair {
    dir: tempfile::TempDir,
    base: PathBuf,
    delta: PathBuf,
    expected: Vec<f32>,
}

fn pair() -> Pair {
    let dir = tempfile::tempdir().unwrap();
    let (base, delta) = (dir.path().join("base"), dir.path().join("delta"));
    save_base(&base, &random_model(tiny_config(), 1).unwrap(), DType::F32).unwrap();
    let model = student(&load(&base).unwrap());
    save_student(&delta, &model, ExportKind::Delta).unwrap();
    Pair { dir, base, delta, expected: logits(&model) }
}

fn full(dir: &Path) -> PathBuf {
    let out = dir.join("student");
    let model = student(&random_model(tiny_config(), 1).unwrap());
    save_student(&out, &model, ExportKind::Full(DType::F32)).unwrap();
    out
}

/// No program that does not know students opens one as a dense model.
#[test]
fn a_student_says_that_it_is_one() {
    let pair = pair();
    let full = full(pair.dir.path());
    for path in [&full, &pair.delta] {
        let config = read_json(&path.join("config.json"));
        assert_eq!(config["model_type"], "still");
        assert_eq!(config["architectures"], json!(["StillForCausalLM"]));
        assert_eq!(config["still_format"], 1);
        let base = &config["base_config"];
        assert_eq!(base["model_type"], "llama");
        assert_eq!(base["architectures"], json!(["LlamaForCausalLM"]));
        assert_eq!(ModelConfig::from_hf_json(base).unwrap(), tiny_config());
        // Nothing at the top that a dense model would be built from.
        for key in ["hidden_size", "num_hidden_layers", "vocab_size", "eos_token_id"] {
            assert!(config.get(key).is_none(), "{key}");
        }
    }
    let out = pair.dir.path().join("student.gguf");
    export_gguf(&out, &load(&full).unwrap(), GgufFormat::Q8_0).unwrap();
    let bytes = fs::read(&out).unwrap();
    let architecture = b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0still";
    assert!(bytes.windows(architecture.len()).any(|window| window == architecture));
}

/// In every form; absent where nothing was said.
#[test]
fn a_student_says_how_its_rows_are_stored() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base");
    save_base(&base, &random_model(tiny_config(), 1).unwrap(), DType::F32).unwrap();
    for rows in [None, Some(RowDtype::Int8), Some(RowDtype::Int4)] {
        let mut model = student(&load(&base).unwrap());
        model.student.as_mut().unwrap().config.rows = rows;
        let name = |what: &str| dir.path().join(format!("{what}-{rows:?}"));
        let (full, delta) = (name("full"), name("delta"));
        save_student(&full, &model, ExportKind::Full(DType::F32)).unwrap();
        save_student(&delta, &model, ExportKind::Delta).unwrap();
        let gguf = name("gguf").with_extension("gguf");
        export_gguf(&gguf, &model, GgufFormat::Q8_0).unwrap();
        for path in [&full, &delta, &gguf] {
            let read = load(path).unwrap();
            assert_eq!(read.student.as_ref().unwrap().config.rows, rows, "{}", path.display());
            assert_eq!(read.cache_rows(RowDtype::F32), rows.unwrap_or(RowDtype::F32));
            assert_eq!(read.teacher().cache_rows(RowDtype::Bf16), RowDtype::Bf16);
        }
        let said = &read_json(&full.join("config.json"))["still"]["rows"];
        assert_eq!(*said, rows.map_or(Value::Null, |rows| json!(rows.name())));
    }
    edit(&dir.path().join("full-None/config.json"), |config| {
        config["still"]["rows"] = json!("int3")
    });
    assert!(refused(&dir.path().join("full-None")).contains("int3"));
}

/// In every form; a head's exponents are of the channels that it has.
#[test]
fn a_student_says_how_its_keys_are_scaled() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base");
    save_base(&base, &random_model(tiny_config(), 1).unwrap(), DType::F32).unwrap();
    let mut model = student(&load(&base).unwrap());
    let exponents: KeyExponents = "0 3 -2 0 1 3 -2 0".parse().unwrap();
    let all = vec![vec![exponents.clone(); 2]; 2];
    model.student.as_mut().unwrap().config.key_exponents = all.clone();
    let (full, delta) = (dir.path().join("full"), dir.path().join("delta"));
    save_student(&full, &model, ExportKind::Full(DType::F32)).unwrap();
    save_student(&delta, &model, ExportKind::Delta).unwrap();
    let gguf = dir.path().join("student.gguf");
    export_gguf(&gguf, &model, GgufFormat::Q8_0).unwrap();
    for path in [&full, &delta, &gguf] {
        let read = load(path).unwrap().student.unwrap();
        assert_eq!(read.config.key_exponents, all, "{}", path.display());
        assert_eq!(read.layers[1].config.key_exponents, all[1], "{}", path.display());
    }
    let said = read_json(&full.join("config.json"))["still"]["key_exponents"].clone();
    assert_eq!(said[0][1], json!(exponents.to_string()));
    for (wrong, told) in [
        (json!([[], ["0 1", "0 1"]]), "layer 1: 2 key exponents of a head"),
        (json!([["0 0 0 0 0 0 0 0"], []]), "layer 0: key exponents of 1 heads"),
        (json!([[], [], []]), "key exponents cover 3 layers"),
        (json!([["0 31", "0"], []]), "31, expected -30 to 30"),
    ] {
        edit(&full.join("config.json"), |config| config["still"]["key_exponents"] = wrong);
        let refused = refused(&full);
        assert!(refused.contains(told), "{refused}");
    }
}

/// Half the bytes, and the values that bf16 has.
#[test]
fn a_delta_in_bf16_is_its_rounded_student() {
    let pair = pair();
    let model = load(&pair.delta).unwrap();
    let narrow = pair.dir.path().join("narrow");
    save_student(&narrow, &model, ExportKind::DeltaIn(DType::BF16)).unwrap();
    let read = load(&narrow).unwrap();
    let bf16 = |tensor: &Tensor| Ok(tensor.to_dtype(DType::BF16)?.to_dtype(DType::F32)?);
    let rounded = |name: &str, tensor: &Tensor| match name.ends_with("log_lambda") {
        true => Ok(tensor.clone()),
        false => bf16(tensor),
    };
    let student = model.student.as_ref().unwrap().map_tensors(rounded).unwrap();
    let expected = model.with_student(student);
    let got = logits(&read);
    assert_eq!(got, logits(&expected));
    assert_ne!(got, pair.expected, "nothing was rounded");
    let size = |dir: &Path| fs::metadata(dir.join("student.safetensors")).unwrap().len();
    let (wide, narrow_bytes) = (size(&pair.delta), size(&narrow));
    let values = 4 * model.student.as_ref().unwrap().parameters() as u64;
    assert!(wide - narrow_bytes > values * 45 / 100, "{wide} and {narrow_bytes} bytes");
    // Both are deltas to whatever opens one: what is saved again in full is the rounded student too.
    let again = pair.dir.path().join("again");
    save_student(&again, &read, ExportKind::Delta).unwrap();
    assert_eq!(logits(&load(&again).unwrap()), got);
    let out = pair.dir.path().join("narrow.gguf");
    export_gguf(&out, &read, GgufFormat::Q8_0).unwrap();
    load(&out).unwrap();
}

#[test]
fn students_from_before_there_was_a_format_load() {
    let pair = pair();
    let full = full(pair.dir.path());
    for path in [&full, &pair.delta] {
        let expected = logits(&load(path).unwrap());
        edit(&path.join("config.json"), |config| {
            let mut base = config["base_config"].take();
            let (new, old) = (config.as_object_mut().unwrap(), base.as_object_mut().unwrap());
            for key in ["still_format", "base_config", "model_type", "architectures"] {
                new.remove(key).unwrap();
            }
            new.append(old);
            if let Some(record) = config.get_mut("still_base") {
                record.as_object_mut().unwrap().remove("path").unwrap();
            }
        });
        assert_eq!(logits(&load(path).unwrap()), expected);
    }
}

#[test]
fn other_forms_are_refused_by_what_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let full = full(dir.path());
    let path = full.join("config.json");
    let config = read_json(&path);
    let with = |change: &dyn Fn(&mut Value)| {
        let mut config = config.clone();
        change(&mut config);
        fs::write(&path, config.to_string()).unwrap();
        let said = refused(&full);
        assert!(said.contains("config.json"), "{said}");
        said
    };
    let newer = with(&|config| config["still_format"] = json!(2));
    assert!(newer.contains("made by a newer version") && newer.contains("update"), "{newer}");
    for odd in [json!("1"), json!(0), json!(-1), json!(1.5), json!([])] {
        let said = with(&|config| config["still_format"] = odd.clone());
        assert!(said.contains("still_format"), "{said}");
    }
    assert!(with(&|config| config["model_type"] = json!("llama")).contains("still_format"));
    for key in ["still", "base_config"] {
        let said = with(&|config| config[key] = Value::Null);
        assert!(said.contains(&format!("\"{key}\" is missing")), "{said}");
    }
    let said = with(&|config| {
        config.as_object_mut().unwrap().remove("still_format");
    });
    assert!(said.contains("still_format"), "{said}");
}

/// Any bit of a file of tensors: the student loads as it was, or not at all.
#[test]
fn damage_is_noticed() {
    let pair = pair();
    let full = full(pair.dir.path());
    let gguf = pair.dir.path().join("student.gguf");
    export_gguf(&gguf, &load(&full).unwrap(), GgufFormat::Q8_0).unwrap();
    for (model, file) in [
        (&full, full.join("model.safetensors")),
        (&pair.delta, pair.delta.join("student.safetensors")),
        (&gguf, gguf.clone()),
    ] {
        let whole = fs::read(&file).unwrap();
        // All of the header's beginning, and some bits all over.
        let bits = (0..64 * 8).chain((1..60).map(|n| n * whole.len() / 60 * 8 + n % 8));
        for bit in bits {
            let mut bytes = whole.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            fs::write(&file, bytes).unwrap();
            let said = refused(model);
            let name = file.file_name().unwrap().to_str().unwrap();
            assert!(said.contains(name), "bit {bit} of {}: {said}", file.display());
        }
        for cut in [0, 7, whole.len() / 2, whole.len() - 1] {
            fs::write(&file, &whole[..cut]).unwrap();
            refused(model);
        }
        // Without its digest, as another program would write it again.
        if file.extension().is_some_and(|extension| extension == "safetensors") {
            let tensors = candle_core::safetensors::load_buffer(&whole, &Device::Cpu).unwrap();
            candle_core::safetensors::save(&tensors, &file).unwrap();
            let said = refused(model);
            assert!(said.contains("no digest"), "{said}");
        }
        fs::write(&file, &whole).unwrap();
        load(model).unwrap();
    }
    // What is meant to be edited by hand has none.
    edit(&full.join("config.json"), |config| config["base_config"]["eos_token_id"] = json!([3]));
    edit(&full.join("tokenizer_config.json"), |config| config["eos_token"] = json!("x"));
    assert_eq!(load(&full).unwrap().config().eos_token_ids, [3]);
}

#[test]
fn a_base_and_its_delta_move_together() {
    let pair = pair();
    let elsewhere = pair.dir.path().join("else/where");
    fs::create_dir_all(&elsewhere).unwrap();
    let moved = ["base", "delta"].map(|name| {
        fs::rename(pair.dir.path().join(name), elsewhere.join(name)).unwrap();
        elsewhere.join(name)
    });
    assert_eq!(logits(&load(&moved[1]).unwrap()), pair.expected);
    // The delta alone finds its base where it was.
    fs::rename(&moved[0], &pair.base).unwrap();
    assert_eq!(logits(&load(&moved[1]).unwrap()), pair.expected);
    // Neither: both places are told.
    fs::remove_dir_all(&pair.base).unwrap();
    let said = refused(&moved[1]);
    for place in ["delta/../base: not there", pair.base.to_str().unwrap()] {
        assert!(said.contains(place), "no {place} in {said}");
    }
    // Another base beside it, its own where it was: each place is looked at.
    save_base(&moved[0], &random_model(tiny_config(), 2).unwrap(), DType::F32).unwrap();
    assert!(refused(&moved[1]).contains("another one: sha256"));
    save_base(&pair.base, &random_model(tiny_config(), 1).unwrap(), DType::F32).unwrap();
    assert_eq!(logits(&load(&moved[1]).unwrap()), pair.expected);
}

#[test]
fn a_base_is_its_configuration_too() {
    let pair = pair();
    let path = pair.base.join("config.json");
    let config = fs::read_to_string(&path).unwrap();
    for (key, value) in [
        ("rope_theta", json!(500_000.0)),
        ("rms_norm_eps", json!(1e-6)),
        ("rope_scaling", json!({ "rope_type": "linear", "factor": 4.0 })),
    ] {
        edit(&path, |config| config[key] = value.clone());
        let said = refused(&pair.delta);
        assert!(said.contains(key) && said.contains("base"), "{key}: {said}");
        fs::write(&path, &config).unwrap();
    }
    // What changes no value may change: where a text ends, how long one may be.
    edit(&path, |config| {
        config["eos_token_id"] = json!([5]);
        config["max_position_embeddings"] = json!(4096);
        config["architectures"] = json!(["Another"]);
    });
    let loaded = load(&pair.delta).unwrap();
    assert_eq!(loaded.config().eos_token_ids, [5]);
    assert_eq!(logits(&loaded), pair.expected);
}

/// Not of itself, nor of each other: that would never end.
#[test]
fn a_delta_is_of_a_model_with_all_its_weights() {
    let pair = pair();
    let point = |delta: &Path, at: &str| {
        edit(&delta.join("config.json"), |config| {
            config["still_base"]["path"] = json!(at);
            config["still_base"]["source"] = json!(delta.join(at));
        });
    };
    point(&pair.delta, ".");
    assert!(refused(&pair.delta).contains("is a delta itself"));
    let second = pair.dir.path().join("second");
    fs::create_dir(&second).unwrap();
    for entry in fs::read_dir(&pair.delta).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), second.join(entry.file_name())).unwrap();
    }
    point(&pair.delta, "../second");
    point(&second, "../delta");
    assert!(refused(&pair.delta).contains("is a delta itself"));
    point(&second, "../base");
    assert!(refused(&pair.delta).contains("is a delta itself"), "a delta of a delta");
    point(&pair.delta, "../base");
    assert_eq!(logits(&load(&pair.delta).unwrap()), pair.expected);

    // Of a student whose own updates are merged, whole or quantized.
    let full = full(pair.dir.path());
    let gguf = pair.dir.path().join("a.gguf");
    export_gguf(&gguf, &load(&full).unwrap(), GgufFormat::Q8_0).unwrap();
    for whole in [full, gguf] {
        let model = student(&load(&whole).unwrap());
        save_student(&second, &model, ExportKind::Delta).unwrap();
        assert_eq!(logits(&load(&second).unwrap()), logits(&model));
    }
}

#[test]
fn settings_of_generation_survive() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base");
    save_base(&base, &random_model(tiny_config(), 1).unwrap(), DType::F32).unwrap();
    let generation = json!({ "eos_token_id": [9, 257], "temperature": 0.6, "top_p": 0.9 });
    fs::write(base.join("generation_config.json"), generation.to_string()).unwrap();
    fs::write(base.join("chat_template.jinja"), "{{ messages[0]['content'] }}!").unwrap();
    let model = student(&load(&base).unwrap());
    assert_eq!(model.config().eos_token_ids, [257, 9]);
    let out = dir.path().join("student");
    for kind in [ExportKind::Full(DType::F32), ExportKind::Delta] {
        save_student(&out, &model, kind).unwrap();
        let loaded = load(&out).unwrap();
        assert_eq!(loaded.config().eos_token_ids, [257, 9], "{kind:?}");
        assert_eq!(loaded.base.generation_config.as_ref(), Some(&generation), "{kind:?}");
        assert_eq!(
            loaded.tokenizer.chat_template().map(|template| template.source()),
            model.tokenizer.chat_template().map(|template| template.source()),
            "{kind:?}"
        );
    }
    save_student(&out, &model, ExportKind::Full(DType::F32)).unwrap();
    assert_eq!(read_json(&out.join("generation_config.json")), generation);
    // Through the quantized student too, and whole again.
    let gguf = dir.path().join("student.gguf");
    export_gguf(&gguf, &load(&out).unwrap(), GgufFormat::Q8_0).unwrap();
    let loaded = load(&gguf).unwrap();
    assert_eq!(loaded.config().eos_token_ids, [257, 9]);
    assert_eq!(loaded.base.generation_config, Some(generation));
}

/// Everything in a student can be read by whom the umask lets read; nothing is left as a temporary file's private one.
#[cfg(unix)]
#[test]
fn files_of_a_student_have_the_umasks_mode() {
    use std::os::unix::fs::PermissionsExt;
    let pair = pair();
    let full = full(pair.dir.path());
    let usual = pair.dir.path().join("usual");
    fs::write(&usual, "").unwrap();
    let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
    let gguf = pair.dir.path().join("student.gguf");
    export_gguf(&gguf, &load(&full).unwrap(), GgufFormat::Q8_0).unwrap();
    let mut files = vec![gguf];
    for dir in [full, pair.delta] {
        files.extend(dir.read_dir().unwrap().map(|entry| entry.unwrap().path()));
        assert_eq!(mode(&dir) & 0o666, mode(&usual), "{}", dir.display());
    }
    assert!(files.len() >= 9, "{files:?}");
    for file in files {
        assert_eq!(mode(&file), mode(&usual), "{}", file.display());
    }
}

/// `save_student` to a path that ends in a slash is a save to that path.
#[test]
fn a_slash_at_the_end_means_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let model = student(&random_model(tiny_config(), 1).unwrap());
    let out = dir.path().join("student");
    for _ in 0..2 {
        let slashed = format!("{}/", out.display());
        save_student(Path::new(&slashed), &model, ExportKind::Full(DType::F32)).unwrap();
        assert_eq!(dir.path().read_dir().unwrap().count(), 1);
    }
    load(&out).unwrap();
}

#[test]
fn formats_are_found_by_their_names() {
    for format in GgufFormat::ALL {
        assert_eq!(format.to_string().parse::<GgufFormat>().unwrap(), format);
    }
    let error = "q3_k".parse::<GgufFormat>().unwrap_err();
    assert!(error.to_string().contains("\"q3_k\""), "{error}");
    assert_eq!(error.hint().as_deref(), Some("use one of q8_0, q4_1, q4_k"));
    // Of 512 values, with their scales: 34 bytes for each 32, 144 for each 256.
    assert_eq!(GgufFormat::ALL.map(|format| format.bytes(512)), [544, 288, 288]);
}
