//! A server of a small random model, and clients.

use std::net::SocketAddr;
use std::thread::JoinHandle;
use std::time::Duration;

use serde_json::{Value, json};
use still_attention::StillConfig;
use still_model::random::{random_model, tiny_config};
use still_model::{FeatureInit, Model, ModelConfig, Student, Tokenizer};
use still_serve::{Engine, EngineOptions, Keys, Server, ServerOptions, Stopper};

/// A random student with a chat template, a token a byte, and room for `context` tokens.
pub fn student(context: usize) -> Model {
    let config = ModelConfig { max_position_embeddings: context, ..tiny_config() };
    let model = random_model(config.clone(), 7).unwrap();
    let still = StillConfig::uniform(config.num_hidden_layers, config.geometry(), 64, 4);
    let student =
        Student::init(config.fit_still(still), &config, FeatureInit::Identity, 7).unwrap();
    model.with_student(student)
}

/// A chat template with tools, in the manner of Hermes and Qwen.
const TOOL_TEMPLATE: &str = "\
{% if tools %}Answer with <tool_call>…</tool_call>. {% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}\
{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}\
{% for call in m.tool_calls %}{{ call.function.name }} of {{ call.function.arguments.city }}{% endfor %}<|im_end|>\n\
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// A model whose chat template knows tools.
pub fn with_tools(model: Model) -> Model {
    with_template(model, TOOL_TEMPLATE)
}

/// A model with another chat template.
pub fn with_template(model: Model, template: &str) -> Model {
    let dir = tempfile::tempdir().unwrap();
    model.tokenizer.save(dir.path()).unwrap();
    let config = json!({ "chat_template": template });
    std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    Model { tokenizer: Tokenizer::from_hf_dir(dir.path()).unwrap(), ..model }
}

/// A server that runs until it is dropped.
pub struct Running {
    pub address: SocketAddr,
    pub engine: Engine,
    stopper: Stopper,
    thread: Option<JoinHandle<()>>,
}

/// The name under which tests serve.
pub const NAME: &str = "tiny";

/// Serves a model of 4,096 tokens without keys.
pub fn serve() -> Running {
    serve_with(EngineOptions::default(), |_| {})
}

/// The same, otherwise.
pub fn serve_with(engine: EngineOptions, change: impl FnOnce(&mut ServerOptions)) -> Running {
    serve_model(student(4096), engine, change)
}

/// Serves another model.
pub fn serve_model(
    model: Model,
    engine: EngineOptions,
    change: impl FnOnce(&mut ServerOptions),
) -> Running {
    let engine = Engine::start(model, engine).unwrap();
    let mut options = ServerOptions::new(NAME);
    options.grace = Duration::from_secs(2);
    change(&mut options);
    let server = Server::bind(engine.clone(), options, ([127, 0, 0, 1], 0).into()).unwrap();
    let (address, stopper) = (server.address().unwrap(), server.stopper());
    let thread = std::thread::spawn(move || server.run().unwrap());
    Running { address, engine, stopper, thread: Some(thread) }
}

/// Keys of a file's text.
pub fn keys(text: &str) -> impl FnOnce(&mut ServerOptions) {
    let keys = Keys::from_lines(text);
    move |options| options.keys = keys
}

/// An answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub text: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// The JSON of an answer that is a success.
    #[track_caller]
    pub fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.text);
        self.json()
    }

    /// That it is an error in OpenAI's shape, of this status.
    #[track_caller]
    pub fn error(&self, status: u16) -> Value {
        assert_eq!(self.status, status, "{}", self.text);
        let body = self.json();
        let error = &body["error"];
        assert!(error["message"].as_str().is_some_and(|text| !text.is_empty()), "{body}");
        assert!(error["type"].is_string(), "{body}");
        assert!(error.get("param").is_some() && error.get("code").is_some(), "{body}");
        error.clone()
    }

    /// What a stream's events have, up to the end.
    #[track_caller]
    pub fn events(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{}", self.text);
        let lines = self.text.split("\n\n").filter_map(|event| event.strip_prefix("data: "));
        let lines: Vec<&str> = lines.collect();
        let (last, events) = lines.split_last().unwrap();
        assert_eq!(*last, "[DONE]", "{}", self.text);
        events.iter().map(|event| serde_json::from_str(event).unwrap()).collect()
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(of, _)| of.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.as_str())
    }
}

impl Running {
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub fn get(&self, path: &str) -> Answer {
        answer(ureq::get(&self.url(path)).call())
    }

    pub fn delete(&self, path: &str) -> Answer {
        answer(ureq::delete(&self.url(path)).call())
    }

    pub fn post(&self, path: &str, body: &Value) -> Answer {
        let request = ureq::post(&self.url(path)).set("content-type", "application/json");
        answer(request.send_string(&body.to_string()))
    }

    pub fn stop(&self) {
        self.stopper.stop();
    }

    /// Waits for the end.
    pub fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stopper.stop();
        if !std::thread::panicking() {
            self.join();
        }
    }
}

pub fn answer(result: Result<ureq::Response, ureq::Error>) -> Answer {
    let response = match result {
        Ok(response) | Err(ureq::Error::Status(_, response)) => response,
        Err(error) => panic!("{error}"),
    };
    let names = response.headers_names();
    let headers = names.into_iter().map(|name| {
        let value = response.header(&name).unwrap_or_default().to_owned();
        (name, value)
    });
    let headers = headers.collect();
    Answer { status: response.status(), headers, text: response.into_string().unwrap() }
}
