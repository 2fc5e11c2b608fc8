//! `still export`: one quantized file that every command takes.

use crate::common::{Outcome, still, student_dir, teacher_dir};

#[test]
fn an_exported_student_is_a_model_like_any_other() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("student.gguf");
    let export = |model: &std::path::Path, more: &[&str]| {
        let mut command = still();
        command.args(["export", "--gguf", "q8_0", "--model"]).arg(model);
        Outcome::of(command.arg("--out").arg(&out).args(more))
    };
    let exported = export(student_dir(), &["--json"]);
    exported.succeeded();
    let report = exported.json();
    assert_eq!(report["bytes"], out.metadata().unwrap().len());
    assert!(report["matrices"]["Q8_0"].as_u64() > Some(0), "{report}");
    let generated = Outcome::of(
        still().args(["generate", "--prompt", "The sea", "-n", "4", "--model"]).arg(&out),
    );
    generated.succeeded();
    assert!(generated.stderr.contains("STILL attention"), "{}", generated.stderr);

    export(student_dir(), &[]).failed_with("exists already");
    export(student_dir(), &["--overwrite"]).succeeded();
    // A file that is there stays if the new one cannot be made.
    let before = std::fs::read(&out).unwrap();
    export(teacher_dir(), &["--overwrite"]).failed_with("not a student");
    assert!(std::fs::read(&out).unwrap() == before);
}
