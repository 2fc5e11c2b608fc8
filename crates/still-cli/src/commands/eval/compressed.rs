//! `--compress`: dense models with a compressed cache.

use still_eval::compress::Compression;

use super::ablated::Subject;

/// A dense model with each compression; nothing of a student.
pub fn compressed(subject: &Subject, compressions: &[Compression]) -> Vec<Subject> {
    if subject.model.student.is_some() {
        return Vec::new();
    }
    let compressed = |&compression: &Compression| Subject {
        name: format!("{} [{}]", subject.name, label(&compression)),
        ablation: None,
        compression: Some(compression),
        model: subject.model.clone(),
    };
    compressions.iter().map(compressed).collect()
}

/// What tables call it: whoever reads them must know which methods knew the question.
fn label(compression: &Compression) -> String {
    match compression.method.sees_question() {
        true => format!("{compression}, sees the question"),
        false => compression.to_string(),
    }
}
