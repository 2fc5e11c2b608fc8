//! Streams of several requests: what each is told is what it is told alone.

use still_model::{Finish, GenerateOptions};
use still_serve::{Engine, EngineOptions, Request};

use crate::common::{alone, engine, options, prompt, request, serve, served, student};

/// Prompts of all lengths: within a chunk, at its end, over several pieces.
fn prompts() -> Vec<Vec<u32>> {
    (0..33)
        .map(|n| prompt(n, [1, 7, 63, 64, 65, 128, 200, 331, 700][n as usize % 9] + n as usize))
        .collect()
}

#[test]
fn a_stream_is_the_same_alone_and_among_others() {
    let single =
        Engine::start(student(1), EngineOptions { max_concurrent: 1, ..options() }).unwrap();
    let expected: Vec<_> =
        prompts().into_iter().map(|prompt| serve(&single, prompt, 24).ids).collect();
    let many =
        Engine::start(student(1), EngineOptions { max_concurrent: 33, ..options() }).unwrap();
    let events: Vec<_> =
        prompts().into_iter().map(|prompt| many.submit(request(prompt, 24)).unwrap()).collect();
    let got: Vec<_> = events.into_iter().map(|events| served(events).ids).collect();
    assert_eq!(got, expected);
    let steps = many.counters().decode_steps;
    assert!(steps < single.counters().decode_steps / 4, "{steps} steps of many");
    // And what the model says without an engine.
    let model = student(1);
    for (prompt, got) in prompts().iter().zip(&got).filter(|(prompt, _)| prompt.len() <= 64) {
        assert_eq!(&alone(&model, prompt, 24), got);
    }
}

#[test]
fn sampled_streams_are_their_seeds() {
    let engine = engine();
    let request = |seed| {
        let options =
            GenerateOptions { max_new_tokens: 20, temperature: 1.0, seed, ..Default::default() };
        Request { ignore_end_of_sequence: true, ..Request::new(prompt(3, 90), &options) }
    };
    let all: Vec<_> = [1, 2, 1, 2, 3].map(|seed| engine.submit(request(seed)).unwrap()).into();
    let ids: Vec<_> = all.into_iter().map(|events| served(events).ids).collect();
    assert_eq!((&ids[0], &ids[1]), (&ids[2], &ids[3]));
    assert!(ids[0] != ids[1] && ids[1] != ids[4]);
}

#[test]
fn the_text_is_that_of_the_tokens_up_to_a_stop_text() {
    let engine = engine();
    let whole = serve(&engine, prompt(5, 40), 60);
    let tokenizer = &engine.model().tokenizer;
    assert_eq!(whole.text, tokenizer.decode(&whole.ids, true).unwrap());
    assert_eq!((whole.finish, whole.usage.generated_tokens), (Finish::Length, 60));
    // A character that is a token, so that no event tells of it.
    let letters: Vec<char> = whole.text.chars().filter(char::is_ascii_alphanumeric).collect();
    let stop = letters[letters.len() / 2].to_string();
    let mut stopped = request(prompt(5, 40), 60);
    stopped.stop = vec![stop.clone()];
    let stopped = served(engine.submit(stopped).unwrap());
    assert_eq!(stopped.finish, Finish::StopString);
    assert_eq!(stopped.text, whole.text[..whole.text.find(&stop).unwrap()]);
    let end = whole.ids.iter().position(|id| tokenizer.token_text(*id) == stop).unwrap();
    assert_eq!(stopped.ids, whole.ids[..end]);
}

#[test]
fn an_end_of_sequence_ends() {
    let mut model = student(1);
    let ids = serve(&Engine::start(model.clone(), options()).unwrap(), prompt(6, 30), 8).ids;
    let end = ids[4];
    let first = ids.iter().position(|id| *id == end).unwrap();
    let mut decoder = (*model.decoder).clone();
    decoder.config.eos_token_ids = vec![end];
    model.decoder = decoder.into();
    let engine = Engine::start(model, options()).unwrap();
    let options = GenerateOptions { max_new_tokens: 8, ..Default::default() };
    let ended = served(engine.submit(Request::new(prompt(6, 30), &options)).unwrap());
    assert_eq!((ended.finish, ended.ids), (Finish::EndOfSequence, ids[..first].to_vec()));
}

#[test]
fn log_probabilities_are_of_the_whole_prompt_and_of_each_token() {
    let engine = engine();
    let tokens = prompt(8, 150);
    // A state of the prompt is there, and is not used: all of it is asked for.
    serve(&engine, tokens.clone(), 1);
    let mut asked = request(tokens.clone(), 3);
    (asked.logprobs, asked.prompt_logprobs) = (Some(2), Some(1));
    let got = served(engine.submit(asked).unwrap());
    assert_eq!((got.cached, got.of_prompt.len(), got.logprobs.len()), (0, tokens.len(), 3));
    assert!(got.of_prompt[0].is_none());

    let model = student(1);
    let mut cache = model.new_cache(1, model.cache_rows(still_attention::RowDtype::Bf16)).unwrap();
    let sequence = [&tokens[..], &got.ids].concat();
    let mut all = got.of_prompt[1..].iter().flatten().chain(&got.logprobs);
    for (at, pair) in sequence.windows(2).enumerate() {
        let logits = model.decode(&pair[..1], &mut cache).unwrap();
        let sum: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
        let expected = f64::from(logits[pair[1] as usize]) - sum.ln();
        let told = all.next().unwrap();
        assert_eq!(told.id, pair[1]);
        assert!((f64::from(told.logprob) - expected).abs() < 2e-3, "{at}: {told:?}, {expected}");
        assert_eq!(told.top.len(), if at + 1 < tokens.len() { 1 } else { 2 });
        assert!(told.top[0].1 >= told.logprob);
    }
    assert!(all.next().is_none());
}

/// Prompts are read between decode steps.
#[test]
fn a_long_prompt_does_not_stop_a_running_stream() {
    let engine = engine();
    let mut running = engine.submit(request(prompt(1, 10), 4000)).unwrap();
    for _ in 0..3 {
        running.blocking_recv().unwrap();
    }
    let long = engine.submit(request(prompt(2, 4000), 1)).unwrap();
    let before = engine.counters();
    served(long);
    let after = engine.counters();
    let (read, steps) =
        (after.tokens_read - before.tokens_read, after.decode_steps - before.decode_steps);
    assert!(steps >= 4000 / 128 - 2, "{steps} steps while {read} tokens were read");
}
