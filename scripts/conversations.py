#!/usr/bin/env python3
"""Conversations about pages of books, as text to train a student on.

A user gives pages in which facts were made up and planted, asks for some of them, and gets the sentence or the value back.
The lines are what `still linearize --data` takes as chat: {"messages": [...]}. A seed gives the same lines every time.

The facts differ from those of `still demo` and of `still eval --tasks planted_facts`: other sentences, other names.
"""

import argparse
import json
import random
import re

SYLLABLES = (
    "ba be bi bo bu da de di do du fa fe fi ga go gu ha he ho ka ke ki ko la le li lo lu ma me mi mo mu na ne ni no nu pa pe po "
    "ra re ri ro ru sa se si so su ta te ti to tu va ve vi vo wa we wi za zo"
).split()
ENDINGS = ["n", "r", "l", "s", "th", "m", "nd", "rt", "ck", "", "", ""]
FIRST_NAMES = (
    "Alice Amelia Arthur Basil Beatrice Clara Cyril Daphne Edgar Edith Edmund Elsie Ernest Florence Frances George Gerald Gilbert "
    "Grace Harold Harriet Helen Henry Herbert Ida Irene Ivor James Jane Julia Lionel Louisa Mabel Maud Nora Oliver Oscar Percy "
    "Philip Rose Rupert Ruth Silas Stella Sybil Thomas Ursula Victor Violet Walter Winifred"
).split()
# What `still ask` puts between a document and a question.
BETWEEN = "\n\nAnswer the question using the text above.\nQuestion: "
# Tokens of a conversation: one fills a window of each usual length.
LENGTHS = [950, 1900, 3900, 7900]
TOKENS_PER_WORD = 1.42


def name(rng):
    syllables = "".join(rng.choice(SYLLABLES) for _ in range(rng.choice([2, 2, 3])))
    return (syllables + rng.choice(ENDINGS)).capitalize()


def person(rng):
    kinds = [
        lambda: rng.choice(FIRST_NAMES) + " " + name(rng),
        lambda: name(rng),
        lambda: rng.choice(FIRST_NAMES),
    ]
    return rng.choice(kinds)()


def one_of(words):
    words = words.split()
    return lambda rng: rng.choice(words)


def large_number(rng):
    return f"{rng.randrange(1000, 99999):,}" if rng.random() < 0.5 else str(rng.randrange(1000, 99999))


def time(rng):
    return f"{rng.randrange(1, 13)}:{rng.randrange(0, 60):02d}" + rng.choice(["", "", " in the morning", " p.m."])


def price(rng):
    return str(rng.randrange(3, 4000)) + rng.choice([" dollars", " pounds", " francs", " crowns"])


VALUES = {
    "person": person,
    "place": name,
    "year": lambda rng: str(rng.randrange(1400, 2030)),
    "number": lambda rng: str(rng.randrange(2, 200)),
    "large": large_number,
    "code": lambda rng: str(rng.randrange(100, 10_000_000)),
    "time": time,
    "price": price,
    "color": one_of(
        "red blue green yellow purple orange brown black white grey pink golden silver bronze copper ivory teal amber beige "
        "rust-red sky-blue"
    ),
    "thing": one_of(
        "lantern compass kettle violin mirror carpet saddle clock ladder basket barrel trumpet telescope anchor umbrella drum "
        "wheel statue hammer candle map key bell globe feather ring crown shield chessboard microscope"
    ),
    "plant": one_of(
        "oak elm poplar willow lime beech fir pine cypress palm fig olive apple pear plum rose tulip lily iris fern moss ivy "
        "heather"
    ),
    "animal": one_of(
        "fox otter badger heron falcon swan goat mule donkey spaniel greyhound parrot raven tortoise salmon trout pike lynx "
        "stag hare"
    ),
    "food": one_of(
        "barley rye honey cheese plums almonds mustard salt pepper ginger coffee tea cider wine butter onions lentils rice "
        "herring oysters"
    ),
    "month": one_of("January February March April May June July August September October November December"),
    "material": one_of("oak brass marble granite glass silk leather iron slate ivory clay tin linen bamboo"),
    "job": one_of("carpenter notary surgeon tailor printer weaver captain gardener judge painter miner baker glazier mason tutor"),
}

# What a fact tells, how, and how it is asked for: {p} is a place, {n} a person, {v} the value.
KINDS = [
    ("person", "The captain of the {p} is {v}.", "Who is the captain of the {p}?"),
    ("person", "{v} wrote the history of {p}.", "Who wrote the history of {p}?"),
    ("person", "The owner of the mill at {p} was a certain {v}.", "Who was the owner of the mill at {p}?"),
    ("person", "It was {v} who first climbed Mount {p}.", "Who first climbed Mount {p}?"),
    ("person", "{n}'s eldest daughter is named {v}.", "What is the name of {n}'s eldest daughter?"),
    ("person", "The judge in the case of {n} was {v}.", "Who was the judge in the case of {n}?"),
    ("place", "{n} was born in {v}.", "Where was {n} born?"),
    ("place", "The head office of the {p} company is in {v}.", "Where is the head office of the {p} company?"),
    ("place", "The river that flows through {p} is the {v}.", "Which river flows through {p}?"),
    ("place", "{n} spent the winter at {v}.", "Where did {n} spend the winter?"),
    ("place", "The road from {p} leads to {v}.", "Where does the road from {p} lead?"),
    ("year", "The castle of {p} burned down in {v}.", "When did the castle of {p} burn down?"),
    ("year", "{n} died in the year {v}.", "In what year did {n} die?"),
    ("year", "The University of {p} was founded in {v}.", "When was the University of {p} founded?"),
    ("year", "The treaty of {p} was signed in {v}.", "In which year was the treaty of {p} signed?"),
    ("number", "There are {v} rooms in the house of {n}.", "How many rooms are there in the house of {n}?"),
    ("number", "{n} is {v} years old.", "How old is {n}?"),
    ("number", "The journey to {p} takes {v} hours.", "How many hours does the journey to {p} take?"),
    ("number", "The {p} regiment lost {v} men.", "How many men did the {p} regiment lose?"),
    ("large", "The harvest at {p} came to {v} bushels.", "How many bushels did the harvest at {p} come to?"),
    ("large", "{n}'s debts amount to {v}.", "What do {n}'s debts amount to?"),
    ("code", "The number on {n}'s medal is {v}.", "What is the number on {n}'s medal?"),
    ("code", "The secret code of {n} is {v}.", "What is the secret code of {n}?"),
    ("code", "The safe at {p} opens with {v}.", "What number opens the safe at {p}?"),
    ("time", "The coach for {p} arrives at {v}.", "When does the coach for {p} arrive?"),
    ("time", "{n} always dines at {v}.", "At what time does {n} dine?"),
    ("time", "The bells of {p} ring at {v}.", "When do the bells of {p} ring?"),
    ("price", "A night at the inn of {p} costs {v}.", "How much does a night at the inn of {p} cost?"),
    ("price", "{n} paid {v} for the picture.", "How much did {n} pay for the picture?"),
    ("price", "The fine for fishing at {p} is {v}.", "What is the fine for fishing at {p}?"),
    ("color", "{n} wears a {v} coat.", "What color is {n}'s coat?"),
    ("color", "The roofs of {p} are {v}.", "What color are the roofs of {p}?"),
    ("color", "The gate of {p} was painted {v}.", "What color was the gate of {p} painted?"),
    ("thing", "{n} inherited a {v}.", "What did {n} inherit?"),
    ("thing", "The sign of the inn at {p} shows a {v}.", "What does the sign of the inn at {p} show?"),
    ("plant", "Behind the school of {p} stands an old {v}.", "What stands behind the school of {p}?"),
    ("plant", "{n}'s favorite plant is the {v}.", "What is {n}'s favorite plant?"),
    ("animal", "{n} keeps a tame {v}.", "Which animal does {n} keep?"),
    ("animal", "The arms of {p} bear a {v}.", "Which animal do the arms of {p} bear?"),
    ("food", "{p} is known for its {v}.", "What is {p} known for?"),
    ("food", "{n} trades in {v}.", "What does {n} trade in?"),
    ("month", "The fair of {p} takes place in {v}.", "In which month does the fair of {p} take place?"),
    ("month", "{n} was married in {v}.", "In which month was {n} married?"),
    ("material", "The bridge of {p} is made of {v}.", "What is the bridge of {p} made of?"),
    ("material", "{n}'s cup was of {v}.", "What was {n}'s cup made of?"),
    ("job", "{n} worked as a {v}.", "What was {n}'s profession?"),
    ("job", "The son of {n} became a {v}.", "What did the son of {n} become?"),
]


def fact(rng, kind, sentence, question):
    """A sentence, the question that it answers, and the answer."""
    place, who = name(rng), person(rng)
    value = VALUES[kind](rng)
    sentence = sentence.format(p=place, n=who, v=value)
    return sentence[0].upper() + sentence[1:], question.format(p=place, n=who), value


def sentences(rng, books, words):
    """So many words of a book, from any word on, in whole sentences."""
    while True:
        text = rng.choice(books).split()
        if len(text) < words + 10:
            continue
        start = rng.randrange(0, len(text) - words)
        pages = " ".join(text[start : start + words])
        whole = re.split(r"(?<=[.!?]) (?=[A-Z\"'])", pages)[1:-1]
        if len(whole) > 5:
            return whole


def paragraphs(rng, lines):
    made, at = [], 0
    while at < len(lines):
        size = rng.choice([3, 5, 7])
        made.append(" ".join(lines[at : at + size]))
        at += size
    return "\n\n".join(made)


def conversation(rng, books, tokens):
    facts = [fact(rng, *kind) for kind in rng.sample(KINDS, rng.choice([3, 4, 6, 8]))]
    asked = min(len(facts), 4)
    lines = sentences(rng, books, int((tokens - 110 - 45 * asked) / TOKENS_PER_WORD))
    for sentence, _, _ in facts:
        lines.insert(rng.randrange(0, len(lines) + 1), sentence)
    document = paragraphs(rng, lines)
    messages = []
    for n, (sentence, question, value) in enumerate(rng.sample(facts, asked)):
        said = document + BETWEEN + question if n == 0 else question
        answer = sentence if rng.random() < 0.6 else value[0].upper() + value[1:] + "."
        messages += [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]
    return messages


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("books", help='one JSON object a line, with a "text"')
    parser.add_argument("out", help="the conversations, one a line")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=3_000_000, help="about so many [%(default)s]")
    args = parser.parse_args()
    with open(args.books, encoding="utf-8") as file:
        books = [json.loads(line)["text"] for line in file]
    rng = random.Random(args.seed)
    done = 0
    with open(args.out, "w", encoding="utf-8") as out:
        while done < args.tokens:
            tokens = rng.choice(LENGTHS)
            out.write(json.dumps({"messages": conversation(rng, books, tokens)}, ensure_ascii=False) + "\n")
            done += tokens


if __name__ == "__main__":
    main()
