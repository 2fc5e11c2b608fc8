//! Documents in which facts are hidden among sentences that say little, and the questions about them.

use still_compute::random::uniform;

const WHO: [&str; 12] = [
    "The committee",
    "The museum",
    "The old mill",
    "The ferry company",
    "The market hall",
    "The school board",
    "The river authority",
    "The town council",
    "The post office",
    "The fishing fleet",
    "The orchestra",
    "The hospital",
];
const DID: [&str; 12] = [
    "announced",
    "considered",
    "repaired",
    "discussed",
    "described",
    "planned",
    "visited",
    "measured",
    "praised",
    "studied",
    "postponed",
    "inspected",
];
const WHAT: [&str; 12] = [
    "the northern road",
    "a new roof for the pavilion",
    "the state of the harbour wall",
    "an exhibition of maps",
    "the summer timetable",
    "a collection of letters",
    "the flower beds",
    "the winter festival",
    "a row of benches",
    "the footpath along the canal",
    "a set of drawings",
    "the school garden",
];
const WHEN: [&str; 12] = [
    "in early spring",
    "after a long debate",
    "during the autumn",
    "without much notice",
    "with help from volunteers",
    "before the holidays",
    "on a rainy morning",
    "for the second time",
    "to the surprise of many residents",
    "despite the cold weather",
    "with great care",
    "over several weeks",
];

/// One fact: how a document says it, what is asked, and a word of the right answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fact {
    /// A sentence.
    pub sentence: &'static str,
    /// A question that this sentence alone answers.
    pub question: &'static str,
    /// What a right answer contains, in lower case.
    pub answer: &'static str,
}

/// The facts of every document.
pub const FACTS: [Fact; 10] = [
    fact(
        "The research ship of the institute is called the Silver Heron.",
        "What is the research ship of the institute called?",
        "silver heron",
    ),
    fact(
        "The treasurer of the sailing club is Maria Okafor.",
        "Who is the treasurer of the sailing club?",
        "okafor",
    ),
    fact(
        "The code for the door of the archive is 7342.",
        "What is the code for the door of the archive?",
        "7342",
    ),
    fact("The stone bridge was completed in 1887.", "When was the stone bridge completed?", "1887"),
    fact(
        "The lighthouse at the point is painted green.",
        "What color is the lighthouse at the point?",
        "green",
    ),
    fact(
        "The library has a yearly budget of 45,000 pounds.",
        "What is the yearly budget of the library?",
        "45,000",
    ),
    fact(
        "The oldest tree in the park is a chestnut.",
        "What kind of tree is the oldest tree in the park?",
        "chestnut",
    ),
    fact(
        "The chess club meets every Thursday evening.",
        "On which day does the chess club meet?",
        "thursday",
    ),
    fact(
        "Dr. Lindqvist discovered the Roman coins in the cellar.",
        "Who discovered the Roman coins in the cellar?",
        "lindqvist",
    ),
    fact(
        "The night train to Norwich leaves from platform nine.",
        "From which platform does the night train to Norwich leave?",
        "nine",
    ),
];

const fn fact(sentence: &'static str, question: &'static str, answer: &'static str) -> Fact {
    Fact { sentence, question, answer }
}

impl Fact {
    /// Whether a text says it.
    pub fn is_in(&self, text: &str) -> bool {
        text.to_lowercase().contains(self.answer)
    }
}

/// A document of at least `words` words with all [`FACTS`], evenly spread in an order of the seed's.
pub fn document(words: usize, seed: u64) -> String {
    let pick = |list: &[&'static str], place: [usize; 3]| {
        let n = uniform(seed, place) * list.len() as f64;
        list[(n as usize).min(list.len() - 1)]
    };
    let mut sentences = Vec::new();
    let mut count = 0;
    while count < words {
        let n = sentences.len();
        let parts =
            [WHO, DID, WHAT, WHEN].iter().zip(0..).map(|(list, part)| pick(list, [1, n, part]));
        let sentence = parts.collect::<Vec<_>>().join(" ") + ".";
        count += sentence.split(' ').count();
        sentences.push(sentence);
    }
    let mut order: Vec<usize> = (0..FACTS.len()).collect();
    order.sort_by(|&a, &b| uniform(seed, [2, a, 0]).total_cmp(&uniform(seed, [2, b, 0])));
    let step = sentences.len() as f64 / FACTS.len() as f64;
    for (n, &fact) in order.iter().enumerate().rev() {
        sentences.insert(((n as f64 + 0.5) * step) as usize, FACTS[fact].sentence.to_owned());
    }
    let paragraphs: Vec<String> = sentences.chunks(6).map(|lines| lines.join(" ")).collect();
    paragraphs.join("\n\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fact_is_said_once_and_nothing_else_answers() {
        for seed in 0..3 {
            let text = document(500, seed);
            let count = text.split_whitespace().count();
            assert!((500..700).contains(&count), "{count}");
            for fact in FACTS {
                assert_eq!(text.matches(fact.sentence).count(), 1, "{fact:?}");
                assert!(!fact.is_in(&text.replace(fact.sentence, "")), "{fact:?}");
            }
        }
        assert_ne!(document(500, 0), document(500, 1));
        assert_eq!(document(500, 1), document(500, 1));
    }
}
