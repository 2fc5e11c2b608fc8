//! Delayed selection. On arrival of token `c·C`, `c ≥ 2`, chunk `c−2` retires:
//!
//! ```text
//! its top-budget tokens by score              join the salient set
//! under a cap K: all but the K best of it     are demoted
//! each other token, each demoted one          is absorbed
//! ```

use std::cmp::Ordering;

use super::head::Head;
use super::linear_state::LinearState;
use super::{recall_error, router};
use crate::config::Router;

/// What a selection head has of the chunks that are retired, and the scores.
pub(super) struct Memory {
    /// Salient tokens, in order.
    pub salient: Vec<usize>,
    pub state: LinearState,
    /// `[N]`; with `self_recall` those that the last retirement gave.
    score: Vec<f64>,
    /// `[N]`; what each token had when its chunk retired.
    pub score_at_retirement: Vec<f64>,
}

impl Memory {
    pub fn new(head: &Head<'_>) -> Self {
        let score = router::scores(head);
        Self {
            salient: Vec::new(),
            state: LinearState::new(2 * head.config.feature_dim, head.input.geometry.head_dim),
            score_at_retirement: score.clone(),
            score,
        }
    }

    /// Retires chunk `chunk − 2` and gives the tokens that are absorbed; `given` `[N]` replaces the router if there is one.
    pub fn retire(&mut self, head: &Head<'_>, chunk: usize, given: Option<&[u32]>) -> Vec<usize> {
        let arriving: Vec<usize> =
            ((chunk - 2) * head.config.chunk..(chunk - 1) * head.config.chunk).collect();
        if head.config.router == Router::SelfRecall {
            self.recall(head, &arriving);
        }
        let absorbed = match given {
            Some(given) => self.follow(given, chunk, arriving),
            None => self.select(head, arriving),
        };
        self.salient.sort_unstable();
        if head.config.branches.linear {
            let first = (chunk - 2) * head.config.chunk;
            for &j in &absorbed {
                let (key, value) = row(head, j, first);
                self.state.absorb(&head.phi_k(key), value);
            }
        }
        absorbed
    }

    /// Scores salient and arriving tokens by the state as it is.
    fn recall(&mut self, head: &Head<'_>, arriving: &[usize]) {
        for &j in self.salient.iter().chain(arriving) {
            let (key, value) = row(head, j, arriving[0]);
            self.score[j] = recall_error(&head.phi_k(key), &self.state.s, &self.state.z, value);
        }
        for &j in arriving {
            self.score_at_retirement[j] = self.score[j];
        }
    }

    /// By score, under the budget and the cap. Gives the tokens that are absorbed.
    fn select(&mut self, head: &Head<'_>, mut arriving: Vec<usize>) -> Vec<usize> {
        let by_rank = |a: &usize, b: &usize| rank(&self.score, *a, *b);
        arriving.sort_by(by_rank);
        let mut absorbed = arriving.split_off(router::budget(head));
        self.salient.extend(arriving);
        if let Some(cap) = head.config.cap
            && self.salient.len() > cap
        {
            self.salient.sort_by(by_rank);
            absorbed.extend(self.salient.split_off(cap));
        }
        absorbed
    }

    /// By a selection that is given. Gives the tokens that are absorbed.
    fn follow(&mut self, given: &[u32], chunk: usize, arriving: Vec<usize>) -> Vec<usize> {
        let all = self.salient.iter().copied().chain(arriving);
        let (absorbed, salient) = all.partition(|&j| given[j] as usize == chunk);
        self.salient = salient;
        absorbed
    }
}

/// Key and value of a token: those that were kept if its chunk retired before the one that begins with token `first`.
fn row<'a>(head: &Head<'a>, j: usize, first: usize) -> (&'a [f64], &'a [f64]) {
    match j < first {
        true => (head.kept_key(j), head.kept_value(j)),
        false => (head.key(j), head.value(j)),
    }
}

/// The higher score first; of equal ones the earlier token.
fn rank(score: &[f64], a: usize, b: usize) -> Ordering {
    score[b].total_cmp(&score[a]).then(a.cmp(&b))
}
