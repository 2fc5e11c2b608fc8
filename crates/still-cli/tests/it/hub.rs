//! Models of a hub: a small server of this machine plays it.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use crate::common::{Outcome, chat_dir, still};

/// A hub with one repository, `org/name`, whose files are those of a directory.
struct Hub {
    address: String,
    /// What the server does instead of answering for these files.
    fails: Arc<Mutex<Vec<String>>>,
    cache: tempfile::TempDir,
}

impl Hub {
    fn of(dir: &Path) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let fails = Arc::new(Mutex::new(Vec::new()));
        let (dir, broken) = (dir.to_path_buf(), fails.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (dir, broken) = (dir.clone(), broken.clone());
                std::thread::spawn(move || answer(stream.unwrap(), &dir, &broken));
            }
        });
        Self { address, fails, cache: tempfile::tempdir().unwrap() }
    }

    fn fail(&self, files: &[&str]) {
        *self.fails.lock().unwrap() = files.iter().map(|&file| file.to_owned()).collect();
    }

    fn chat(&self) -> Outcome {
        let mut command = still();
        command.env("HF_ENDPOINT", &self.address).env("HF_HOME", self.cache.path());
        Outcome::of(command.args(["chat", "--model", "org/name", "-n", "1"]).write_stdin("hi\n"))
    }
}

/// One request; the connection is closed after it.
fn answer(stream: TcpStream, dir: &Path, fails: &Mutex<Vec<String>>) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
    let Some(request) = lines.next() else { return };
    let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
    let head: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
    let one_byte = head.iter().any(|line| line.to_lowercase() == "range: bytes=0-0");
    let mut stream = stream;
    let file = path.strip_prefix("/org/name/resolve/main/").unwrap_or(&path);
    if fails.lock().unwrap().iter().any(|broken| broken == file) {
        let _ = stream
            .write_all(b"HTTP/1.1 500 Broken\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        return;
    }
    let body = if path.starts_with("/api/models/org/name") {
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
    let sent = if one_byte { &body[..1] } else { &body[..] };
    let head = format!(
        "HTTP/1.1 206 Partial Content\r\nContent-Length: {}\r\nContent-Range: bytes 0-{}/{}\r\n\
         ETag: \"{}\"\r\nX-Repo-Commit: c0ffee\r\nConnection: close\r\n\r\n",
        sent.len(),
        sent.len() - 1,
        body.len(),
        file.replace('/', "-"),
    );
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(sent));
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
        "/api/models/org/name/revision/main",
    ] {
        // With a cache of its own: what was fetched once is not asked for.
        let hub = Hub::of(&dir);
        hub.fail(&[file]);
        let words = match file.starts_with("/api") {
            true => "additional_chat_templates",
            false => file,
        };
        hub.chat().failed_with(&format!("{words} could not be fetched"));
    }
    let hub = Hub::of(&dir);
    assert_eq!(read(&hub.chat()), "7", "new: hi");
    // What was fetched, and what was found missing, is not asked for again.
    let everything = ["config.json", "chat_template.jinja", "generation_config.json"];
    hub.fail(
        &[&everything[..], &["model.safetensors.index.json", "special_tokens_map.json"]].concat(),
    );
    assert_eq!(read(&hub.chat()), "7");
}
