//! `still serve` as a process: where it listens, what it refuses, how it ends.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::common::{BINARY, Outcome, chat_dir, still, student_dir};

const TEMPLATE: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}";

#[test]
fn what_would_be_open_to_others_is_refused() {
    let serve = |more: &[&str]| {
        Outcome::of(still().args(["serve", "--model"]).arg(student_dir()).args(more))
    };
    let open = serve(&["--host", "0.0.0.0", "--port", "0"]);
    open.failed_with("0.0.0.0:0 can be reached by others");
    assert!(open.stderr.contains("--api-key-file"));
    assert!(!open.stderr.contains("Loaded"), "{}", open.stderr);
    serve(&["--host", "localhost.example"]).failed_with("--host");
    serve(&["--port", "65536"]).failed_with("--port");
    serve(&["--state-memory", "much"]).failed_with("--state-memory");
    serve(&["--state-store", "ftp://x/y"]).failed_with("ftp");
    serve(&["--api-key-file", "/no/such/file"]).failed_with("/no/such/file");
    let dir = tempfile::tempdir().unwrap();
    let keys = dir.path().join("keys");
    std::fs::write(&keys, "# none yet\n").unwrap();
    serve(&["--api-key-file", keys.to_str().unwrap()]).failed_with("has no key");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    serve(&["--port", &port]).failed_with("cannot listen on");
}

/// A process, and where it says that it listens.
struct Serving {
    child: Child,
    stderr: BufReader<std::process::ChildStderr>,
    told: String,
    address: String,
}

fn serve(arguments: &[&str]) -> Serving {
    let mut child = Command::new(BINARY)
        .args(["serve", "--port", "0"])
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut told = String::new();
    while !told.contains("curl ") {
        assert!(stderr.read_line(&mut told).unwrap() > 0, "{told}");
    }
    let address =
        told.split("http://").nth(1).unwrap().split_whitespace().next().unwrap().to_owned();
    Serving { child, stderr, told, address }
}

impl Serving {
    fn ask(&self, path: &str, body: &str) -> String {
        let mut text = String::new();
        self.send(path, body).read_to_string(&mut text).unwrap();
        text
    }

    /// A request, whose answer is not waited for.
    fn send(&self, path: &str, body: &str) -> TcpStream {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        write!(
            stream,
            "POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n\
             Authorization: Bearer secret\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .unwrap();
        stream
    }

    /// Sends a signal and waits for the end: the exit code, and what was told.
    fn end(mut self, signal: &str) -> (Option<i32>, String) {
        let sent = Command::new("kill").args([signal, &self.child.id().to_string()]).status();
        assert!(sent.unwrap().success());
        let begun = Instant::now();
        let code = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status.code();
            }
            assert!(begun.elapsed() < Duration::from_secs(60), "it does not end");
            std::thread::sleep(Duration::from_millis(10));
        };
        self.stderr.read_to_string(&mut self.told).unwrap();
        (code, self.told)
    }
}

#[test]
fn it_says_where_it_listens_answers_and_ends_at_a_signal() {
    let dir = chat_dir(TEMPLATE);
    let model = dir.path().join("student");
    let keys = dir.path().join("keys");
    std::fs::write(&keys, "secret\n").unwrap();
    let states = dir.path().join("states");
    for signal in ["-TERM", "-INT"] {
        let serving = serve(&[
            "--model",
            model.to_str().unwrap(),
            "--alias",
            "mine",
            "--api-key-file",
            keys.to_str().unwrap(),
            "--state-store",
            states.to_str().unwrap(),
        ]);
        assert!(serving.told.contains("mine on http://127.0.0.1:"), "{}", serving.told);
        assert!(serving.told.contains("/v1/chat/completions"), "{}", serving.told);
        let chat = r#"{"model": "mine", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "temperature": 0}"#;
        let answer = serving.ask("/v1/chat/completions", chat);
        assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("\"!!!!\""), "{answer}");
        let save = r#"{"action": "save", "prompt": "a text"}"#;
        let kept = serving.ask("/v1/states/a", save);
        assert!(kept.starts_with("HTTP/1.1 200"), "{kept}");
        let (code, told) = serving.end(signal);
        assert_eq!(code, Some(0), "{told}");
        assert!(told.contains("Stopping") && told.contains("Stopped"), "{told}");
    }
}

/// A process that is killed while it saves a state leaves the one that was there, or the new one, whole.
#[test]
fn a_save_that_is_killed_leaves_the_old_state() {
    const KILLS: u32 = 8;
    let dir = tempfile::tempdir().unwrap();
    let states = dir.path().join("states");
    let model = student_dir().to_str().unwrap();
    let start = || serve(&["--model", model, "--state-store", states.to_str().unwrap()]);
    let save = |tokens: u32| {
        format!(r#"{{"action": "save", "tokens": {:?}}}"#, vec![tokens % 200; tokens as usize])
    };
    let mut serving = start();
    let first = Instant::now();
    assert!(serving.ask("/v1/states/a", &save(400)).starts_with("HTTP/1.1 200"));
    let longest = first.elapsed();
    let mut there = 400;
    for kill in 0..KILLS {
        let asked = 401 + kill;
        let mut stream = serving.send("/v1/states/a", &save(asked));
        std::thread::sleep(longest * kill / (KILLS - 1));
        serving.child.kill().unwrap();
        serving.child.wait().unwrap();
        let mut answered = String::new();
        let _ = stream.read_to_string(&mut answered);
        serving = start();
        let restored = serving.ask("/v1/states/a", r#"{"action": "restore"}"#);
        assert!(restored.starts_with("HTTP/1.1 200"), "kill {kill}: {restored}");
        let tokens = |n: u32| restored.contains(&format!("\"tokens\":{n},"));
        assert!(tokens(there) || tokens(asked), "kill {kill}: {there} or {asked}: {restored}");
        assert!(!answered.starts_with("HTTP/1.1 200") || tokens(asked), "{answered}, {restored}");
        there = if tokens(asked) { asked } else { there };
    }
    assert_eq!(serving.end("-TERM").0, Some(0));
}

/// Two servers and a bucket of moto, a test server for S3; where that is not installed, nothing is tested, and said.
#[test]
fn replicas_share_a_bucket() {
    let python = std::env::var_os("STILL_TEST_PYTHON").unwrap_or_else(|| "python3".into());
    let has = Command::new(&python).args(["-c", "import boto3, moto.server"]).output();
    if !has.is_ok_and(|output| output.status.success()) {
        println!(
            "skipped: needs the Python package moto[server]; STILL_TEST_PYTHON names the interpreter"
        );
        return;
    }
    let dir = chat_dir(TEMPLATE);
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../scripts/serve_s3.py");
    let model = dir.path().join("student");
    let mut checks = Command::new(&python);
    let output = checks.args([script, "--still", BINARY, "--model"]).arg(model).output().unwrap();
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{told}{}", String::from_utf8_lossy(&output.stderr));
}
