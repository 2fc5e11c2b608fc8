#!/usr/bin/env python3
"""Conversations that a teacher writes itself, as text to train its student on.

    still serve --model base.gguf --device cuda --max-concurrent 64 --port 8080
    benches/table/own_texts.py http://127.0.0.1:8080 own.jsonl --tokens 1500000

Books are far from what an instruction model mostly reads. Its own conversations are near, and need no other text: the model
makes up tasks of many kinds on many subjects and does them, at temperature 1. One exchange after another fills a conversation
of about 950 to 7,900 tokens: of one kind, as examples before a question are, or of several.

No benchmark's items, subjects or prompts are used. The lines are what `still linearize --data` takes as chat. What was
written is kept if the script is stopped, and the same command goes on from there.
"""

import argparse
import concurrent.futures
import json
import pathlib
import random
import sys
import time
import urllib.error
import urllib.request

SUBJECTS = (
    "volcanoes, the human heart, probability, the Roman Republic, contracts, photosynthesis, interest rates, electric motors, chess, "
    "vaccines, the French Revolution, fractions, DNA, supply and demand, memory and learning, sound waves, acids and bases, elections, "
    "programming in Python, sorting algorithms, databases, operating systems, computer networks, cryptography, web pages, spreadsheets, "
    "the solar system, earthquakes, rivers and lakes, forests, insects, birds, whales, dogs, nutrition, cooking, bread, tea and coffee, "
    "painting, classical music, jazz, poetry, novels, theatre, film, architecture, bridges, railways, airplanes, ships, cars, bicycles, "
    "football, swimming, running, the Olympic games, world religions, ethics, logic, geometry, linear equations, calculus, statistics, "
    "prime numbers, graphs, units of measurement, thermodynamics, magnetism, light and lenses, atoms, chemical bonds, metals, plastics, "
    "batteries, solar power, nuclear power, oil and gas, farming, soil, weather, climate, oceans, deserts, mountains, maps, "
    "ancient Egypt, ancient Greece, China's dynasties, the Ottoman Empire, Japan, India, Africa's kingdoms, the Americas before 1492, "
    "the Renaissance, the Industrial Revolution, the two world wars, the Cold War, constitutions, courts, human rights, property, crime, "
    "taxes, budgets, banks, insurance, trade between countries, inflation, companies, accounting, marketing, management, negotiation, "
    "public speaking, letters and e-mail, grammar, translation, spelling, child development, sleep, stress, friendship, personality, "
    "groups and society, cities, migration, families, schools, the immune system, bones and muscles, the brain, cancer, infections, "
    "first aid, medicines, aging, heredity, evolution, cells, viruses, fungi, fossils, rocks, robots, artificial intelligence, "
    "space travel, telescopes, time and calendars, money, clothes, houses, gardens, travel, museums, languages of the world"
).replace("\n", " ").split(", ")

# By kind: what the model is asked for to make up a user's words, or those words themselves.
KINDS = {
    "question": ("Think of a question about {s} that a person might ask an assistant. Write the question alone.", None),
    "task": ("Think of a task about {s} that a person might give an assistant, with all that it needs. Write the task alone.", None),
    "choices": (None, "Write a question about {s} with four choices, A to D, and under them a line with the letter of the right one."),
    "facts": (None, "Which statement about {s} is often believed but false, and why?"),
    "explain": (None, "Explain one idea of {s} to a student, with an example."),
    "code": (None, "Write a short program that has to do with {s}, in a language that you choose, and say how it works."),
    "problem": (None, "Make up an exercise about {s}, and solve it step by step."),
    "list": (None, "Name ten important terms of {s}, each with one sentence."),
}
# As `conversations.py`.
LENGTHS = [950, 1900, 3900, 7900]


class Server:
    """An OpenAI-compatible server."""

    def __init__(self, url):
        self.url = url.rstrip("/")

    def answer(self, said, most, seed):
        """The answer to one message, and its tokens with the message's; `None` for one that was cut."""
        body = {"messages": [{"role": "user", "content": said}], "max_tokens": most, "temperature": 1.0, "seed": seed}
        request = urllib.request.Request(
            self.url + "/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as response:
            got = json.load(response)
        choice = got["choices"][0]
        text = choice["message"]["content"].strip()
        return (text, got["usage"]["total_tokens"]) if text and choice["finish_reason"] == "stop" else None


def exchange(server, seed):
    """One message and its answer: `(kind, messages, tokens)`; `None` if one was cut."""
    rng = random.Random(seed)
    kind, subject = rng.choice(list(KINDS)), rng.choice(SUBJECTS)
    thought, said = KINDS[kind]
    if thought:
        made = server.answer(thought.format(s=subject), 256, seed)
        if made is None:
            return None
        said = made[0]
    else:
        said = said.format(s=subject)
    answer = server.answer(said, 768, seed + 1)
    if answer is None:
        return None
    messages = [{"role": "user", "content": said}, {"role": "assistant", "content": answer[0]}]
    return kind, messages, answer[1]


def exchanges(server, wanted, clients, kept):
    """So many tokens of exchanges, in the order of their seeds; what is written goes to the file `kept` at once."""
    done, tokens, started = {}, 0, time.monotonic()
    if kept.exists():
        for line in kept.read_text(encoding="utf-8").splitlines():
            seed, made = json.loads(line)
            done[seed] = made
            tokens += made[2] if made else 0
    before, seed = tokens, 0
    with kept.open("a", encoding="utf-8") as file, concurrent.futures.ThreadPoolExecutor(clients) as pool:
        running = {}
        while tokens < wanted:
            while len(running) < clients:
                if seed not in done:
                    running[pool.submit(exchange, server, seed)] = seed
                seed += 2
            ready, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in ready:
                of, made = running.pop(future), future.result()
                done[of] = made
                tokens += made[2] if made else 0
                file.write(json.dumps([of, made], ensure_ascii=False) + "\n")
                file.flush()
                if made and len(done) % 100 == 0:
                    rate = (tokens - before) / (time.monotonic() - started)
                    print(f"{len(done)} exchanges, {tokens} tokens, {rate:.0f} tokens/s", file=sys.stderr)
        for future in running:
            future.cancel()
    return [made for _, made in sorted(done.items()) if made]


def conversations(made, seed):
    """Exchanges one after another in conversations of `LENGTHS`, half of them of one kind; each exchange once."""
    rng = random.Random(seed)
    pools = {kind: [one for one in made if one[0] == kind] for kind in KINDS}
    for pool in pools.values():
        rng.shuffle(pool)
    while any(pools.values()):
        own = [kind for kind in KINDS if pools[kind]]
        if rng.random() < 0.5:
            own = [rng.choice(own)]
        messages, tokens, wanted = [], 0, rng.choice(LENGTHS)
        while ready := [kind for kind in own if pools[kind]]:
            pool = pools[rng.choice(ready)]
            if messages and tokens + pool[-1][2] > wanted:
                break
            _, said, count = pool.pop()
            messages, tokens = messages + said, tokens + count
        yield {"messages": messages}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server", help="address of a server, such as http://127.0.0.1:8080")
    parser.add_argument("out", type=pathlib.Path, help="the conversations, one a line")
    parser.add_argument("--tokens", type=int, default=1_500_000, help="about so many [%(default)s]")
    parser.add_argument("--clients", type=int, default=64, help="requests at a time [%(default)s]")
    parser.add_argument("--seed", type=int, default=1, help="of the conversations' order")
    args = parser.parse_args()
    kept = args.out.with_suffix(".exchanges")
    try:
        made = exchanges(Server(args.server), args.tokens, args.clients, kept)
    except urllib.error.URLError as error:
        sys.exit(f"error: no answer from {args.server}: {error}\nhint: start `still serve`, and run this again: {kept} is kept")
    lines = [json.dumps(line, ensure_ascii=False) for line in conversations(made, args.seed)]
    args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(made)} exchanges in {len(lines)} conversations: {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
