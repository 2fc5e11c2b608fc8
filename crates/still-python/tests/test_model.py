"""Models: tokens, logits, generation, states."""

import numpy as np
import pytest

import still

PROMPT = "The three laws of robotics are"


def test_tokens_are_text_and_back(demo):
    ids = demo.tokenize(PROMPT)
    assert all(isinstance(id, int) for id in ids)
    assert demo.detokenize(ids) == PROMPT == demo.detokenize(np.array(ids))


def test_logits_whole_and_in_parts_agree(demo):
    ids = demo.tokenize(PROMPT * 40)
    whole = demo.logits(ids)
    assert whole.dtype == np.float32 and whole.shape == (len(ids), demo.vocab_size)
    assert np.isfinite(whole).all()
    state = demo.new_state(rows="f32")
    exact = demo.new_state(rows="f32")
    parts = np.concatenate([demo.logits(ids[:150], state=state), demo.logits(ids[150:], state=state)])
    together = demo.logits(ids, state=exact)
    assert state.position == exact.position == len(ids)
    assert np.sqrt(np.mean((parts - together) ** 2)) < 1e-4 * np.sqrt(np.mean(together**2))
    last = demo.logits(ids, state=demo.new_state(rows="f32"), last=True)
    np.testing.assert_allclose(last, together[-1], rtol=1e-4, atol=1e-3)


def test_greedy_text_is_the_likeliest_by_the_logits(demo):
    generation = demo.generate(PROMPT, max_new_tokens=8)
    ids = demo.tokenize(PROMPT)
    for id in generation.ids:
        assert id == int(demo.logits(ids, last=True).argmax())
        ids.append(id)
    assert str(generation) == generation.text == demo.detokenize(generation.ids)
    assert generation.finish == "length" and generation.prompt_tokens == len(demo.tokenize(PROMPT))


def test_a_stream_is_the_generation_in_pieces(demo):
    stream = demo.stream(PROMPT, max_new_tokens=20)
    pieces = list(stream)
    whole = demo.generate(PROMPT, max_new_tokens=20)
    assert len(pieces) > 5 and "".join(pieces) == whole.text
    assert stream.result is not None and stream.result.ids == whole.ids


def test_a_stop_string_ends_it(demo):
    text = demo.generate(PROMPT, max_new_tokens=30).text
    word = text.split()[3]
    stopped = demo.generate(PROMPT, max_new_tokens=30, stop=word)
    assert stopped.finish == "stop" and stopped.text == text[: text.index(word)]


def test_sampling_goes_by_its_seed(demo):
    sample = lambda seed: demo.generate(PROMPT, max_new_tokens=12, temperature=1.0, seed=seed).ids
    assert sample(1) == sample(1) != sample(2)


def test_a_state_goes_on_where_it_was(demo):
    state = demo.new_state()
    assert state.read(PROMPT) == state.position == len(demo.tokenize(PROMPT))
    fork = state.fork()
    first = demo.generate(" that", state=state, max_new_tokens=10)
    assert state.position == fork.position + 1 + len(first.ids)
    again = demo.generate(" that", state=fork, max_new_tokens=10)
    assert first.ids == again.ids and fork.position == state.position
    # The state has read the answer too.
    both = demo.logits(" and", state=state, last=True), demo.logits(" and", state=fork, last=True)
    np.testing.assert_array_equal(*both)


def test_a_saved_state_is_the_same(demo, tmp_path):
    state = demo.new_state()
    state.read(PROMPT * 30)
    state.save(tmp_path / "read.state")
    restored = demo.restore(tmp_path / "read.state")
    assert (restored.position, restored.rows) == (state.position, state.rows)
    np.testing.assert_array_equal(demo.logits(" x", state=restored), demo.logits(" x", state=state))


def test_a_state_is_of_its_model_alone(demo, base, tmp_path):
    state = demo.new_state()
    state.read(PROMPT)
    with pytest.raises(still.InputError, match="another model"):
        base.generate("x", state=state)
    state.save(tmp_path / "read.state")
    with pytest.raises(still.InputError, match="another model"):
        base.restore(tmp_path / "read.state")
    damaged = bytearray((tmp_path / "read.state").read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "damaged.state").write_bytes(damaged)
    with pytest.raises(still.InputError):
        demo.restore(tmp_path / "damaged.state")


def test_an_error_leaves_the_state_as_it_was(demo):
    state = demo.new_state()
    state.read(PROMPT)
    before = state.position
    with pytest.raises(still.InputError):
        state.read([10**6])
    assert state.position == before
    assert state.read(" more") > 0


def test_a_conversation_is_rendered(demo):
    prompt = demo.chat_prompt([{"role": "user", "content": "Who are you?"}])
    assert "Who are you?" in prompt and prompt.rstrip().endswith("assistant")


def test_the_teacher_is_the_same_base(demo):
    teacher = demo.teacher()
    assert demo.is_student and not teacher.is_student
    assert teacher.vocab_size == demo.vocab_size
    # Up to two chunks a student computes what its base does.
    own, of_teacher = demo.logits(PROMPT, last=True), teacher.logits(PROMPT, last=True)
    assert own.shape == of_teacher.shape
