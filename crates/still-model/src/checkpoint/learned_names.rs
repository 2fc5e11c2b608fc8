//! One two-way table between the tensors that a student learns and their names in checkpoints, which are those of STILL's authors,
//! and in PEFT adapters.

/// Every learned tensor is under this, after `model.layers.N.`.
const SCOPE: &str = "self_attn.";
/// What PEFT wraps a model in.
const PEFT: &str = "base_model.model.";
/// What PEFT's own classes call an adapter that has no other name; its files leave that out.
const DEFAULT_ADAPTER: &str = ".default";

/// `(in a student, in a checkpoint)`. Feature maps are kept head by head, transposed: `{head}` is which.
const LEARNED: [(&str, &str); 7] = [
    ("feature_map_q", "feature_map_q.mlp.linears.{head}.weight"),
    ("feature_map_k", "feature_map_k.mlp.linears.{head}.weight"),
    ("householder_q", "feature_map_q.hh.u"),
    ("householder_k", "feature_map_k.hh.u"),
    ("g_proj.weight", "g_proj.weight"),
    ("log_lambda", "log_lambda"),
    ("window_factor", "window_factor"),
];
const HEAD: &str = "{head}";

/// A learned tensor, or one head of it, by its name in a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Learned {
    /// The layer.
    pub layer: usize,
    /// Its name in a student, after `model.layers.N.self_attn.`.
    pub name: &'static str,
    /// The head, of a tensor that is kept by head.
    pub head: Option<usize>,
}

/// Whether a tensor of a student is kept head by head.
pub fn is_by_head(name: &str) -> bool {
    row(name).is_some_and(|(_, stored)| stored.contains(HEAD))
}

/// The name in a checkpoint of a student's tensor, of its head `head` if it is kept by head. Low-rank updates have theirs.
pub fn to_checkpoint(name: &str, head: usize) -> String {
    match row(name) {
        Some((student, stored)) => {
            let stem = &name[..name.len() - student.len()];
            format!("{stem}{}", stored.replace(HEAD, &head.to_string()))
        }
        None => name.to_owned(),
    }
}

/// What a checkpoint's name stands for, unless it is that of something else.
pub fn from_checkpoint(stored: &str) -> Option<Learned> {
    let (layer, rest) = stored.strip_prefix("model.layers.")?.split_once('.')?;
    let (layer, rest) = (index(layer)?, rest.strip_prefix(SCOPE)?);
    LEARNED.iter().find_map(|&(name, pattern)| {
        let head = match pattern.split_once(HEAD) {
            None if pattern == rest => None,
            None => return None,
            Some((before, after)) => Some(index(rest.strip_prefix(before)?.strip_suffix(after)?)?),
        };
        Some(Learned { layer, name, head })
    })
}

/// The name in a PEFT adapter of a low-rank update's matrix.
pub fn to_peft(name: &str) -> String {
    format!("{PEFT}{name}")
}

/// A student's name of a PEFT adapter's tensor, with or without the adapter's own name `default`.
pub fn from_peft(stored: &str) -> Option<String> {
    let name = stored.strip_prefix(PEFT)?;
    let plain = |matrix: &str| {
        let stem = name.strip_suffix(&format!("{matrix}{DEFAULT_ADAPTER}.weight"))?;
        Some(format!("{stem}{matrix}.weight"))
    };
    Some(plain(".lora_A").or_else(|| plain(".lora_B")).unwrap_or_else(|| name.to_owned()))
}

fn row(name: &str) -> Option<&'static (&'static str, &'static str)> {
    let learned = name.rsplit_once(SCOPE).map_or(name, |(_, learned)| learned);
    LEARNED.iter().find(|(student, _)| *student == learned)
}

/// A number as Rust writes it, so that no name has two spellings.
fn index(text: &str) -> Option<usize> {
    text.parse().ok().filter(|index: &usize| index.to_string() == text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_two_way() {
        for (name, pattern) in LEARNED {
            let by_head = pattern.contains(HEAD);
            let full = format!("model.layers.17.self_attn.{name}");
            assert_eq!(is_by_head(&full), by_head);
            let stored = to_checkpoint(&full, 3);
            let learned = Learned { layer: 17, name, head: by_head.then_some(3) };
            assert_eq!(from_checkpoint(&stored), Some(learned), "{stored}");
        }
        assert_eq!(
            to_checkpoint("model.layers.2.self_attn.feature_map_k", 11),
            "model.layers.2.self_attn.feature_map_k.mlp.linears.11.weight"
        );
        let update = "model.layers.2.self_attn.g_proj.lora_A.weight";
        assert_eq!(to_checkpoint(update, 0), update);
        assert_eq!(from_peft(&to_peft(update)).as_deref(), Some(update));
    }

    #[test]
    fn other_names_stand_for_nothing() {
        for name in [
            "model.layers.2.self_attn.q_proj.weight",
            "model.layers.2.self_attn.feature_map_q",
            "model.layers.2.self_attn.feature_map_q.mlp.linears.x.weight",
            "model.layers.2.self_attn.feature_map_q.mlp.linears.03.weight",
            "model.layers.+2.self_attn.feature_map_q.hh.u",
            "model.layers.2.feature_map_q.hh.u",
        ] {
            assert_eq!(from_checkpoint(name), None, "{name}");
        }
        assert_eq!(from_peft("model.layers.0.self_attn.q_proj.lora_A.weight"), None);
    }

    #[test]
    fn an_adapter_may_name_itself() {
        let name = "model.layers.0.self_attn.q_proj.lora_B.weight";
        let stored = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight";
        assert_eq!(from_peft(stored).as_deref(), Some(name));
    }
}
