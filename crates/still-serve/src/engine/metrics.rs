//! What the engine counts.

use std::sync::atomic::{AtomicI64, AtomicU64};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

/// The content type of [`Engine::metrics`](super::Engine::metrics).
pub const METRICS_CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The metrics as numbers: counters since the start, and current values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Tokens of accepted prompts.
    pub prompt_tokens: u64,
    /// How many of them were read.
    pub tokens_read: u64,
    /// How many of them a kept state had read.
    pub tokens_spared: u64,
    /// Generated tokens.
    pub generated_tokens: u64,
    /// Decode steps.
    pub decode_steps: u64,
    /// Running requests: those that hold a cache.
    pub running: u64,
    /// Waiting requests.
    pub waiting: u64,
    /// States in memory.
    pub states: u64,
    /// Their bytes.
    pub state_bytes: u64,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Outcome {
    Done,
    GivenUp,
    Failed,
    Refused,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: &'static str,
}

#[derive(Debug)]
pub(super) struct Metrics {
    registry: Registry,
    pub first_token: Histogram,
    pub between_tokens: Histogram,
    pub prompt_tokens: Counter<u64, AtomicU64>,
    pub tokens_read: Counter<u64, AtomicU64>,
    pub tokens_spared: Counter<u64, AtomicU64>,
    pub generated_tokens: Counter<u64, AtomicU64>,
    pub decode_steps: Counter<u64, AtomicU64>,
    pub running: Gauge<i64, AtomicI64>,
    pub waiting: Gauge<i64, AtomicI64>,
    pub states: Gauge<i64, AtomicI64>,
    pub state_bytes: Gauge<i64, AtomicI64>,
    requests: Family<OutcomeLabel, Counter>,
}

impl Metrics {
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("still");
        // From a millisecond to half an hour, and from a tenth of one to three seconds.
        let metrics = Self {
            first_token: Histogram::new(exponential_buckets(0.001, 2.0, 21)),
            between_tokens: Histogram::new(exponential_buckets(0.0001, 2.0, 16)),
            prompt_tokens: Counter::default(),
            tokens_read: Counter::default(),
            tokens_spared: Counter::default(),
            generated_tokens: Counter::default(),
            decode_steps: Counter::default(),
            running: Gauge::default(),
            waiting: Gauge::default(),
            states: Gauge::default(),
            state_bytes: Gauge::default(),
            requests: Family::default(),
            registry: Registry::default(),
        };
        registry.register_with_unit(
            "time_to_first_token",
            "From a request's arrival to its first token",
            Unit::Seconds,
            metrics.first_token.clone(),
        );
        registry.register_with_unit(
            "time_between_tokens",
            "Between two tokens of a request",
            Unit::Seconds,
            metrics.between_tokens.clone(),
        );
        let counters = [
            ("prompt_tokens", "Tokens of prompts", &metrics.prompt_tokens),
            ("tokens_read", "Tokens of prompts that were read", &metrics.tokens_read),
            (
                "tokens_spared",
                "Tokens of prompts that a kept state had read",
                &metrics.tokens_spared,
            ),
            ("generated_tokens", "Tokens that were generated", &metrics.generated_tokens),
            ("decode_steps", "Decode steps, of any number of requests", &metrics.decode_steps),
        ];
        for (name, help, counter) in counters {
            registry.register(name, help, counter.clone());
        }
        let gauges = [
            ("requests_running", "Requests that hold a cache", &metrics.running),
            ("requests_waiting", "Requests that wait for a cache", &metrics.waiting),
            ("states", "States kept in memory", &metrics.states),
        ];
        for (name, help, gauge) in gauges {
            registry.register(name, help, gauge.clone());
        }
        registry.register_with_unit(
            "states",
            "Bytes of the states kept in memory",
            Unit::Bytes,
            metrics.state_bytes.clone(),
        );
        registry.register("requests", "Requests by their end", metrics.requests.clone());
        Self { registry, ..metrics }
    }

    pub fn ended(&self, outcome: Outcome) {
        let outcome = match outcome {
            Outcome::Done => "done",
            Outcome::GivenUp => "given_up",
            Outcome::Failed => "failed",
            Outcome::Refused => "refused",
        };
        self.requests.get_or_create(&OutcomeLabel { outcome }).inc();
    }

    pub fn text(&self) -> String {
        let mut text = String::new();
        // A String takes whatever is written to it.
        encode(&mut text, &self.registry).unwrap_or_default();
        text
    }

    pub fn counters(&self) -> Counters {
        let now = |gauge: &Gauge<i64, AtomicI64>| u64::try_from(gauge.get()).unwrap_or(0);
        Counters {
            prompt_tokens: self.prompt_tokens.get(),
            tokens_read: self.tokens_read.get(),
            tokens_spared: self.tokens_spared.get(),
            generated_tokens: self.generated_tokens.get(),
            decode_steps: self.decode_steps.get(),
            running: now(&self.running),
            waiting: now(&self.waiting),
            states: now(&self.states),
            state_bytes: now(&self.state_bytes),
        }
    }
}
