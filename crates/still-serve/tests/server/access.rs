//! Who is let in.

use std::io::{Read, Write};
use std::net::TcpStream;

use still_serve::{Engine, EngineOptions, ServeError, Server, ServerOptions};

use crate::common::{NAME, answer, keys, serve, serve_with, student};

#[test]
fn without_a_key_only_this_machine_is_listened_to() {
    let engine = Engine::start(student(512), EngineOptions::default()).unwrap();
    let bound = Server::bind(engine, ServerOptions::new(NAME), ([0, 0, 0, 0], 0).into());
    let error = bound.unwrap_err();
    assert!(matches!(error, ServeError::KeyNeeded(_)), "{error}");
    assert!(error.to_string().contains("0.0.0.0"), "{error}");
    assert!(error.hint().unwrap().contains("--api-key-file"));
}

#[test]
fn a_key_is_needed_where_there_are_keys() {
    let server = serve_with(EngineOptions::default(), keys("one\ntwo\n"));
    for path in ["/v1/models", "/metrics", "/v1/states"] {
        let without = server.get(path);
        assert_eq!(without.error(401)["code"], "invalid_api_key");
        assert_eq!(without.header("www-authenticate"), Some("Bearer"));
        let with = |header: &str| {
            answer(ureq::get(&server.url(path)).set("authorization", header).call()).status
        };
        for wrong in ["Bearer three", "Bearer ", "Bearer", "one", "Basic one", "Bearer one two"] {
            assert_eq!(with(wrong), 401, "{wrong}");
        }
        assert_eq!((with("Bearer one"), with("bearer two")), (200, 200));
    }
    // Probes and the page have none.
    assert_eq!((server.get("/health").status, server.get("/").status), (200, 200));
}

#[test]
fn a_page_of_another_site_cannot_ask() {
    let server = serve();
    let ask = |host: &str| {
        let mut stream = TcpStream::connect(server.address).unwrap();
        write!(stream, "GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")
            .unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    };
    assert!(ask("evil.example").starts_with("HTTP/1.1 403"));
    assert!(ask("localhost:1").starts_with("HTTP/1.1 200"));
    // A form, or a request that a browser sends without asking.
    let form = ureq::post(&server.url("/v1/completions")).set("content-type", "text/plain");
    let refused = answer(form.send_string("{\"prompt\": \"a\"}"));
    assert_eq!(refused.error(415)["code"], "unsupported_media_type");
    assert_eq!(refused.header("access-control-allow-origin"), None);
}
