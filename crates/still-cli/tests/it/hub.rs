//! Models of a hub: a small server of this machine plays it.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::common::{Outcome, chat_dir, copy_dir, linearize_args, save_delta, still, teacher_dir};

/// A hub whose repositories, of an owner `org`, are the directories in one.
struct Hub {
    address: String,
    /// Files that the server breaks down at, of whichever repository.
    fails: Arc<Mutex<Vec<String>>>,
    /// How it answers.
    line: Arc<Line>,
    cache: tempfile::TempDir,
}

/// A connection to a hub.
#[derive(Default)]
struct Line {
    /// Bytes that come in a second; 0: all at once.
    bytes_per_s: AtomicUsize,
    /// Where in a file the last answer began.
    begun_at: AtomicUsize,
}

impl Hub {
    fn of(repositories: &Path) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let fails = Arc::new(Mutex::new(Vec::new()));
        let (repositories, broken) = (repositories.to_path_buf(), fails.clone());
        let line = Arc::new(Line::default());
        let pace = line.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (repositories, broken) = (repositories.clone(), broken.clone());
                let pace = pace.clone();
                std::thread::spawn(move || answer(stream.unwrap(), &repositories, &broken, &pace));
            }
        });
        Self { address, fails, line, cache: tempfile::tempdir().unwrap() }
    }

    fn fail(&self, files: &[&str]) {
        *self.fails.lock().unwrap() = files.iter().map(|&file| file.to_owned()).collect();
    }

    fn still(&self) -> assert_cmd::Command {
        let mut command = still();
        command.env("HF_ENDPOINT", &self.address).env("HF_HOME", self.cache.path());
        command
    }

    fn chat(&self) -> Outcome {
        let words = ["chat", "--model", "org/student", "-n", "1"];
        Outcome::of(self.still().args(words).write_stdin("hi\n"))
    }

    fn generate(&self, model: &str) -> Outcome {
        generate(self.still(), model)
    }
}

/// Some tokens after a prompt whose bytes are ids of a small vocabulary.
fn generate(mut command: assert_cmd::Command, model: &str) -> Outcome {
    let words = ["generate", "--prompt", "Seafarers", "-n", "12", "--json", "--model", model];
    Outcome::of(command.args(words))
}

/// One request; the connection is closed after it.
fn answer(stream: TcpStream, repositories: &Path, fails: &Mutex<Vec<String>>, pace: &Line) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
    let Some(request) = lines.next() else { return };
    let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
    let head: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
    let head: Vec<String> = head.iter().map(|line| line.to_lowercase()).collect();
    let range = head.iter().find_map(|line| line.strip_prefix("range: bytes="));
    let (first, last) = range.and_then(|range| range.split_once('-')).unwrap_or(("0", ""));
    let (first, one_byte) = (first.parse().unwrap_or(0), last == "0");
    let mut stream = stream;
    let of_kind = |models: &str, datasets: &str| {
        path.strip_prefix(models).or_else(|| path.strip_prefix(datasets))
    };
    let of_file =
        of_kind("/org/", "/datasets/org/").and_then(|rest| rest.split_once("/resolve/main/"));
    let of_list =
        of_kind("/api/models/org/", "/api/datasets/org/").and_then(|rest| rest.split_once('/'));
    let (repository, file) = of_file.or(of_list.map(|(name, _)| (name, path.as_str()))).unwrap();
    let dir = &repositories.join(repository);
    if fails.lock().unwrap().iter().any(|broken| broken == file) {
        let _ = stream
            .write_all(b"HTTP/1.1 500 Broken\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        return;
    }
    let body = if of_list.is_some() {
        let mut names = Vec::new();
        list(dir, &PathBuf::new(), &mut names);
        let siblings: Vec<_> =
            names.iter().map(|name| serde_json::json!({ "rfilename": name })).collect();
        Some(serde_json::json!({ "siblings": siblings, "sha": "c0ffee" }).to_string().into_bytes())
    } else {
        std::fs::read(dir.join(file)).ok()
    };
    let Some(body) = body else {
        let _ = stream
            .write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        return;
    };
    let sent = if one_byte { &body[..1] } else { &body[first..] };
    let head = format!(
        "HTTP/1.1 206 Partial Content\r\nContent-Length: {}\r\nContent-Range: bytes {first}-{}/{}\r\n\
         ETag: \"{}\"\r\nX-Repo-Commit: c0ffee\r\nConnection: close\r\n\r\n",
        sent.len(),
        first + sent.len() - 1,
        body.len(),
        file.replace('/', "-"),
    );
    let mut left = match stream.write_all(head.as_bytes()) {
        Ok(()) => sent,
        Err(_) => return,
    };
    if !one_byte {
        pace.begun_at.store(first, Ordering::SeqCst);
    }
    while !left.is_empty() {
        let per_s = pace.bytes_per_s.load(Ordering::SeqCst);
        let piece = if per_s == 0 { left.len() } else { (per_s / 50).min(left.len()) };
        if stream.write_all(&left[..piece]).is_err() {
            return;
        }
        left = &left[piece..];
        if per_s > 0 {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Files below a directory, with `/` between the parts.
fn list(dir: &Path, inside: &Path, names: &mut Vec<String>) {
    for entry in std::fs::read_dir(dir.join(inside)).unwrap() {
        let name = inside.join(entry.unwrap().file_name());
        match dir.join(&name).is_dir() {
            true => list(dir, &name, names),
            false => names.push(name.to_str().unwrap().to_owned()),
        }
    }
}

/// Of a chat, how many tokens were read: one a byte.
fn read(outcome: &Outcome) -> String {
    outcome.succeeded();
    let note = outcome.stderr.lines().find(|line| line.contains("tokens read")).unwrap_or_default();
    note.split(" tokens read").next().unwrap_or_default().rsplit(' ').next().unwrap().to_owned()
}

#[test]
fn a_template_file_is_fetched_too_and_what_fails_is_not_missing() {
    let model = chat_dir("old one");
    let dir = model.path().join("student");
    std::fs::write(dir.join("chat_template.jinja"), "new: {{ messages[0].content }}").unwrap();
    std::fs::create_dir(dir.join("additional_chat_templates")).unwrap();
    std::fs::write(dir.join("additional_chat_templates/tool_use.jinja"), "tools").unwrap();
    for file in [
        "chat_template.jinja",
        "tokenizer_config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "additional_chat_templates/tool_use.jinja",
        "/api/models/org/student/revision/main",
    ] {
        // With a cache of its own: what was fetched once is not asked for.
        let hub = Hub::of(model.path());
        hub.fail(&[file]);
        let words = match file.starts_with("/api") {
            true => "additional_chat_templates",
            false => file,
        };
        hub.chat().failed_with(&format!("{words} could not be fetched"));
    }
    let hub = Hub::of(model.path());
    assert_eq!(read(&hub.chat()), "7", "new: hi");
    // What was fetched, and what was found missing, is not asked for again.
    let everything = ["config.json", "chat_template.jinja", "generation_config.json"];
    hub.fail(
        &[&everything[..], &["model.safetensors.index.json", "special_tokens_map.json"]].concat(),
    );
    assert_eq!(read(&hub.chat()), "7");
}

/// What a base, an adapter and a delta are fetched for.
const FILES: [&str; 5] = [
    "config.json",
    "adapter_config.json",
    "model.safetensors",
    "tokenizer.json",
    "model.safetensors.index.json",
];

/// A hub with `base`, after stage 1 of the authors' code, and `adapter`, alone, after its stage 2.
fn adapters() -> tempfile::TempDir {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../still-model/tests/data/authors");
    let dir = tempfile::tempdir().unwrap();
    for (stage, name) in [("stage1", "base"), ("stage2", "adapter")] {
        std::fs::create_dir(dir.path().join(name)).unwrap();
        copy_dir(&data.join(stage), &dir.path().join(name));
    }
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        let from = teacher_dir().join(file);
        if from.exists() {
            std::fs::copy(from, dir.path().join("base").join(file)).unwrap();
        }
    }
    name_base(&dir.path().join("adapter/adapter_config.json"), "../base");
    dir
}

/// Names the base of an adapter.
fn name_base(config: &Path, base: &str) {
    let text = std::fs::read_to_string(config).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    json["base_model_name_or_path"] = base.into();
    std::fs::write(config, json.to_string()).unwrap();
}

#[test]
fn an_adapter_alone_is_fetched_with_its_base() {
    let dir = adapters();
    let text = |outcome: Outcome| {
        outcome.succeeded();
        outcome.json()["text"].clone()
    };
    let here = text(generate(still(), dir.path().join("adapter").to_str().unwrap()));
    assert_ne!(here, text(generate(still(), dir.path().join("base").to_str().unwrap())));
    name_base(&dir.path().join("adapter/adapter_config.json"), "org/base");
    let hub = Hub::of(dir.path());
    assert_eq!(text(hub.generate("org/adapter")), here);
    // What was fetched, and what was found missing, is not asked for again.
    hub.fail(&FILES);
    assert_eq!(text(hub.generate("org/adapter")), here);

    // Beside its base's weights, and with a configuration but no weights.
    let (base, adapter) = (dir.path().join("base"), dir.path().join("adapter"));
    std::fs::copy(base.join("config.json"), adapter.join("config.json")).unwrap();
    assert_eq!(text(Hub::of(dir.path()).generate("org/adapter")), here);
    copy_dir(&adapter, &base);
    assert_eq!(text(Hub::of(dir.path()).generate("org/base")), here);
    std::fs::remove_file(base.join("adapter_config.json")).unwrap();

    std::fs::remove_file(adapter.join("adapter_model.safetensors")).unwrap();
    Hub::of(dir.path()).generate("org/adapter").failed_with("has no adapter_model.safetensors");
    std::fs::remove_file(adapter.join("adapter_config.json")).unwrap();
    std::fs::remove_file(adapter.join("config.json")).unwrap();
    Hub::of(dir.path())
        .generate("org/adapter")
        .failed_with("config.json could not be fetched from the hub");
}

#[test]
fn a_delta_is_fetched_with_its_base() {
    let dir = tempfile::tempdir().unwrap();
    let (base, delta) = (dir.path().join("base"), dir.path().join("delta"));
    std::fs::create_dir(&base).unwrap();
    copy_dir(teacher_dir(), &base);
    save_delta(&base, &delta);
    let text = |outcome: Outcome| {
        outcome.succeeded();
        outcome.json()["text"].clone()
    };
    let here = text(generate(still(), delta.to_str().unwrap()));
    let config = delta.join("config.json");
    let mut json: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(&config).unwrap()).unwrap();
    json["still_base"]["source"] = "org/base".into();
    json["still_base"].as_object_mut().unwrap().remove("path");
    std::fs::write(&config, json.to_string()).unwrap();
    let hub = Hub::of(dir.path());
    assert_eq!(text(hub.generate("org/delta")), here);
    hub.fail(&FILES);
    assert_eq!(text(hub.generate("org/delta")), here);
}

#[test]
fn a_dataset_is_fetched_and_read_again_without_a_network() {
    let repositories = tempfile::tempdir().unwrap();
    let dir = repositories.path().join("books");
    std::fs::create_dir_all(dir.join("data")).unwrap();
    for (name, words) in
        [("data/train-0.txt", 900), ("data/train-1.txt", 300), ("data/test-0.txt", 700)]
    {
        std::fs::write(dir.join(name), crate::common::words(words)).unwrap();
    }
    std::fs::write(dir.join("README.md.html"), "no data").unwrap();
    let hub = Hub::of(repositories.path());
    let plan = |name: &str| {
        let mut command = hub.still();
        command.env("STILL_CACHE", hub.cache.path().join("still"));
        command.args(linearize_args(teacher_dir(), Path::new(name), Path::new("never-made")));
        Outcome::of(command.args(["--dry-run", "--set", "data.length=128"]))
    };
    let read = plan("org/books");
    read.succeeded();
    assert!(read.stderr.contains("in 2 documents"), "{}", read.stderr);
    let test = plan("org/books/data/test-0.txt");
    test.succeeded();
    assert!(test.stderr.contains("in 1 document"), "{}", test.stderr);
    plan("org/books/nothing").failed_with("org/books/nothing has no data files");
    plan("org/other").failed_with("no dataset of this id could be fetched");
    hub.fail(&["/api/datasets/org/books/revision/main"]);
    let again = plan("org/books/data");
    again.succeeded();
    assert!(again.stderr.contains("fetched before"), "{}", again.stderr);
}

/// A download says how far it is, how fast, and how long it will take. Ctrl-C ends it at once, and it goes on from there.
#[cfg(unix)]
#[test]
fn a_download_is_shown_and_goes_on_after_ctrl_c() {
    use crate::common::terminal::{CTRL_C, Terminal};

    let repositories = tempfile::tempdir().unwrap();
    let dir = repositories.path().join("books");
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join("train.txt"), crate::common::words(300_000)).unwrap();
    let length = dir.join("train.txt").metadata().unwrap().len() as usize;
    assert!(length > 1 << 20, "{length}");
    let hub = Hub::of(repositories.path());
    let plan = |columns| {
        let mut command = std::process::Command::new(crate::common::BINARY);
        command.env("HF_ENDPOINT", &hub.address).env("HF_HOME", hub.cache.path());
        command.env("STILL_CACHE", hub.cache.path().join("still")).env("NO_COLOR", "1");
        command.args(linearize_args(teacher_dir(), Path::new("org/books"), Path::new("made")));
        command.args(["--dry-run", "--set", "data.length=128"]);
        Terminal::start(command, columns)
    };
    hub.line.bytes_per_s.store(length / 20, Ordering::SeqCst);
    let mut cut = 0;
    for columns in [80, 200] {
        let mut fetching = plan(columns);
        fetching.until("    Fetching train.txt [");
        fetching.until(" KiB/s, ");
        fetching.until(" left");
        assert!(!fetching.wraps(), "{}", fetching.screen());
        fetching.send(CTRL_C);
        let took = fetching.until("error: interrupted");
        assert!(took < Duration::from_millis(1500), "{took:?}: {}", fetching.screen());
        assert_eq!(fetching.code(), 130);
        assert!(!fetching.screen().contains("Fetching"), "{}", fetching.screen());
        let begun_at = hub.line.begun_at.load(Ordering::SeqCst);
        assert!(begun_at < length && (begun_at > cut || cut == 0), "{begun_at} of {length}");
        cut = begun_at.max(1);
    }
    hub.line.bytes_per_s.store(0, Ordering::SeqCst);
    let mut whole = plan(80);
    assert_eq!(whole.code(), 0, "{}", whole.screen());
    let begun_at = hub.line.begun_at.load(Ordering::SeqCst);
    assert!(begun_at > cut, "it began at {begun_at} again");
    let screen = whole.screen();
    assert!(screen.contains("    Fetching train.txt: 1."), "{screen}");
    assert!(screen.contains(" in 1 document"), "{screen}");
    assert!(!whole.wraps(), "{screen}");
}
