//! Long-context tasks, by a tokenizer of one token a byte.

use std::path::{Path, PathBuf};

use still_eval::long::{LongFiles, LongOptions, LongTask};
use still_eval::random_tokens;
use still_eval::task::{Generative, Item, Question};
use still_model::Tokenizer;
use still_model::random::{random_model, tiny_config};

const LENGTH: usize = 12_000;
const VOCAB: usize = 258;

struct Fixture {
    dir: tempfile::TempDir,
    tokenizer: Tokenizer,
}

/// A paragraph that names its number.
fn paragraph(number: usize) -> String {
    format!("Paragraph {number} tells of town {number}. It has {number} wells. ").repeat(6)
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: String| std::fs::write(dir.path().join(name), text).unwrap();
        let sentence = |i: usize| format!("Sentence {i} is about nothing,\nand ends here. ");
        write("essay.txt", (0..300).map(sentence).collect());
        let article = |a: usize| {
            let paragraph = |p: usize| {
                let number = 10 * a + p;
                serde_json::json!({
                    "context": paragraph(number),
                    "qas": [
                        { "question": format!("Which town has {number} wells?"), "id": "x",
                          "answers": [{ "text": format!("town {number}"), "answer_start": 0 }] },
                        { "question": "Why?", "answers": [], "is_impossible": true },
                    ],
                })
            };
            serde_json::json!({ "title": "t", "paragraphs": (0..10).map(paragraph).collect::<Vec<_>>() })
        };
        let squad = serde_json::json!({ "data": (0..5).map(article).collect::<Vec<_>>() });
        write("squad.json", squad.to_string());
        let asked = |a: usize| {
            let document = |p: usize| {
                let number = 10 * a + p;
                (format!("Title {number}"), vec![paragraph(number), format!(" End {number}.")])
            };
            serde_json::json!({
                "question": format!("What of {a}?"), "answer": format!("it is {a}"), "level": "hard",
                "context": (0..10).map(document).collect::<Vec<_>>(),
            })
        };
        write("hotpot.json", serde_json::json!((0..5).map(asked).collect::<Vec<_>>()).to_string());
        let story = |s: usize| {
            format!(
                "1 Mary went to the office.\n2 John moved to the garden.\n3 Where is Mary? \toffice\t1\n\
                 4 Mary went back to the kitchen number {s}.\n5 Where is Mary? \tkitchen\t4\n"
            )
        };
        write("qa1_test.txt", (0..20).map(story).collect());
        let long: String = (1..400).map(|i| format!("{i} Fred took the milk {i}.\n")).collect();
        write("qa5_test.txt", format!("{long}400 Who took the milk?\tFred\t399\n{}", story(1)));
        Self { dir, tokenizer: random_model(tiny_config(), 1).unwrap().tokenizer }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn files(&self) -> LongFiles {
        LongFiles {
            text: Some(self.path("essay.txt")),
            squad: Some(self.path("squad.json")),
            hotpotqa: Some(self.path("hotpot.json")),
            babi: Some(self.dir.path().to_path_buf()),
        }
    }

    fn items(&self, task: LongTask, options: LongOptions) -> Vec<Item> {
        let built = task.build(&self.tokenizer, VOCAB, &self.files(), options);
        let built = built.unwrap_or_else(|error| panic!("{}: {error}", task.name()));
        assert_eq!(built.name, task.name());
        built.items
    }

    fn error(&self, task: LongTask, files: &LongFiles, options: LongOptions) -> String {
        let error = task.build(&self.tokenizer, VOCAB, files, options).unwrap_err();
        assert!(error.hint().is_some(), "{error}");
        error.to_string()
    }

    fn text(&self, item: &Item) -> String {
        self.tokenizer.decode(generation(item).prompt_ids(), false).unwrap()
    }
}

const OPTIONS: LongOptions = LongOptions { length: LENGTH, items: 3, seed: 7, chat: false };

fn generation(item: &Item) -> &dyn Generative {
    match &item.question {
        Question::Generation(question) => question.as_ref(),
        other => panic!("not a question that is answered in writing: {other:?}"),
    }
}

/// Those that are answered in writing and whose fixtures are long enough.
fn written() -> Vec<LongTask> {
    let but = [
        LongTask::RepeatedText,
        LongTask::BabiLong(2),
        LongTask::BabiLong(3),
        LongTask::BabiLong(4),
    ];
    LongTask::ALL.into_iter().filter(|task| !but.contains(task)).collect()
}

#[test]
fn items_fill_their_length_and_never_exceed_it() {
    let fixture = Fixture::new();
    for task in written() {
        let items = fixture.items(task, OPTIONS);
        assert_eq!(items.len(), OPTIONS.items, "{}", task.name());
        for (index, item) in items.iter().enumerate() {
            assert_eq!(item.id, format!("{}-{index}", task.name()));
            let question = generation(item);
            let tokens = question.prompt_ids().len() + question.max_new_tokens();
            assert!(tokens <= LENGTH, "{}: {tokens} tokens", item.id);
            // No unit of hay is longer than a document.
            let slack = if task == LongTask::Fwe { 1_500 } else { 500 };
            assert!(tokens + slack > LENGTH, "{}: {tokens} tokens", item.id);
            assert!(!question.targets().is_empty());
        }
    }
}

#[test]
fn the_question_begins_where_a_prompt_says() {
    let fixture = Fixture::new();
    for chat in [false, true] {
        for task in written() {
            for item in fixture.items(task, LongOptions { chat, ..OPTIONS }) {
                let question = generation(&item);
                let (before, asked) = question.prompt_ids().split_at(question.context_tokens());
                let [before, asked] =
                    [before, asked].map(|ids| fixture.tokenizer.decode(ids, false).unwrap());
                let begins = match task {
                    LongTask::Passkey => "\n\nWhat is the pass key?",
                    LongTask::Qa1 | LongTask::Qa2 => "Answer the question based on",
                    LongTask::Vt | LongTask::Cwe | LongTask::Fwe | LongTask::BabiLong(_) => {
                        "Question: "
                    }
                    LongTask::PlantedFacts => "",
                    _ => "What ",
                };
                assert!(asked.starts_with(begins), "{}: {asked:?}", item.id);
                if task == LongTask::PlantedFacts {
                    // What `still ask` puts between a document and its question comes before.
                    let asked = asked.split("?").next().unwrap_or_default();
                    assert!(asked.len() < 70 && !asked.contains(['.', '\n']), "{asked:?}");
                    assert!(before.ends_with("\nQuestion: "), "{}", item.id);
                }
                // The context is long, and the whole of it comes before.
                assert!(asked.len() < 700 && before.len() > LENGTH - 2_500, "{}", item.id);
            }
        }
    }
}

#[test]
fn needles_are_there_exactly_once() {
    let fixture = Fixture::new();
    for (task, needles, targets) in [
        (LongTask::NiahSingle1, 1, 1),
        (LongTask::NiahSingle2, 1, 1),
        (LongTask::NiahSingle3, 1, 1),
        (LongTask::NiahMultikey1, 4, 1),
        (LongTask::NiahMultikey2, 0, 1),
        (LongTask::NiahMultikey3, 0, 1),
        (LongTask::NiahMultivalue, 4, 4),
        (LongTask::NiahMultiquery, 4, 4),
    ] {
        for item in fixture.items(task, OPTIONS) {
            let text = fixture.text(&item);
            let question = generation(&item);
            assert_eq!(question.targets().len(), targets, "{}", item.id);
            for target in question.targets() {
                assert_eq!(text.matches(target).count(), 1, "{}: {target}", item.id);
                assert_eq!(text.matches(&format!(" is: {target}.")).count(), 1);
            }
            let all: Vec<&str> = text
                .match_indices("One of the special magic ")
                .map(|(at, _)| &text[at..])
                .collect();
            let key = |needle: &str| {
                needle.split(" for ").nth(1).unwrap().split(' ').next().unwrap().to_owned()
            };
            if needles > 0 {
                assert_eq!(all.len(), needles, "{}", item.id);
            } else {
                // Hay of needles: every key is another.
                let keys: std::collections::BTreeSet<String> =
                    all.iter().map(|needle| key(needle)).collect();
                assert!(all.len() > 50 && keys.len() == all.len(), "{}", item.id);
            }
            // The keys that are asked for are those of the targets.
            let (_, asked) = text.rsplit_once("\nWhat ").unwrap();
            for target in question.targets() {
                let needle =
                    all.iter().find(|n| n.split_once(" is: ").unwrap().1.starts_with(target));
                assert!(asked.contains(&key(needle.unwrap())), "{}", item.id);
            }
        }
    }
}

#[test]
fn a_seed_decides_everything_and_more_items_begin_with_the_same() {
    let fixture = Fixture::new();
    for task in written() {
        let ids = |options: LongOptions| -> Vec<Vec<u32>> {
            let items = fixture.items(task, options);
            items.iter().map(|item| generation(item).prompt_ids().to_vec()).collect()
        };
        let options = LongOptions { items: 2, length: 9_000, ..OPTIONS };
        let two = ids(options);
        assert_eq!(two, ids(options), "{}", task.name());
        assert_ne!(two, ids(LongOptions { seed: 8, ..options }), "{}", task.name());
        assert_ne!(two[0], two[1], "{}", task.name());
        // Pass keys share out the depth among them.
        if task != LongTask::Passkey {
            let more = ids(LongOptions { items: 4, ..options });
            assert_eq!(two, more[..2], "{}", task.name());
        }
    }
}

#[test]
fn documents_are_numbered_and_the_right_one_is_among_them() {
    let fixture = Fixture::new();
    for item in fixture.items(LongTask::Qa1, OPTIONS) {
        let (text, question) = (fixture.text(&item), generation(&item));
        let index: usize = item.id.rsplit_once('-').unwrap().1.parse().unwrap();
        let needed = format!(":\n{}\n\n", paragraph(index));
        assert_eq!(text.matches(&needed).count(), 1, "{}", item.id);
        let documents = text.matches("\nDocument ").count();
        assert!(documents > 10 && text.contains(&format!("\nDocument {documents}:\n")));
        // Its article first: nine more paragraphs.
        for other in 0..10 {
            assert!(text.contains(&paragraph(other)), "{other}");
        }
        assert!(text.ends_with(&format!("Question: Which town has {index} wells? Answer:")));
        assert_eq!(question.score(&format!(" Town {index}.")), 1.0);
    }
    for item in fixture.items(LongTask::Qa2, OPTIONS) {
        let text = fixture.text(&item);
        let index: usize = item.id.rsplit_once('-').unwrap().1.parse().unwrap();
        for own in 10 * index..10 * index + 10 {
            assert!(text.contains(&format!(":\nTitle {own}\nParagraph {own} ")), "{}", item.id);
        }
    }
}

#[test]
fn facts_keep_their_order_in_the_background() {
    let fixture = Fixture::new();
    let items = fixture.items(LongTask::BabiLong(1), OPTIONS);
    let text = fixture.text(&items[1]);
    let facts =
        ["Mary went to the office.", "John moved to the garden.", "back to the kitchen number 0."];
    let (_, context) = text.split_once("<context>\n").unwrap();
    let places: Vec<usize> = facts
        .iter()
        .map(|fact| {
            assert_eq!(context.matches(fact).count(), 1, "{fact}");
            context.find(fact).unwrap()
        })
        .collect();
    assert!(places.is_sorted(), "{places:?}");
    assert!(text.ends_with("\n</context>\n\nQuestion: Where is Mary?"), "{text}");
    assert_eq!(generation(&items[1]).score("The most recent location of Mary is kitchen."), 1.0);
    assert_eq!(generation(&items[1]).score("kitchen or office"), 0.0);
    // A story that is too long by itself is left out: two questions are left.
    let items = fixture.items(LongTask::BabiLong(5), LongOptions { length: 4_000, ..OPTIONS });
    let ids: Vec<&str> = items.iter().map(|item| item.id.as_str()).collect();
    assert_eq!(ids, ["babilong_qa5-1", "babilong_qa5-2"]);
}

#[test]
fn a_chat_template_goes_around_the_prompt_and_before_the_answer() {
    let fixture = Fixture::new();
    let items = fixture.items(LongTask::NiahSingle1, LongOptions { chat: true, ..OPTIONS });
    let text = fixture.text(&items[0]);
    assert!(text.starts_with("<|im_start|>user\nA special magic number is hidden"), "{text}");
    let (_, end) = text.split_once("mentioned in the provided text?").unwrap();
    let begins = "<|im_end|>\n<|im_start|>assistant\n The special magic number for ";
    assert!(end.starts_with(begins), "{end}");
    assert!(end.ends_with(" mentioned in the provided text is"), "{end}");
}

#[test]
fn repeated_text_is_scored_but_for_its_first_token() {
    let fixture = Fixture::new();
    let items = fixture.items(LongTask::RepeatedText, LongOptions { length: 101, ..OPTIONS });
    assert_eq!(items.len(), 3);
    let Question::Window(window) = &items[0].question else { panic!("{:?}", items[0]) };
    let twice = random_tokens(VOCAB, 50, OPTIONS.seed).repeat(2);
    assert_eq!((&window.ids, window.scored_from), (&twice, 51));
}

#[test]
fn what_is_missing_or_malformed_is_told() {
    let fixture = Fixture::new();
    let none = LongFiles::default();
    for (task, word) in [
        (LongTask::NiahSingle2, "niah_single_2 needs a plain text"),
        (LongTask::Qa1, "qa_1 needs questions in SQuAD's JSON format"),
        (LongTask::Qa2, "qa_2 needs HotpotQA's hotpot_dev_distractor_v1.json"),
        (LongTask::BabiLong(3), "babilong_qa3 needs the directory of bAbI's test files"),
    ] {
        assert!(fixture.error(task, &none, OPTIONS).starts_with(word));
    }
    // It is known before the items are made.
    let mut lacking = 0;
    for task in LongTask::ALL {
        task.check_files(&fixture.files()).unwrap();
        if let Err(error) = task.check_files(&none) {
            assert_eq!(error.to_string(), fixture.error(task, &none, OPTIONS), "{}", task.name());
            lacking += 1;
        }
    }
    assert_eq!(lacking, 13, "six tasks in a text, two of questions, five of bAbI");
    let broken = |name: &str, bytes: &[u8]| {
        let path = fixture.path(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let files = fixture.files();
    let squad = Some(broken("broken.json", b"{\n \"data\": [\n  {\"paragraphs\": 3}]}"));
    let error = fixture.error(LongTask::Qa1, &LongFiles { squad, ..files.clone() }, OPTIONS);
    assert!(error.contains("broken.json") && error.contains("line 3"), "{error}");
    let text = Some(broken("latin1.txt", b"one\ntwo\ncaf\xe9"));
    let error = fixture.error(LongTask::NiahSingle3, &LongFiles { text, ..files.clone() }, OPTIONS);
    assert!(error.contains("latin1.txt") && error.contains("line 3"), "{error}");
    broken("qa4_test.txt", b"1 The hallway is east.\n2 What is east?\thallway\n");
    let error = fixture.error(LongTask::BabiLong(4), &files, OPTIONS);
    assert!(error.contains("qa4_test.txt") && error.contains("line 2"), "{error}");
    let gone = Some(PathBuf::from("/nowhere/at/all"));
    let error =
        fixture.error(LongTask::BabiLong(1), &LongFiles { babi: gone, ..files.clone() }, OPTIONS);
    assert!(error.contains(&Path::new("/nowhere/at/all/qa1_test.txt").display().to_string()));
    let short = LongOptions { length: 300, ..OPTIONS };
    for task in
        [LongTask::NiahSingle1, LongTask::Vt, LongTask::Cwe, LongTask::Qa1, LongTask::Passkey]
    {
        let error = fixture.error(task, &files, short);
        assert!(error.contains("tokens, 300 are there"), "{error}");
    }
}

#[test]
fn tasks_have_the_names_that_others_call_them_by() {
    for task in LongTask::ALL {
        assert_eq!(LongTask::from_name(task.name()), Some(task));
    }
    assert_eq!(LongTask::from_name("ruler_vt"), Some(LongTask::Vt));
    assert_eq!(LongTask::from_name("ruler_qa_squad"), Some(LongTask::Qa1));
    assert_eq!(LongTask::from_name("niah_single_4"), None);
    assert_eq!(LongTask::ruler().len(), 13);
    assert_eq!(LongTask::ruler().last(), Some(&LongTask::Qa2));
}
