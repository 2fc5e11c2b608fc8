//! What a build without some of the crate's features says where they would be needed. `scripts/lean.sh` runs it.

use crate::common::{Outcome, linearize_args, still, teacher_dir};

#[cfg(not(feature = "serve"))]
#[test]
fn no_server_and_no_grammars() {
    let failed = |args: &[&str], what: &str| {
        let outcome = Outcome::of(still().args(args).arg("--model").arg(teacher_dir()));
        outcome.failed_with(what);
        assert!(outcome.stderr.contains("with the feature `serve`"), "{}", outcome.stderr);
    };
    failed(&["serve"], "this build of still has no server");
    failed(
        &["generate", "--prompt", "Hi", "--json-schema", "schema.json"],
        "this build of still has no schemas and grammars",
    );
    failed(&["chat", "--grammar", "g.lark"], "this build of still has no schemas and grammars");
}

#[cfg(not(feature = "parquet"))]
#[test]
fn no_parquet() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("books.parquet");
    std::fs::write(&data, "PAR1").unwrap();
    let args = linearize_args(teacher_dir(), &data, &dir.path().join("out"));
    let outcome = Outcome::of(still().args(args));
    outcome.failed_with("this build of still reads no Parquet");
    assert!(outcome.stderr.contains("with the feature `parquet`"), "{}", outcome.stderr);
}
