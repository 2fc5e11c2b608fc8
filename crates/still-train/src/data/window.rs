//! What a step reads: sequences of token ids, and which of their tokens a loss counts.

use crate::recipe::Objective;

/// Token ids of one sequence, or of several packed together: its segments.
///
/// Each segment is a sequence of its own: position, chunk phase and state begin anew, so that a packed document
/// gives what it gives alone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Window {
    ids: Vec<u32>,
    /// Where each segment ends in `ids`.
    ends: Vec<usize>,
    /// By token: whether its prediction counts; all do if absent.
    counted: Option<Vec<bool>>,
}

/// One sequence of a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment<'a> {
    /// Token ids.
    pub ids: &'a [u32],
    /// By token: whether stage 2 counts its prediction; all count if absent. Attention transfer counts every position.
    pub counted: Option<&'a [bool]>,
}

impl Window {
    /// Adds a segment; `counted` by token, all if absent.
    pub fn push(&mut self, ids: &[u32], counted: Option<&[bool]>) {
        if counted.is_some() || self.counted.is_some() {
            let all = self.counted.get_or_insert_with(|| vec![true; self.ids.len()]);
            match counted {
                Some(counted) => all.extend_from_slice(counted),
                None => all.resize(all.len() + ids.len(), true),
            }
        }
        self.ids.extend_from_slice(ids);
        self.ends.push(self.ids.len());
    }

    /// Token ids of all segments, one after the other.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Tokens of all segments.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether there is no token.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// The sequences, in order.
    pub fn segments(&self) -> impl Iterator<Item = Segment<'_>> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts.zip(&self.ends).map(|(start, &end)| Segment {
            ids: &self.ids[start..end],
            counted: self.counted.as_ref().map(|counted| &counted[start..end]),
        })
    }
}

impl From<Vec<u32>> for Window {
    /// One sequence, every prediction counted.
    fn from(ids: Vec<u32>) -> Self {
        Self { ends: vec![ids.len()], ids, counted: None }
    }
}

impl Segment<'_> {
    /// Predictions that stage 2 counts. Without a mask these are all positions (the teacher's distribution), or all
    /// but the last (the next token); with one, the positions before a counted token.
    pub fn predictions(&self, objective: Objective) -> usize {
        match (self.counted, objective) {
            (Some(counted), _) => counted.iter().skip(1).filter(|&&counted| counted).count(),
            (None, Objective::LogitKl | Objective::Mixed { .. }) => self.ids.len(),
            (None, Objective::CrossEntropy) => self.ids.len().saturating_sub(1),
        }
    }
}

/// Every segment of a step's windows, in order, with its share of the step's loss: windows weigh the same, the
/// segments of a window by their `weight`.
pub(crate) fn shares(
    windows: &[Window],
    weight: impl Fn(&Segment<'_>) -> usize,
) -> Vec<(Segment<'_>, f64)> {
    let of_window = 1.0 / windows.len().max(1) as f64;
    let mut all = Vec::with_capacity(windows.len());
    for window in windows {
        let whole = window.segments().map(|segment| weight(&segment)).sum::<usize>().max(1) as f64;
        all.extend(window.segments().map(|segment| {
            let share = weight(&segment) as f64 / whole;
            (segment, of_window * share)
        }));
    }
    all
}
