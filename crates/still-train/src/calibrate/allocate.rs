//! Bytes spent where they save most.

/// What is known of one head.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Choice {
    /// See [`super::HeadReport::retrieval`].
    pub retrieval: f64,
    /// Loss of each candidate.
    pub losses: Vec<f64>,
}

/// What one head gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Taken {
    /// Index of its candidate.
    pub candidate: usize,
    /// Whether it is whole because it retrieves.
    pub retrieves: bool,
}

/// One candidate for each head, of `bytes` `[head][candidate]` (the last is the whole head), at most `limit` in all; `None` if even
/// the smallest do not fit.
///
/// First every head gets the smallest budget that keeps a token, if all can have it: an attention sink is one token, and a head
/// without its sink is off whatever else it keeps. Then heads that retrieve are taken whole, the strongest first. Then the step with
/// the largest saving per byte is taken again and again: of each head only steps on the lower convex hull of its losses, so that
/// none hides a better one behind it.
pub(super) fn allocate(
    heads: &[Choice],
    bytes: &[Vec<usize>],
    limit: usize,
    retrieval_threshold: f64,
) -> Option<Vec<Taken>> {
    let whole = heads.first().map_or(0, |head| head.losses.len() - 1);
    let all = |candidate: usize| bytes.iter().map(|bytes| bytes[candidate]).sum::<usize>();
    let sink = usize::from(whole > 1);
    let least = if all(sink) <= limit { sink } else { 0 };
    let mut left = limit.checked_sub(all(least))?;
    let mut taken = vec![Taken { candidate: least, retrieves: false }; heads.len()];

    let mut by_retrieval: Vec<usize> = (0..heads.len()).collect();
    by_retrieval
        .sort_by(|&a, &b| heads[b].retrieval.total_cmp(&heads[a].retrieval).then(a.cmp(&b)));
    for index in by_retrieval {
        // A whole head has no linear state and may take fewer bytes than one with little.
        let step = bytes[index][whole].saturating_sub(bytes[index][least]);
        if heads[index].retrieval < retrieval_threshold || step > left {
            break;
        }
        left -= step;
        taken[index] = Taken { candidate: whole, retrieves: true };
    }

    let hulls: Vec<Vec<usize>> =
        heads.iter().zip(bytes).map(|(head, bytes)| hull(bytes, &head.losses)).collect();
    loop {
        let best = (0..heads.len())
            .filter_map(|index| {
                let now = taken[index].candidate;
                let next = *hulls[index].iter().find(|&&candidate| candidate > now)?;
                let cost = bytes[index][next].saturating_sub(bytes[index][now]);
                let losses = &heads[index].losses;
                let saving = losses[now] - losses[next];
                (cost <= left && saving > 0.0).then_some((saving / cost.max(1) as f64, index, next))
            })
            .max_by(|a, b| a.0.total_cmp(&b.0).then(b.1.cmp(&a.1)));
        let Some((_, index, next)) = best else { return Some(taken) };
        left -= bytes[index][next].saturating_sub(bytes[index][taken[index].candidate]);
        taken[index].candidate = next;
    }
}

/// Candidates on the lower convex hull of loss over bytes, ascending, as long as the loss falls.
fn hull(bytes: &[usize], losses: &[f64]) -> Vec<usize> {
    let slope = |a: usize, b: usize| (losses[b] - losses[a]) / (bytes[b] - bytes[a]).max(1) as f64;
    let mut hull: Vec<usize> = Vec::new();
    for next in 0..bytes.len() {
        // A whole head has no linear state and may cost less than an almost whole one.
        if hull.last().is_some_and(|&last| bytes[next] <= bytes[last]) {
            continue;
        }
        while let [.., before, last] = hull[..] {
            if slope(before, last) < slope(last, next) {
                break;
            }
            hull.pop();
        }
        hull.push(next);
    }
    hull
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: [usize; 4] = [10, 11, 14, 74];

    fn head(retrieval: f64, losses: [f64; 4]) -> Choice {
        Choice { retrieval, losses: losses.into() }
    }

    fn candidates(heads: &[Choice], limit: usize) -> Option<Vec<usize>> {
        let taken = allocate(heads, &vec![BYTES.to_vec(); heads.len()], limit, 0.1)?;
        let spent: usize = taken.iter().map(|taken| BYTES[taken.candidate]).sum();
        assert!(spent <= limit, "{spent} of {limit}");
        Some(taken.into_iter().map(|taken| taken.candidate).collect())
    }

    #[test]
    fn the_steepest_steps_are_taken_until_nothing_is_left() {
        let heads = [head(0.0, [4.0, 3.0, 2.9, 0.0]), head(0.0, [9.0, 8.5, 1.0, 0.9])];
        assert_eq!(candidates(&heads, 19), None);
        assert_eq!(candidates(&heads, 20), Some(vec![0, 0]));
        // Too little for both heads' first token: it goes where it saves most.
        assert_eq!(candidates(&heads, 21), Some(vec![1, 0]));
        assert_eq!(candidates(&heads, 22), Some(vec![1, 1]));
        assert_eq!(candidates(&heads, 25), Some(vec![1, 2]));
        assert_eq!(candidates(&heads, 1000), Some(vec![3, 3]));
    }

    #[test]
    fn heads_that_retrieve_are_whole_once_every_head_has_a_token() {
        let flat = [1.0, 1.0, 1.0, 1.0];
        let heads = [head(0.3, flat), head(0.9, flat), head(0.05, flat)];
        // Not even those: no head has a token that others lack.
        assert_eq!(candidates(&heads, 30 + 2), Some(vec![0, 0, 0]));
        assert_eq!(candidates(&heads, 33 + 62), Some(vec![1, 1, 1]));
        assert_eq!(candidates(&heads, 33 + 63), Some(vec![1, 3, 1]));
        // A third would fit, and does not retrieve.
        assert_eq!(candidates(&heads, 33 + 189), Some(vec![3, 3, 1]));
        // Whole heads come before steps that save more.
        let steep = [head(0.3, flat), head(0.0, [9.0, 8.0, 1.0, 0.0])];
        assert_eq!(candidates(&steep, 22 + 65), Some(vec![3, 1]));
        assert_eq!(candidates(&steep, 22 + 66), Some(vec![3, 2]));
    }

    #[test]
    fn candidates_above_the_hull_are_passed_over() {
        assert_eq!(hull(&BYTES, &[4.0, 3.9, 1.0, 0.5]), [0, 2, 3]);
        assert_eq!(hull(&BYTES, &[4.0, 1.0, 0.9, 0.5]), [0, 1, 2, 3]);
        assert_eq!(hull(&[10, 20, 20], &[4.0, 3.0, 0.0]), [0, 1]);
    }
}
