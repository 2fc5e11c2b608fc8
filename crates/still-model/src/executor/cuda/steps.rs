//! A decode step of sequences that have a cache each: one graph for each number of rows, whoever is in them.

use still_attention::{GraphState, GraphStep, StepTable};

use super::step_graph::StepGraph;
use super::{in_graph, small_batch};
use crate::cache::{Cache, Workspace};
use crate::error::Result;
use crate::model::Model;

/// Rows of a step at most: more sequences take several steps.
const MOST_ROWS: usize = 256;

/// Graphs that are kept. Each has memory of its own.
const KEPT: usize = 8;

/// Captured steps, the last used last.
#[derive(Debug, Default)]
pub(crate) struct Steps {
    steps: Vec<Step>,
    /// Rows of the last step whose logits are still where it left them.
    last: Option<usize>,
}

/// A step of so many rows.
#[derive(Debug)]
struct Step {
    rows: usize,
    graph: StepGraph,
    /// Of every layer, which the graph reads.
    tables: Vec<StepTable>,
}

impl Steps {
    /// The logits of the last step.
    pub fn logits(&self) -> Result<Option<&[f32]>> {
        match (self.last, self.steps.last()) {
            (Some(rows), Some(step)) => step.graph.last_logits(rows).map(Some),
            _ => Ok(None),
        }
    }

    /// The step of `rows` rows of a model, captured if there is none, last in the list.
    fn step(
        &mut self,
        model: &Model,
        rows: usize,
        like: &[&mut dyn GraphState],
    ) -> Result<&mut Step> {
        let fits = |step: &Step| {
            let mut layers = step.tables.iter().zip(like);
            step.rows == rows
                && step.graph.fits(model, &of_layers(&step.tables))
                && layers.all(|(table, state)| table.takes(&**state))
        };
        let step = match self.steps.iter().position(fits) {
            Some(at) => self.steps.remove(at),
            None => {
                // One that no longer fits makes room before.
                self.steps.retain(|step| step.rows != rows);
                if self.steps.len() == KEPT {
                    self.steps.remove(0);
                }
                let table = |state: &&mut dyn GraphState| Ok(StepTable::new(&**state, rows)?);
                let tables = like.iter().map(table).collect::<Result<Vec<_>>>()?;
                Step { rows, graph: StepGraph::capture(model, &of_layers(&tables), rows)?, tables }
            }
        };
        self.steps.push(step);
        let at = self.steps.len() - 1;
        Ok(&mut self.steps[at])
    }
}

fn of_layers(tables: &[StepTable]) -> Vec<&dyn GraphStep> {
    tables.iter().map(|table| table as _).collect()
}

/// Feeds a token to each cache, whose layers can be in a graph, and leaves the logits in the workspace.
pub(super) fn replay(
    model: &Model,
    ids: &[u32],
    caches: &mut [&mut Cache],
    workspace: &mut Workspace,
) -> Result<()> {
    let Workspace { logits, rows: all_rows, scratch } = workspace;
    let most = all_rows.unwrap_or(MOST_ROWS).min(MOST_ROWS);
    scratch.steps.last = None;
    logits.clear();
    let positions: Vec<usize> = caches.iter().map(|cache| cache.position(0)).collect();
    let layers = caches.iter_mut().map(|cache| in_graph(&mut cache.layers));
    let mut states = layers.collect::<Result<Vec<_>>>()?;
    // Before any sequence is fed.
    for (states, position) in states.iter_mut().zip(&positions) {
        states.iter_mut().try_for_each(|state| state.reserve(position + 1))?;
    }
    let parts = ids.chunks(most).zip(positions.chunks(most)).zip(states.chunks_mut(most));
    let alone = ids.len() <= most;
    for ((ids, positions), states) in parts {
        let rows = all_rows.map_or_else(|| rows_for(model, ids.len()), |_| most);
        let Some(like) = states.first() else { continue };
        let step = scratch.steps.step(model, rows, like)?;
        for (n, table) in step.tables.iter_mut().enumerate() {
            table.place(states.iter().map(|of| &*of[n]))?;
        }
        step.graph.launch(ids, positions)?;
        states.iter_mut().flatten().for_each(|state| state.count());
        let made = step.graph.logits(ids.len())?;
        if !alone {
            logits.extend_from_slice(made);
        }
    }
    scratch.steps.last = alone.then_some(ids.len());
    Ok(())
}

/// Rows of a step of so many sequences: as many where the kernels of small batches take them, else a power of two.
fn rows_for(model: &Model, sequences: usize) -> usize {
    if small_batch::fits(model, sequences) { sequences } else { sequences.next_power_of_two() }
}
