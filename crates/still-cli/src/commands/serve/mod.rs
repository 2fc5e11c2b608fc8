//! `still serve`: answer OpenAI's clients.

#[cfg(not(feature = "serve"))]
mod left_out;
#[cfg(feature = "serve")]
mod server;

use std::net::IpAddr;
use std::path::PathBuf;

use clap::Args;

#[cfg(not(feature = "serve"))]
pub use self::left_out::run;
#[cfg(feature = "serve")]
pub use self::server::run;
use super::cache::CacheArgs;
use super::model::{ModelArg, PlaceArgs};
use crate::args::{COUNT, TOKENS, bytes, number, whole};

const EXAMPLES: &str = "\
Examples:
  still serve --model demo
  still serve --model my-student --port 9000 --state-store states
  still serve --model my-student --host 0.0.0.0 --api-key-file keys.txt
  still serve --model my-student --state-store s3://bucket/prefix --alias chat

docs/serving.md describes clients, states, and replicas that share a store.";

/// `still serve`
#[derive(Clone, Debug, Args)]
#[command(after_help = EXAMPLES)]
#[cfg_attr(not(feature = "serve"), allow(dead_code, reason = "parsed, and refused"))]
pub struct ServeArgs {
    /// The model.
    #[command(flatten)]
    model: ModelArg,
    /// Where it computes.
    #[command(flatten)]
    device: PlaceArgs,
    /// What it remembers in.
    #[command(flatten)]
    cache: CacheArgs,
    /// Address to listen on; others than this machine's own need --api-key-file
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    host: IpAddr,
    /// Port to listen on; 0 takes a free one
    #[arg(long, value_name = "PORT", default_value_t = 8080)]
    port: u16,
    /// File with keys that open the server, a line each
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// The model's name for clients [default: the last part of --model]
    #[arg(long, value_name = "NAME")]
    alias: Option<String>,
    /// Most tokens of a prompt and its answer [default: as many as the base was trained for]
    #[arg(long, value_name = "N", value_parser = whole(2, TOKENS))]
    context: Option<usize>,
    /// Answers that are written at a time
    #[arg(long, value_name = "N", default_value = "32", value_parser = whole(1, 4096))]
    max_concurrent: usize,
    /// Requests that wait beyond these; more are told to come back later
    #[arg(long, value_name = "N", default_value = "256", value_parser = whole(0, COUNT))]
    queue: usize,
    /// Most seconds of a request, with its wait
    #[arg(long, value_name = "SECONDS", value_parser = number(0.1, 1e6))]
    timeout: Option<f64>,
    /// Seconds that answers may go on after Ctrl-C or SIGTERM
    #[arg(long, value_name = "SECONDS", default_value = "20", value_parser = number(0.0, 1e6))]
    grace: f64,
    /// Memory for states of conversations, such as 512MiB
    #[arg(long, value_name = "BYTES", default_value = "4GiB", value_parser = bytes)]
    state_memory: usize,
    /// Directory, or s3://BUCKET/PREFIX, where states are kept for later and for other replicas
    #[arg(long, value_name = "PLACE")]
    state_store: Option<String>,
    /// Same answer bit for bit whether a state was kept or not: earlier answers are read again
    #[arg(long)]
    deterministic: bool,
}
