//! The command in a build that has the server.

use std::net::SocketAddr;
use std::time::Duration;

use still_attention::RowDtype;
use still_serve::{Engine, EngineOptions, Keys, ServeError, Server, ServerOptions, StateStore};

use super::ServeArgs;
use crate::commands::cache::CacheRows;
use crate::commands::model::{Place, load};
use crate::commands::short_name;
use crate::errors::user;
use crate::interrupt::{self, OnSignal};
use crate::printer::Printer;

/// How often it is looked whether a signal came.
const LOOK: Duration = Duration::from_millis(50);

/// What is served, and where.
#[derive(Debug)]
pub struct Settings {
    model: String,
    place: Place,
    rows: CacheRows,
    address: SocketAddr,
    keys: Keys,
    server: ServerOptions,
    engine: EngineOptions,
    state_store: Option<String>,
}

impl ServeArgs {
    /// # Errors
    /// Options that contradict each other; a device that is not there; a file of keys that cannot be read or has none.
    pub fn resolve(self) -> anyhow::Result<Settings> {
        let place = self.device.resolve()?;
        let rows = self.cache.resolve(&place, RowDtype::Bf16)?;
        let address = SocketAddr::new(self.host, self.port);
        let keys = match &self.api_key_file {
            None => Keys::from_lines(""),
            Some(path) => {
                let text =
                    std::fs::read_to_string(path).map_err(still_model::ModelError::read(path))?;
                let keys = Keys::from_lines(&text);
                if keys.is_empty() {
                    let what = format!("{} has no key", path.display());
                    return Err(user(what, "write keys to it, a line each"));
                }
                keys
            }
        };
        // Before a model is loaded for a minute.
        if keys.is_empty() && !address.ip().is_loopback() {
            return Err(refused(ServeError::KeyNeeded(address)));
        }
        let name = self.alias.unwrap_or_else(|| short_name(&self.model.model));
        let mut server = ServerOptions::new(name);
        server.grace = Duration::from_secs_f64(self.grace);
        let engine = EngineOptions {
            context: self.context,
            max_concurrent: self.max_concurrent,
            queue: self.queue,
            request_timeout: self.timeout.map(Duration::from_secs_f64),
            state_memory: self.state_memory,
            deterministic: self.deterministic,
            ..EngineOptions::default()
        };
        Ok(Settings {
            model: self.model.model,
            place,
            rows,
            address,
            keys,
            server,
            engine,
            state_store: self.state_store,
        })
    }
}

/// Runs the command.
pub fn run(settings: Settings, printer: &Printer) -> anyhow::Result<()> {
    let Settings { model, place, rows, address, keys, server, mut engine, state_store } = settings;
    // A store that cannot be opened is said before a model is loaded.
    if let Some(place) = &state_store {
        engine.state_store = Some(StateStore::open(place).map_err(|error| {
            user(
                error.to_string(),
                "give a directory that can be written, or s3://BUCKET/PREFIX with credentials",
            )
        })?);
    }
    let model = load(&model, &place, printer)?;
    engine.rows = Some(rows.told(&model, printer));
    let has_template = model.tokenizer.chat_template().is_some();
    let name = server.name.clone();
    let needs_key = !keys.is_empty();
    let engine = Engine::start(model, engine)?;
    let options = ServerOptions { keys, ..server };
    let server = Server::bind(engine, options, address).map_err(refused)?;
    let address = server.address()?;
    printer.step("Serving", format_args!("{name} on http://{address}"));
    printer.note(example(&name, address, needs_key, has_template));
    interrupt::on_signal(OnSignal::Drain);
    let stopper = server.stopper();
    std::thread::Builder::new().name("stop".into()).spawn(move || {
        while !interrupt::raised() {
            std::thread::sleep(LOOK);
        }
        stopper.stop();
    })?;
    server.run().map_err(refused)?;
    printer.step("Stopped", "all answers have ended");
    Ok(())
}

/// A line to try the server with.
fn example(name: &str, address: SocketAddr, needs_key: bool, chats: bool) -> String {
    let key = if needs_key { " -H \"Authorization: Bearer $KEY\"" } else { "" };
    let (path, body) = match chats {
        true => (
            "chat/completions",
            serde_json::json!({ "model": name, "messages": [{ "role": "user", "content": "Hi" }] }),
        ),
        false => ("completions", serde_json::json!({ "model": name, "prompt": "Once" })),
    };
    format!("curl http://{address}/v1/{path}{key} -H 'Content-Type: application/json' -d '{body}'")
}

fn refused(error: ServeError) -> anyhow::Error {
    match error.hint() {
        Some(hint) => user(error.to_string(), hint),
        None => error.into(),
    }
}
