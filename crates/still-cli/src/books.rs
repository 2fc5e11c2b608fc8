//! The books that ship with `still`: training text and held-out text of the demo.

/// A text, embedded.
#[derive(Clone, Copy, Debug)]
pub struct Book {
    /// What it is called.
    pub title: &'static str,
    /// All of it that ships.
    pub text: &'static str,
}

/// What the demo trains on.
pub const TRAINING: Book = Book {
    title: "Middlemarch, Kidnapped and The Land of Little Rain",
    text: include_str!("../demo/train.txt"),
};

/// What nothing here trains on.
pub const HELDOUT: Book =
    Book { title: "The House on the Borderland", text: include_str!("../demo/heldout.txt") };
