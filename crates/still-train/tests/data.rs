//! From files to windows: kinds of files, the cache, orders that a resumed run finds again.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use proptest::prelude::*;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use still_model::Tokenizer;
use still_model::random::{random_model, tiny_config};
use still_train::{DataRecipe, LossOn, Position, TokenCache, TrainError, Window, Windows};
use tempfile::TempDir;

const ANSWER: &str = r#"{"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Nobody."}]}"#;

/// Files, and a cache beside them.
struct Fixture {
    dir: TempDir,
    tokenizer: Tokenizer,
}

impl Fixture {
    fn new() -> Self {
        let tokenizer = random_model(tiny_config(), 0).unwrap().tokenizer;
        Self { dir: tempfile::tempdir().unwrap(), tokenizer }
    }

    /// A file that has been there for a while.
    fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::write(&path, content).unwrap();
        let file = fs::File::options().write(true).open(&path).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(60)).unwrap();
        path
    }

    fn cache_dir(&self) -> PathBuf {
        self.dir.path().join("tokens")
    }

    fn cached(&self) -> Vec<PathBuf> {
        let Ok(entries) = self.cache_dir().read_dir() else { return Vec::new() };
        let mut all: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
        all.sort();
        all
    }

    fn try_read(&self, files: &[PathBuf], recipe: &DataRecipe) -> Result<Windows, TrainError> {
        Windows::read(files, &self.tokenizer, recipe, 7, &TokenCache::at(self.cache_dir()))
    }

    #[track_caller]
    fn read(&self, files: &[PathBuf], recipe: &DataRecipe) -> Windows {
        self.try_read(files, recipe).unwrap()
    }

    /// What is wrong, and what to do about it.
    #[track_caller]
    fn complaint(&self, file: PathBuf, recipe: &DataRecipe) -> (String, String) {
        let error = self.try_read(&[file], recipe).unwrap_err();
        (error.to_string(), error.hint().unwrap())
    }
}

/// Windows of `length`, nothing left out but single tokens.
fn of_length(length: usize) -> DataRecipe {
    DataRecipe { length, min_length: 2, ..DataRecipe::default() }
}

/// A line with a text that is like no other's.
fn line(n: usize, length: usize) -> String {
    let text: String =
        (0..length).map(|i| char::from(b'a' + ((n * 7 + i * i + i / 3) % 26) as u8)).collect();
    format!("{{\"text\": \"{text}\"}}\n")
}

fn lines(documents: usize) -> String {
    (0..documents).map(|n| line(n, 20 + n * 13 % 90)).collect()
}

fn draw(windows: &Windows, steps: usize, batch: usize) -> Vec<Window> {
    let mut position = Position::default();
    (0..steps).flat_map(|_| windows.next(&mut position, batch)).collect()
}

fn text(fixture: &Fixture, window: &Window) -> String {
    fixture.tokenizer.decode(window.ids(), false).unwrap()
}

#[test]
fn plain_windows_come_in_the_order_that_recorded_runs_know() {
    let fixture = Fixture::new();
    let (a, b) =
        (fixture.file("a.jsonl", lines(9)), fixture.file("b.txt", "sea and wind ".repeat(9)));
    let windows = fixture.read(&[a.clone(), b.clone()], &of_length(16));
    let mut expected = Vec::new();
    for line in fs::read_to_string(a).unwrap().lines().map(str::to_owned) {
        let document: serde_json::Value = serde_json::from_str(&line).unwrap();
        let ids = fixture.tokenizer.encode(document["text"].as_str().unwrap(), true).unwrap();
        expected.extend(ids.chunks(16).filter(|ids| ids.len() >= 2).map(<[u32]>::to_vec));
    }
    let ids = fixture.tokenizer.encode(&fs::read_to_string(b).unwrap(), true).unwrap();
    expected.extend(ids.chunks(16).filter(|ids| ids.len() >= 2).map(<[u32]>::to_vec));
    assert_eq!(windows.len(), expected.len());
    let mut position = Position::default();
    for epoch in 0..3 {
        let mut order: Vec<usize> = (0..expected.len()).collect();
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        rng.set_stream(epoch);
        order.shuffle(&mut rng);
        for at in order {
            let window = windows.next(&mut position, 1).remove(0);
            assert_eq!(window, Window::from(expected[at].clone()), "epoch {epoch}");
        }
    }
}

/// Recipes that exercise every way of ordering windows.
fn recipes() -> Vec<DataRecipe> {
    let mixed = DataRecipe { lengths: vec![8, 24, 64], min_length: 4, ..DataRecipe::default() };
    vec![
        of_length(16),
        DataRecipe { weights: vec![1.0, 2.5], ..of_length(24) },
        DataRecipe { pack: true, ..of_length(64) },
        DataRecipe { length_weights: vec![3.0, 2.0, 1.0], heldout: 0.2, ..mixed.clone() },
        DataRecipe { length_steps: vec![3, 4, 1], weights: vec![1.0, 1.0], ..mixed.clone() },
        DataRecipe { pack: true, weights: vec![0.2, 0.8], ..mixed },
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Wherever a run stops, what it saved is enough to go on: same windows, same epochs.
    #[test]
    fn resumed_equals_uninterrupted(
        which in 0..6_usize,
        batches in prop::collection::vec(1..4_usize, 1..40),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..4),
    ) {
        let fixture = Fixture::new();
        let files =
            [fixture.file("a.jsonl", lines(11)), fixture.file("b.jsonl", line(99, 150) + &line(5, 30))];
        let recipe = &recipes()[which];
        let windows = fixture.read(&files, recipe);
        let mut position = Position::default();
        let whole: Vec<Vec<Window>> =
            batches.iter().map(|&batch| windows.next(&mut position, batch)).collect();
        prop_assert!(whole.iter().zip(&batches).all(|(windows, &batch)| windows.len() == batch));

        let cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(batches.len())).collect();
        let mut resumed = Position::default();
        let mut windows = fixture.read(&files, recipe);
        for (step, &batch) in batches.iter().enumerate() {
            if cuts.contains(&step) {
                let saved = serde_json::to_string(&resumed).unwrap();
                prop_assert!(saved.len() < 200);
                resumed = serde_json::from_str(&saved).unwrap();
                windows = fixture.read(&files, recipe);
            }
            prop_assert_eq!(&windows.next(&mut resumed, batch), &whole[step]);
        }
        prop_assert_eq!(resumed, position);
        let stages: Vec<_> = batches.iter().map(|&batch| (1, batch)).collect();
        prop_assert_eq!(windows.position_after(&stages), position);
    }
}

#[test]
fn the_middle_of_a_long_run_is_found_without_replaying_it() {
    let fixture = Fixture::new();
    let files = [fixture.file("a.jsonl", lines(11)), fixture.file("b.jsonl", lines(3))];
    let windows = fixture.read(&files, &recipes()[4]);
    let far = Position { windows: 1 << 40, steps: 1 << 39, drawn: [1 << 40; 8] };
    assert_eq!(windows.next(&mut far.clone(), 3), windows.next(&mut far.clone(), 3));
}

#[test]
fn an_epoch_of_mixed_lengths_reads_every_token_once() {
    let fixture = Fixture::new();
    let words: String = (0..4000).map(|n| format!("{n:05}")).collect();
    let file = fixture.file("long.txt", words.clone());
    let recipe =
        DataRecipe { lengths: vec![50, 100, 200], min_length: 10, ..DataRecipe::default() };
    let windows = fixture.read(&[file], &recipe);
    assert_eq!(windows.tokens, 20_000);
    let summary = windows.summary();
    // Steps share equally, so tokens go by length.
    for &(length, count) in &summary.windows {
        let share = (length * count) as f64 / 20_000.0;
        assert!((share - length as f64 / 350.0).abs() < 0.02, "{length}: {share}");
    }
    let mut position = Position::default();
    let mut seen: std::collections::BTreeMap<usize, Vec<String>> = Default::default();
    while position.drawn.iter().zip(&summary.windows).any(|(drawn, (_, count))| drawn < count) {
        let window = windows.next(&mut position, 1).remove(0);
        let of_length = seen.entry(window.len()).or_default();
        if of_length.len() < summary.windows.iter().find(|(l, _)| *l == window.len()).unwrap().1 {
            of_length.push(text(&fixture, &window));
        }
    }
    let mut pieces: Vec<String> = seen.into_values().flatten().collect();
    let starts = |piece: &String| words.find(piece.as_str()).unwrap();
    pieces.sort_by_key(starts);
    assert_eq!(pieces.concat(), words);
}

#[test]
fn steps_follow_the_weights_or_the_curriculum() {
    let fixture = Fixture::new();
    let file = fixture.file("long.txt", "the sea ".repeat(2000));
    let lengths = |recipe: &DataRecipe, steps| -> Vec<usize> {
        draw(&fixture.read(std::slice::from_ref(&file), recipe), steps, 1)
            .iter()
            .map(Window::len)
            .collect()
    };
    let mixed =
        DataRecipe { lengths: vec![10, 20], length_weights: vec![3.0, 1.0], ..of_length(10) };
    let drawn = lengths(&mixed, 1000);
    let short = drawn.iter().filter(|&&length| length == 10).count();
    assert!((700..800).contains(&short), "{short} of 1000 steps at three quarters");
    let curriculum =
        DataRecipe { lengths: vec![10, 20], length_steps: vec![3, 1], ..of_length(10) };
    assert_eq!(lengths(&curriculum, 6), [10, 10, 10, 20, 20, 20]);
}

#[test]
fn a_step_has_one_length() {
    let fixture = Fixture::new();
    let file = fixture.file("long.txt", "the sea ".repeat(400));
    let recipe = DataRecipe { lengths: vec![10, 20, 40], ..of_length(10) };
    let windows = fixture.read(&[file], &recipe);
    let mut position = Position::default();
    for _ in 0..30 {
        let step = windows.next(&mut position, 4);
        assert!(step.iter().all(|window| window.len() == step[0].len()));
    }
}

#[test]
fn sources_are_mixed_by_tokens() {
    let fixture = Fixture::new();
    // Many short documents against one long one.
    let a = fixture.file("a.jsonl", format!("{{\"text\": \"{}\"}}\n", "a".repeat(7)).repeat(60));
    let b = fixture.file("b.txt", "b".repeat(900));
    let recipe = DataRecipe { weights: vec![3.0, 1.0], ..of_length(16) };
    let windows = fixture.read(&[a.clone(), b.clone()], &recipe);
    let drawn = draw(&windows, 5000, 1);
    let tokens = |letter: u8| -> usize {
        let id = fixture.tokenizer.encode(&char::from(letter).to_string(), false).unwrap()[0];
        drawn.iter().filter(|window| window.ids()[0] == id).map(Window::len).sum()
    };
    let ratio = tokens(b'a') as f64 / tokens(b'b') as f64;
    assert!((ratio - 3.0).abs() < 0.1, "{ratio}");
    assert_eq!(drawn, draw(&fixture.read(&[a.clone(), b], &recipe), 5000, 1));

    let error = fixture.try_read(&[a], &recipe).unwrap_err();
    assert_eq!(error.to_string(), "recipe: data.weights has 2 values for 1 files");
}

#[test]
fn packing_keeps_documents_whole_and_apart() {
    let fixture = Fixture::new();
    let file = fixture.file("a.jsonl", lines(40));
    let recipe = DataRecipe { pack: true, ..of_length(128) };
    let windows = fixture.read(std::slice::from_ref(&file), &recipe);
    let epoch = draw(&windows, windows.len(), 1);
    let mut documents: Vec<String> = Vec::new();
    for window in &epoch {
        assert!(window.len() <= 128);
        assert_eq!(window.segments().map(|segment| segment.ids.len()).sum::<usize>(), window.len());
        for segment in window.segments() {
            documents.push(fixture.tokenizer.decode(segment.ids, false).unwrap());
        }
    }
    let mut expected: Vec<String> = fs::read_to_string(file)
        .unwrap()
        .lines()
        .map(|line| {
            serde_json::from_str::<serde_json::Value>(line).unwrap()["text"]
                .as_str()
                .unwrap()
                .to_owned()
        })
        .collect();
    documents.sort();
    expected.sort();
    assert_eq!(documents, expected);
    let fewest = windows.tokens.div_ceil(128);
    assert!(epoch.len() <= fewest + 2, "{} windows, {fewest} would hold them", epoch.len());
}

#[test]
fn text_is_tokenized_once() {
    let fixture = Fixture::new();
    let file = fixture.file("a.jsonl", lines(10));
    let files = std::slice::from_ref(&file);
    let windows = fixture.read(files, &of_length(16));
    let cached = fixture.cached();
    assert_eq!(cached.len(), 1);
    assert_eq!(cached[0].extension().unwrap(), "bin");
    let written = fs::metadata(&cached[0]).unwrap().modified().unwrap();
    // Other cuts of the same tokens, from the same file.
    let again = fixture.read(files, &DataRecipe { pack: true, ..of_length(64) });
    assert_eq!(again.sha256(), windows.sha256());
    assert_eq!(fixture.cached(), cached);
    assert_eq!(fs::metadata(&cached[0]).unwrap().modified().unwrap(), written);
    // What decides the ids is part of the key.
    let other = DataRecipe { loss_on: LossOn::Answers, ..of_length(16) };
    assert_ne!(fixture.read(files, &other).sha256(), windows.sha256());
    fixture.file("a.jsonl", lines(11));
    assert_ne!(fixture.read(files, &of_length(16)).sha256(), windows.sha256());
    assert_eq!(fixture.cached().len(), 3);
    // The same text elsewhere gives the same data, and a resumed run goes on.
    let copy = fixture.file("b.jsonl", lines(10));
    assert_eq!(fixture.read(&[copy], &of_length(16)).sha256(), windows.sha256());
}

#[test]
fn a_file_that_changes_at_once_is_not_taken_for_what_it_was() {
    let fixture = Fixture::new();
    let path = fixture.dir.path().join("a.txt");
    let now = SystemTime::now();
    let read = |text: &str| {
        fs::write(&path, text).unwrap();
        fs::File::options().write(true).open(&path).unwrap().set_modified(now).unwrap();
        let windows = fixture.read(std::slice::from_ref(&path), &of_length(16));
        self::text(&fixture, &windows.next(&mut Position::default(), 1)[0])
    };
    assert_eq!((read("north"), read("south")), ("north".into(), "south".into()));
}

#[test]
fn a_damaged_cache_is_made_anew() {
    let fixture = Fixture::new();
    let file = fixture.file("a.jsonl", lines(10));
    let files = std::slice::from_ref(&file);
    let expected = draw(&fixture.read(files, &of_length(16)), 20, 1);
    let cached = fixture.cached().remove(0);
    let whole = fs::read(&cached).unwrap();
    let mut flipped = whole.clone();
    *flipped.last_mut().unwrap() ^= 1;
    for damaged in [&whole[..whole.len() - 2], &whole[..20], &[], b"not a token file", &flipped] {
        fs::write(&cached, damaged).unwrap();
        assert_eq!(draw(&fixture.read(files, &of_length(16)), 20, 1), expected);
        assert_eq!(fs::read(&cached).unwrap().len(), whole.len());
    }
    // A copy that is whole is taken, though its time is another.
    fs::write(&cached, &whole).unwrap();
    fixture.read(files, &of_length(16));
    assert_eq!(fixture.cached().len(), 1);
}

/// A `.bin` as a user's program writes it.
fn tokens(
    fixture: &Fixture,
    name: &str,
    entries: &[(&str, safetensors::Dtype, Vec<u8>)],
    tokenizer: Option<&str>,
) -> PathBuf {
    let views = entries.iter().map(|(name, dtype, bytes)| {
        let size = match dtype {
            safetensors::Dtype::U16 => 2,
            safetensors::Dtype::U32 | safetensors::Dtype::F32 => 4,
            _ => 8,
        };
        let shape = vec![bytes.len() / size];
        (*name, safetensors::tensor::TensorView::new(*dtype, shape, bytes).unwrap())
    });
    let metadata = tokenizer.map(|sha256| [("tokenizer".to_owned(), sha256.to_owned())].into());
    fixture.file(name, safetensors::serialize(views, metadata).unwrap())
}

fn tokenizer_sha256(fixture: &Fixture) -> String {
    use sha2::{Digest, Sha256};
    format!("{:x}", Sha256::digest(fixture.tokenizer.to_json().unwrap().0))
}

#[test]
fn token_files_are_data() {
    use safetensors::Dtype::{U16, U32, U64};
    let fixture = Fixture::new();
    let sha256 = tokenizer_sha256(&fixture);
    let ids: Vec<u32> = (0..50).map(|n| n * 5 % 256).collect();
    let wide: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    let narrow: Vec<u8> = ids.iter().flat_map(|&id| (id as u16).to_le_bytes()).collect();
    let ends: Vec<u8> = [20_u64, 50].iter().flat_map(|end| end.to_le_bytes()).collect();
    for (dtype, bytes) in [(U32, wide.clone()), (U16, narrow)] {
        let entries = [("ids", dtype, bytes), ("ends", U64, ends.clone())];
        let file = tokens(&fixture, "a.bin", &entries, Some(&sha256));
        let windows = fixture.read(&[file], &of_length(30));
        assert_eq!((windows.len(), windows.documents, windows.tokens), (2, 2, 50));
        let mut drawn: Vec<Vec<u32>> =
            draw(&windows, 2, 1).iter().map(|window| window.ids().to_vec()).collect();
        drawn.sort_by_key(Vec::len);
        assert_eq!(drawn, [&ids[..20], &ids[20..]]);
    }

    // What the cache holds is such a file.
    let text = fixture.file("a.jsonl", lines(10));
    let windows = fixture.read(std::slice::from_ref(&text), &of_length(16));
    let cached = fixture.cached().remove(0);
    let same = fixture.read(&[cached], &of_length(16));
    assert_eq!(draw(&same, 30, 1), draw(&windows, 30, 1));
    assert_eq!(same.sha256(), windows.sha256());
    assert_eq!(fixture.cached().len(), 1);
}

#[test]
fn token_files_that_are_wrong_say_how() {
    use safetensors::Dtype::{F32, U16, U32, U64};
    let fixture = Fixture::new();
    let sha256 = tokenizer_sha256(&fixture);
    let ids: Vec<u8> = (0..9_u32).flat_map(|id| id.to_le_bytes()).collect();
    let ends = |end: u64| end.to_le_bytes().to_vec();
    let complaint = |entries: &[(&str, safetensors::Dtype, Vec<u8>)], tokenizer: Option<&str>| {
        fixture.complaint(tokens(&fixture, "a.bin", entries, tokenizer), &of_length(8)).0
    };
    let good = [("ids", U32, ids.clone()), ("ends", U64, ends(9))];
    let says = |text: String, words: &str| assert!(text.contains(words), "no {words:?} in {text}");
    says(complaint(&good, None), "names no tokenizer");
    says(complaint(&good, Some("abc")), &format!("tokenizer abc, but the model's is {sha256}"));
    says(complaint(&good[..1], Some(&sha256)), "no \"ends\"");
    says(complaint(&good[1..], Some(&sha256)), "no \"ids\"");
    let with = |entry: (&'static str, _, _)| {
        let mut entries = good.to_vec();
        entries.retain(|(name, _, _)| *name != entry.0);
        entries.push(entry);
        complaint(&entries, Some(&sha256))
    };
    says(with(("ids", F32, vec![0; 8])), "\"ids\" is F32");
    says(with(("ids", U16, vec![0xff; 18])), "token id 65535, but the vocabulary has 258 entries");
    says(with(("ends", U64, ends(7))), "\"ends\" does not lead to its 9 tokens");
    says(with(("ends", U64, [ends(8), ends(7), ends(9)].concat())), "\"ends\"");
    says(with(("answers", U64, [ends(5), ends(3)].concat())), "\"answers\"");
    says(with(("answers", U64, [ends(5), ends(30)].concat())), "\"answers\"");
    says(fixture.complaint(fixture.file("a.bin", "ids"), &of_length(8)).0, "a.bin: unreadable");
    says(fixture.complaint(fixture.file("b.bin", ""), &of_length(8)).0, "b.bin: unreadable");
}

#[test]
fn only_answers_count_if_asked() {
    let fixture = Fixture::new();
    let messages = serde_json::json!({ "messages": [
        { "role": "system", "content": "Be brief." },
        { "role": "user", "content": "Wo ist das Öl?" },
        { "role": "assistant", "content": "Über dem Meer." },
        { "role": "user", "content": "Danke" },
        { "role": "assistant", "content": "Bitte." },
    ]});
    let file = fixture.file("chat.jsonl", format!("{messages}\n{}", line(1, 30)));
    let files = std::slice::from_ref(&file);
    let all = fixture.read(files, &of_length(400));
    let answers = fixture.read(files, &DataRecipe { loss_on: LossOn::Answers, ..of_length(400) });
    let (all, answers) = (draw(&all, 2, 1), draw(&answers, 2, 1));
    for (all, answers) in all.iter().zip(&answers) {
        assert_eq!(all.ids(), answers.ids(), "ids do not depend on what counts");
        assert!(all.segments().all(|segment| segment.counted.is_none()));
        let segment = answers.segments().next().unwrap();
        let counted = segment.counted.unwrap();
        let written = text(&fixture, all);
        if written.starts_with("<|im_start|>") {
            assert_eq!(
                written,
                "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWo ist das Öl?<|im_end|>\n\
                 <|im_start|>assistant\nÜber dem Meer.<|im_end|>\n<|im_start|>user\nDanke<|im_end|>\n\
                 <|im_start|>assistant\nBitte.<|im_end|>\n"
            );
            let kept: Vec<u32> = segment
                .ids
                .iter()
                .zip(counted)
                .filter(|(_, counted)| **counted)
                .map(|(&id, _)| id)
                .collect();
            let kept = fixture.tokenizer.decode(&kept, false).unwrap();
            assert_eq!(kept, "Über dem Meer.<|im_end|>Bitte.<|im_end|>");
        } else {
            assert!(counted.iter().all(|&counted| counted), "no conversation: all of it");
        }
    }
    // Windows that hold no answer are not read at all.
    let short = fixture.read(files, &DataRecipe { loss_on: LossOn::Answers, ..of_length(16) });
    let windows = draw(&short, short.len(), 1);
    assert!(windows.iter().all(|window| {
        window
            .segments()
            .all(|segment| segment.counted.unwrap()[1..].iter().any(|&counted| counted))
    }));
    assert!(short.len() < fixture.read(files, &of_length(16)).len());
}

/// A tokenizer that names the end of a sequence.
fn with_end(fixture: &Fixture) -> Tokenizer {
    fixture.tokenizer.save(fixture.dir.path()).unwrap();
    let path = fixture.dir.path().join("tokenizer_config.json");
    let mut config: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    config["eos_token"] = serde_json::json!({ "content": "<|im_end|>" });
    fs::write(&path, config.to_string()).unwrap();
    Tokenizer::from_hf_dir(fixture.dir.path()).unwrap()
}

#[test]
fn prompts_of_instructions_are_masked_if_asked() {
    let mut fixture = Fixture::new();
    let lines = [
        r#"{"instruction": "Wo ist das Öl?", "input": "", "output": "Über dem Meer."}"#,
        r#"{"instruction": "Translate.", "input": "Öl", "output": "oil"}"#,
    ];
    let file = fixture.file("alpaca.jsonl", lines.join("\n"));
    let (what, hint) = fixture.complaint(file.clone(), &of_length(400));
    assert!(what.contains("line 1") && what.contains("eos_token"), "{what}");
    assert!(hint.contains("tokenizer_config.json"), "{hint}");
    fixture.tokenizer = with_end(&fixture);
    let files = std::slice::from_ref(&file);
    let asked = DataRecipe { loss_on: LossOn::Answers, ..of_length(400) };
    let (all, answers) = (fixture.read(files, &of_length(400)), fixture.read(files, &asked));
    let expected = [
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a response \
         that appropriately completes the request.\n\n### Instruction:\nTranslate.\n\n### Input:\nÖl\n\n### Response:\n\
         |oil<|im_end|>",
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n\
         ### Instruction:\nWo ist das Öl?\n\n### Response:\n|Über dem Meer.<|im_end|>",
    ];
    let split = |window: &Window| {
        let segment = window.segments().next().unwrap();
        let counted = segment.counted.unwrap();
        let start = counted.iter().position(|&counted| counted).unwrap();
        assert!(counted[start..].iter().all(|&counted| counted), "one answer, to the end");
        let decode = |ids: &[u32]| fixture.tokenizer.decode(ids, false).unwrap();
        format!("{}|{}", decode(&segment.ids[..start]), decode(&segment.ids[start..]))
    };
    let mut written: Vec<String> = draw(&answers, 2, 1).iter().map(split).collect();
    written.sort_by_key(String::len);
    let mut expected = expected.map(str::to_owned);
    expected.sort_by_key(String::len);
    assert_eq!(written, expected);
    let (all, answers) = (draw(&all, 2, 1), draw(&answers, 2, 1));
    for (all, answers) in all.iter().zip(&answers) {
        assert_eq!(all.ids(), answers.ids(), "ids do not depend on what counts");
        assert!(all.segments().all(|segment| segment.counted.is_none()));
    }
    // Packed and cut, the same tokens count.
    let count = |windows: &Windows| -> usize {
        let windows = draw(windows, windows.len(), 1);
        let of = |window: &Window| -> usize {
            window
                .segments()
                .map(|segment| segment.counted.unwrap().iter().filter(|&&c| c).count())
                .sum()
        };
        windows.iter().map(of).sum()
    };
    let whole = count(&fixture.read(files, &asked));
    let packed = DataRecipe { pack: true, length: 800, ..asked.clone() };
    assert_eq!(fixture.read(files, &packed).len(), 1);
    assert_eq!(count(&fixture.read(files, &packed)), whole);
}

#[test]
fn instructions_that_are_malformed_are_named() {
    let fixture = Fixture::new();
    for (line, word) in [
        (r#"{"instruction": "a"}"#, "an instruction without \"output\""),
        (r#"{"instruction": 1, "output": "a"}"#, "\"instruction\" is not a string"),
        (r#"{"instruction": "a", "input": [], "output": "a"}"#, "\"input\" is not a string"),
        (r#"{"output": "a"}"#, "an instruction without \"instruction\""),
        (r#"{"question": "a"}"#, "nor \"instruction\""),
    ] {
        let (what, hint) = fixture.complaint(fixture.file("a.jsonl", line), &of_length(16));
        assert!(what.contains("line 1") && what.contains(word), "{line}: {what}");
        assert!(hint.contains("instruction"), "{hint}");
    }
}

#[test]
fn text_may_have_another_field() {
    let fixture = Fixture::new();
    let file = fixture.file("a.jsonl", "{\"id\": 1, \"body\": \"the open sea\"}\n");
    let recipe = DataRecipe { text_field: "body".into(), ..of_length(16) };
    let windows = fixture.read(std::slice::from_ref(&file), &recipe);
    assert_eq!(text(&fixture, &draw(&windows, 1, 1)[0]), "the open sea");
    let (what, hint) = fixture.complaint(file, &of_length(16));
    assert!(what.contains("line 1: neither \"text\" nor \"messages\""), "{what}");
    assert!(hint.contains("data.text_field"), "{hint}");
}

#[test]
fn malformed_lines_are_named() {
    let fixture = Fixture::new();
    for (bad, words) in [
        ("{\"text\": ", "line 3: EOF"),
        ("[1]", "line 3: not a JSON object"),
        ("{\"text\": 1}", "line 3: \"text\" is not a string"),
        ("{\"messages\": [{\"role\": \"user\"}]}", "line 3: \"messages\": missing field"),
        ("{\"messages\": \"hi\"}", "line 3: \"messages\": invalid type"),
        ("{\"messages\": []}", "line 3: a conversation without messages"),
        (
            "{\"messages\": [{\"role\": \"user\", \"content\": [{\"type\": \"image\"}]}]}",
            "line 3: \"messages\": \"content\" has a part of type \"image\"",
        ),
        (
            "{\"messages\": [{\"role\": \"user\", \"content\": \"a\", \"name\": \"b\"}]}",
            "line 3: the chat template leaves out \"name\" of messages of the role \"user\"",
        ),
        (
            "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}], \"tools\": [{}]}",
            "line 3: the chat template leaves out \"tools\"",
        ),
        (
            "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}], \"tools\": [1]}",
            "line 3: \"tools\" is not a list of objects",
        ),
        (
            "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}], \"chat_template_kwargs\": {\"x\": 1}}",
            "line 3: the chat template leaves out the variable \"x\"",
        ),
    ] {
        let file = fixture.file("a.jsonl", format!("{}\n{bad}\n{{]\n", line(0, 30)));
        let (what, hint) = fixture.complaint(file, &of_length(16));
        assert!(what.contains("a.jsonl") && what.contains(words), "no {words:?} in {what}");
        assert!(!hint.is_empty());
    }
    assert!(fixture.cached().is_empty(), "nothing half tokenized is left");
    let cut = zstd::encode_all(lines(500).as_bytes(), 3).unwrap();
    let file = fixture.file("a.jsonl.zst", &cut[..cut.len() / 2]);
    let (what, _) = fixture.complaint(file, &of_length(16));
    assert!(what.contains("a.jsonl.zst: line "), "{what}");
    let latin =
        fixture.file("latin.jsonl", b"{\"text\": \"ok so far\"}\n{\"text\": \"caf\xe9\"}\n");
    assert!(fixture.complaint(latin, &of_length(16)).0.contains("line 2"));
}

#[test]
fn a_model_without_a_template_reads_no_conversations() {
    let mut fixture = Fixture::new();
    let (json, _) = fixture.tokenizer.to_json().unwrap();
    let config = serde_json::json!({});
    fixture.tokenizer =
        Tokenizer::from_json(json.as_bytes(), config, Path::new("tokenizer.json")).unwrap();
    let (what, _) = fixture.complaint(fixture.file("a.jsonl", ANSWER), &of_length(16));
    assert!(what.contains("line 1: the model has no chat template"), "{what}");
}

#[test]
fn a_template_is_given_all_that_a_line_has_and_may_mark_what_is_generated() {
    let mut fixture = Fixture::new();
    let (json, _) = fixture.tokenizer.to_json().unwrap();
    // Rewrites earlier turns (how many there are), but says what is generated.
    let config = serde_json::json!({
        "chat_template": "{{ messages|length }}{{ tools | tojson if tools }}{{ tone }}\
            {% for m in messages %}<{{ m.role }}{{ m.name }}>\
            {% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}.{% endgeneration %}\
            {% else %}{{ m.content }}{% endif %}{% endfor %}"
    });
    fixture.tokenizer =
        Tokenizer::from_json(json.as_bytes(), config, Path::new("tokenizer.json")).unwrap();
    let line = serde_json::json!({
        "id": 7,
        "tools": "[{\"name\": \"sea\"}]",
        "chat_template_kwargs": { "tone": "!" },
        "messages": [
            { "role": "user", "content": "Where to?", "name": "Al" },
            { "role": "assistant", "content": null, "tool_calls": [{ "name": "sea" }] },
            { "role": "tool", "content": "north", "tool_call_id": "1" },
            { "role": "assistant", "content": "North" },
        ],
    });
    let file = fixture.file("a.jsonl", format!("{line}\n"));
    let answers = DataRecipe { loss_on: LossOn::Answers, ..of_length(400) };
    let windows = fixture.read(std::slice::from_ref(&file), &answers);
    let window = draw(&windows, 1, 1).remove(0);
    let expected = "4[{\"name\": \"sea\"}]!<userAl>Where to?<assistant>[{\"name\": \"sea\"}].<tool>north<assistant>North.";
    assert_eq!(text(&fixture, &window), expected);
    let segment = window.segments().next().unwrap();
    let counted = segment.counted.unwrap();
    let kept: Vec<u32> = segment
        .ids
        .iter()
        .zip(counted)
        .filter(|(_, counted)| **counted)
        .map(|(id, _)| *id)
        .collect();
    assert_eq!(fixture.tokenizer.decode(&kept, false).unwrap(), "[{\"name\": \"sea\"}].North.");
}

#[test]
fn a_template_that_rewrites_earlier_turns_tells_no_answers() {
    let mut fixture = Fixture::new();
    let (json, _) = fixture.tokenizer.to_json().unwrap();
    let config = serde_json::json!({
        "chat_template": "{{ messages|length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    });
    fixture.tokenizer =
        Tokenizer::from_json(json.as_bytes(), config, Path::new("tokenizer.json")).unwrap();
    let file = fixture.file("a.jsonl", ANSWER);
    fixture.read(std::slice::from_ref(&file), &of_length(16));
    let answers = DataRecipe { loss_on: LossOn::Answers, ..of_length(16) };
    let (what, _) = fixture.complaint(file, &answers);
    assert!(what.contains("line 1") && what.contains("message 2"), "{what}");
}

#[test]
fn held_out_documents_are_never_trained_on() {
    let fixture = Fixture::new();
    // Every document twice, in two files.
    let files = [fixture.file("a.jsonl", lines(60)), fixture.file("b.jsonl", lines(60))];
    let recipe = DataRecipe { heldout: 0.1, heldout_windows: 100, ..of_length(200) };
    let windows = fixture.read(&files, &recipe);
    let held: Vec<String> = windows.heldout().iter().map(|window| text(&fixture, window)).collect();
    let trained: Vec<String> =
        draw(&windows, windows.len(), 1).iter().map(|window| text(&fixture, window)).collect();
    assert!((4..30).contains(&held.len()), "{}", held.len());
    assert_eq!(held.len() + trained.len(), 120);
    assert!(held.iter().all(|document| !trained.contains(document)), "copies stay together");
    assert_eq!(windows.heldout(), fixture.read(&files, &recipe).heldout());
    // The least share is one document, and few windows are kept.
    let least = DataRecipe { heldout: 1e-9, heldout_windows: 1, ..recipe.clone() };
    let least = fixture.read(&files, &least);
    assert_eq!((least.heldout().len(), least.summary().heldout_documents), (1, 2));
    assert_eq!(least.len(), 118);
    // Of one document there is nothing to hold out.
    let only = fixture.file("one.txt", "the sea ".repeat(50));
    let (what, hint) = fixture.complaint(only.clone(), &recipe);
    assert!(what.contains("beside the 1 held out"), "{what}");
    assert!(hint.contains("data.heldout_files"), "{hint}");
    let apart = DataRecipe { heldout_files: vec![only], ..of_length(200) };
    let apart = fixture.read(&files, &apart);
    assert_eq!((apart.len(), apart.heldout().len()), (120, 2));
    assert_ne!(apart.sha256(), fixture.read(&files, &of_length(200)).sha256());
}

#[test]
fn counts_are_shown() {
    let fixture = Fixture::new();
    let file = fixture.file("a.jsonl", lines(40));
    let recipe = DataRecipe { heldout: 0.01, pack: true, ..of_length(128) };
    let windows = fixture.read(&[file], &recipe);
    let line = windows.summary().to_string();
    assert_eq!(
        line,
        format!(
            "{} tokens in 39 documents: {} windows of 128, packed; 1 window of 1 document held out",
            windows.tokens,
            windows.len()
        )
    );
    let epochs = windows.epochs(&windows.position_after(&[(windows.len(), 2), (windows.len(), 1)]));
    assert!((epochs - 3.0).abs() < 1e-12, "{epochs}");
}

#[test]
fn lengths_that_no_document_has_are_refused() {
    let fixture = Fixture::new();
    let file = fixture.file("a.jsonl", lines(40));
    let recipe = DataRecipe { lengths: vec![32, 4096], ..of_length(32) };
    // Documents of up to 110 tokens make use of the second length, if only just.
    fixture.read(std::slice::from_ref(&file), &recipe);
    let recipe = DataRecipe { lengths: vec![32, 4096, 8192], ..of_length(32) };
    let (what, hint) = fixture.complaint(file, &recipe);
    assert!(what.contains("too little text for windows of 8192 tokens"), "{what}");
    assert!(hint.contains("data.pack"), "{hint}");
}
