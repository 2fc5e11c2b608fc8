//! A GGUF file written byte by byte, so that anything in it can be wrong.
#![allow(dead_code, reason = "each test file takes what it needs")]

/// A file to be.
#[derive(Clone)]
pub struct Gguf {
    pub version: u32,
    /// Key, then the value's type and bytes.
    pub entries: Vec<(String, Vec<u8>)>,
    pub tensors: Vec<Entry>,
    /// Where tensors are put; the metadata may say something else.
    pub alignment: usize,
}

#[derive(Clone)]
pub struct Entry {
    pub name: String,
    /// In the file's order: the row's length first.
    pub dims: Vec<u64>,
    pub kind: u32,
    pub data: Vec<u8>,
    /// In place of where the data is.
    pub offset: Option<u64>,
}

pub const F32: u32 = 0;
pub const Q8_0: u32 = 8;

fn typed(kind: u32, bytes: &[u8]) -> Vec<u8> {
    [&kind.to_le_bytes(), bytes].concat()
}

fn length_and(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u64).to_le_bytes(), bytes].concat()
}

pub fn u8(number: u8) -> Vec<u8> {
    typed(0, &[number])
}

pub fn u32(number: u32) -> Vec<u8> {
    typed(4, &number.to_le_bytes())
}

pub fn i32(number: i32) -> Vec<u8> {
    typed(5, &number.to_le_bytes())
}

pub fn f32(number: f32) -> Vec<u8> {
    typed(6, &number.to_le_bytes())
}

pub fn flag(byte: u8) -> Vec<u8> {
    typed(7, &[byte])
}

pub fn text(text: &str) -> Vec<u8> {
    typed(8, &length_and(text.as_bytes()))
}

pub fn u64(number: u64) -> Vec<u8> {
    typed(10, &number.to_le_bytes())
}

pub fn f64(number: f64) -> Vec<u8> {
    typed(12, &number.to_le_bytes())
}

/// An array of values that are of one type.
pub fn array(kind: u32, values: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = [9_u32.to_le_bytes(), kind.to_le_bytes()].concat();
    bytes.extend((values.len() as u64).to_le_bytes());
    values.iter().for_each(|value| bytes.extend(&value[4..]));
    bytes
}

pub fn texts<'a>(values: impl IntoIterator<Item = &'a str>) -> Vec<u8> {
    array(8, &values.into_iter().map(text).collect::<Vec<_>>())
}

impl Entry {
    pub fn f32(name: &str, dims: &[u64], value: impl Fn(usize) -> f32) -> Self {
        let count = dims.iter().product::<u64>() as usize;
        let data = (0..count).flat_map(|i| value(i).to_le_bytes()).collect();
        Self { name: name.into(), dims: dims.into(), kind: F32, data, offset: None }
    }

    /// Scales of 2⁻⁷, codes of all kinds.
    pub fn q8_0(name: &str, dims: &[u64]) -> Self {
        let blocks = dims.iter().product::<u64>() as usize / 32;
        let block = |n: usize| {
            let codes = (0..32).map(move |i| ((n * 37 + i * 11) % 251) as u8);
            0x2000_u16.to_le_bytes().into_iter().chain(codes)
        };
        let data = (0..blocks).flat_map(block).collect();
        Self { name: name.into(), dims: dims.into(), kind: Q8_0, data, offset: None }
    }
}

impl Gguf {
    /// A Llama of two layers, sound in everything.
    pub fn tiny() -> Self {
        let (e, i, d, vocab) = (32, 64, 16, 64);
        let tokens: Vec<String> =
            (b'A'..b'A' + 60).map(|byte| char::from(byte).to_string()).collect();
        let tokens =
            ["<s>", "</s>", "ab", "abc"].into_iter().chain(tokens.iter().map(String::as_str));
        let kinds: Vec<_> = (0..vocab).map(|id| i32(if id < 2 { 3 } else { 1 })).collect();
        let entries = [
            ("general.architecture", text("llama")),
            ("llama.block_count", u32(2)),
            ("llama.context_length", u32(128)),
            ("llama.embedding_length", u32(e)),
            ("llama.feed_forward_length", u32(i)),
            ("llama.attention.head_count", u32(2)),
            ("llama.attention.head_count_kv", u32(1)),
            ("llama.attention.layer_norm_rms_epsilon", f32(1e-5)),
            ("llama.rope.dimension_count", u32(d)),
            ("llama.rope.freq_base", f32(10_000.0)),
            ("tokenizer.ggml.model", text("gpt2")),
            ("tokenizer.ggml.pre", text("gpt-2")),
            ("tokenizer.ggml.tokens", texts(tokens)),
            ("tokenizer.ggml.token_type", array(5, &kinds)),
            ("tokenizer.ggml.merges", texts(["a b", "ab c"])),
            ("tokenizer.ggml.bos_token_id", u32(0)),
            ("tokenizer.ggml.eos_token_id", u32(1)),
        ];
        let [e, i, d, vocab] = [e, i, d, vocab].map(u64::from);
        let norm = |i: usize| 1.0 + 0.01 * (i % 7) as f32;
        let wave = |i: usize| 0.1 * (i as f32 * 0.7).sin();
        let mut tensors = vec![
            Entry::q8_0("token_embd.weight", &[e, vocab]),
            Entry::f32("output_norm.weight", &[e], norm),
            Entry::f32("output.weight", &[e, vocab], wave),
        ];
        for n in 0..2 {
            let of = |name: &str| format!("blk.{n}.{name}.weight");
            tensors.extend([
                Entry::f32(&of("attn_norm"), &[e], norm),
                Entry::q8_0(&of("attn_q"), &[e, 2 * d]),
                Entry::f32(&of("attn_k"), &[e, d], wave),
                Entry::q8_0(&of("attn_v"), &[e, d]),
                Entry::f32(&of("attn_output"), &[2 * d, e], wave),
                Entry::f32(&of("ffn_norm"), &[e], norm),
                Entry::q8_0(&of("ffn_gate"), &[e, i]),
                Entry::q8_0(&of("ffn_up"), &[e, i]),
                Entry::q8_0(&of("ffn_down"), &[i, e]),
            ]);
        }
        let entries = entries.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        Self { version: 3, entries, tensors, alignment: 32 }
    }

    /// Replaces a key's value or adds it.
    #[must_use]
    pub fn with(mut self, key: &str, value: Vec<u8>) -> Self {
        match self.entries.iter_mut().find(|(name, _)| name == key) {
            Some(entry) => entry.1 = value,
            None => self.entries.push((key.into(), value)),
        }
        self
    }

    #[must_use]
    pub fn without(mut self, key: &str) -> Self {
        self.entries.retain(|(name, _)| name != key);
        self
    }

    /// Changes a tensor.
    #[must_use]
    pub fn tensor(mut self, name: &str, change: impl FnOnce(&mut Entry)) -> Self {
        change(self.tensors.iter_mut().find(|entry| entry.name == name).unwrap());
        self
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(self.version.to_le_bytes());
        bytes.extend((self.tensors.len() as u64).to_le_bytes());
        bytes.extend((self.entries.len() as u64).to_le_bytes());
        for (key, value) in &self.entries {
            bytes.extend(length_and(key.as_bytes()));
            bytes.extend(value);
        }
        let mut offset = 0_usize;
        for tensor in &self.tensors {
            bytes.extend(length_and(tensor.name.as_bytes()));
            bytes.extend((tensor.dims.len() as u32).to_le_bytes());
            tensor.dims.iter().for_each(|dim| bytes.extend(dim.to_le_bytes()));
            bytes.extend(tensor.kind.to_le_bytes());
            bytes.extend(tensor.offset.unwrap_or(offset as u64).to_le_bytes());
            offset = (offset + tensor.data.len()).next_multiple_of(self.alignment);
        }
        for tensor in &self.tensors {
            bytes.resize(bytes.len().next_multiple_of(self.alignment), 0);
            bytes.extend(&tensor.data);
        }
        bytes
    }
}
