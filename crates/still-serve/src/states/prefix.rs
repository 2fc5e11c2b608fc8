//! Prefixes of sequences, identified by a hash chain over chunks of their tokens.

use std::collections::HashMap;

use blake3::Hasher;
use still_attention::RowDtype;

use crate::engine::CHUNK;

/// BLAKE3, cut to 16 bytes. Matches are confirmed token by token.
pub(crate) type Digest = [u8; 16];

fn digest(before: &Digest, tokens: &[u32]) -> Digest {
    let mut hasher = Hasher::new();
    hasher.update(before);
    for token in tokens {
        hasher.update(&token.to_le_bytes());
    }
    cut(&hasher)
}

fn cut(hasher: &Hasher) -> Digest {
    let mut cut = Digest::default();
    cut.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    cut
}

/// The first `tokens` tokens of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Prefix {
    pub tokens: usize,
    /// After its whole chunks.
    chain: Digest,
    /// After the tokens that follow these; the chain's if there are none.
    tail: Digest,
    /// Whether the state after it was computed by decode steps, in part.
    pub decoded: bool,
}

impl Prefix {
    /// The file name of its state.
    pub fn file_name(&self) -> String {
        let kind = if self.decoded { 'a' } else { 'p' };
        format!("{:08}-{}-{}-{kind}.safetensors", self.tokens, hex(&self.chain), hex(&self.tail))
    }

    /// The prefix whose file has this name.
    pub fn of_file_name(name: &str) -> Option<Self> {
        let mut parts = name.strip_suffix(".safetensors")?.split('-');
        let [tokens, chain, tail, kind] = std::array::from_fn(|_| parts.next());
        let decoded = match kind? {
            "a" => true,
            "p" => false,
            _ => return None,
        };
        let prefix = Self {
            tokens: tokens?.parse().ok()?,
            chain: of_hex(chain?)?,
            tail: of_hex(tail?)?,
            decoded,
        };
        (parts.next().is_none() && prefix.file_name() == name).then_some(prefix)
    }
}

fn hex(digest: &Digest) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn of_hex(text: &str) -> Option<Digest> {
    let mut digest = Digest::default();
    if text.len() != 2 * digest.len() || !text.is_ascii() {
        return None;
    }
    for (at, byte) in digest.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * at..2 * at + 2], 16).ok()?;
    }
    Some(digest)
}

/// The hash chain of a sequence's chunks.
#[derive(Clone, Debug)]
pub(crate) struct Chain {
    /// After 0, 1, 2, … whole chunks.
    digests: Vec<Digest>,
}

impl Chain {
    /// The chain of no tokens, for a model's states with exact rows of this dtype.
    pub fn new(identity: &str, rows: RowDtype) -> Self {
        let mut hasher = Hasher::new();
        hasher.update(identity.as_bytes());
        hasher.update(format!("{rows:?}").as_bytes());
        Self { digests: vec![cut(&hasher)] }
    }

    /// Extends the chain to `tokens`, which begin with its own.
    pub fn extend(&mut self, tokens: &[u32]) {
        for chunk in tokens[self.chunks() * CHUNK..].chunks_exact(CHUNK) {
            self.digests.push(digest(&self.digests[self.chunks()], chunk));
        }
    }

    /// Number of whole chunks.
    pub fn chunks(&self) -> usize {
        self.digests.len() - 1
    }

    /// After 1, 2, 3, … whole chunks.
    pub fn after_chunks(&self) -> &[Digest] {
        &self.digests[1..]
    }

    /// Number of whole chunks that both sequences begin with.
    pub fn common_chunks(&self, other: &Self) -> usize {
        let common = self.after_chunks().iter().zip(other.after_chunks());
        common.take_while(|(a, b)| a == b).count()
    }

    /// The first `n` of its tokens.
    pub fn prefix(&self, tokens: &[u32], n: usize, decoded: bool) -> Prefix {
        let chain = self.digests[n / CHUNK];
        let tail = match &tokens[n / CHUNK * CHUNK..n] {
            [] => chain,
            tail => digest(&chain, tail),
        };
        Prefix { tokens: n, chain, tail, decoded }
    }
}

/// A map from prefixes to values, searched by a longer sequence.
#[derive(Debug)]
pub(crate) struct PrefixIndex<T> {
    by_chain: HashMap<Digest, Vec<(Prefix, T)>>,
}

impl<T> Default for PrefixIndex<T> {
    fn default() -> Self {
        Self { by_chain: HashMap::new() }
    }
}

impl<T> PrefixIndex<T> {
    /// Inserts a value for a prefix and returns the earlier one.
    pub fn insert(&mut self, prefix: Prefix, value: T) -> Option<T> {
        let known = self.remove(&prefix);
        self.by_chain.entry(prefix.chain).or_default().push((prefix, value));
        known
    }

    pub fn remove(&mut self, prefix: &Prefix) -> Option<T> {
        let known = self.by_chain.get_mut(&prefix.chain)?;
        let at = known.iter().position(|(other, _)| other == prefix)?;
        let (_, value) = known.swap_remove(at);
        if known.is_empty() {
            self.by_chain.remove(&prefix.chain);
        }
        Some(value)
    }

    pub fn iter(&self) -> impl Iterator<Item = &(Prefix, T)> {
        self.by_chain.values().flatten()
    }

    /// The longest known prefix of `tokens` (with their `chain`), of at most `most` tokens.
    pub fn longest(
        &self,
        chain: &Chain,
        tokens: &[u32],
        most: usize,
        takes: impl Fn(&Prefix) -> bool,
    ) -> Option<&(Prefix, T)> {
        let chunks = chain.chunks().min(most / CHUNK);
        (0..=chunks).rev().find_map(|chunk| {
            let known = self.by_chain.get(&chain.digests[chunk])?.iter();
            let fits = known.filter(|(prefix, _)| {
                prefix.tokens <= most.min(tokens.len())
                    && takes(prefix)
                    && *prefix == chain.prefix(tokens, prefix.tokens, prefix.decoded)
            });
            // Of two states after the same tokens the one that prefill has computed.
            fits.max_by_key(|(prefix, _)| (prefix.tokens, !prefix.decoded))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(tokens: &[u32]) -> Chain {
        let mut chain = Chain::new("model", RowDtype::Bf16);
        chain.extend(tokens);
        chain
    }

    #[test]
    fn the_longest_prefix_is_found_and_no_other() {
        let tokens: Vec<u32> = (0..300).collect();
        let of = chain(&tokens);
        let mut index = PrefixIndex::default();
        for n in [0, 64, 100, 128, 250] {
            index.insert(of.prefix(&tokens, n, n == 250), n);
        }
        let longest = |tokens: &[u32], most, decoded| {
            let found = index.longest(&chain(tokens), tokens, most, |p| decoded || !p.decoded);
            found.map(|(_, n)| *n)
        };
        assert_eq!(longest(&tokens, 300, true), Some(250));
        assert_eq!(longest(&tokens, 300, false), Some(128));
        assert_eq!(longest(&tokens, 249, true), Some(128));
        assert_eq!(longest(&tokens[..127], 127, true), Some(100));
        let mut edited = tokens.clone();
        edited[99] = 7;
        assert_eq!(longest(&edited, 300, true), Some(64));
        edited[0] = 7;
        assert_eq!(longest(&edited, 300, true), Some(0));
        assert_eq!(of.common_chunks(&chain(&edited)), 0);
        assert_eq!(of.common_chunks(&chain(&tokens[..200])), 3);
    }

    #[test]
    fn a_file_name_says_which_prefix_it_is() {
        let tokens: Vec<u32> = (0..100).collect();
        for decoded in [false, true] {
            let prefix = chain(&tokens).prefix(&tokens, 77, decoded);
            let name = prefix.file_name();
            assert_eq!(Prefix::of_file_name(&name), Some(prefix));
            for other in
                ["", "x", &name[1..], &name.replace("safetensors", "bin"), &name.to_uppercase()]
            {
                assert_eq!(Prefix::of_file_name(other), None, "{other}");
            }
        }
    }

    #[test]
    fn chains_of_other_models_and_rows_have_nothing_in_common() {
        let tokens: Vec<u32> = (0..64).collect();
        let mut others = [Chain::new("other", RowDtype::Bf16), Chain::new("model", RowDtype::Int8)];
        for other in &mut others {
            other.extend(&tokens);
            assert_eq!(chain(&tokens).common_chunks(other), 0);
        }
    }
}
