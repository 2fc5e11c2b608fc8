//! Stored rows as tensors of a saved state, and back.

use candle_core::{Device, Tensor};
use still_compute::Real;

use super::cells::Cells;
use crate::Result;
use crate::saved_state::SavedState;

/// Rows in [`Cells`], whatever their order there.
pub(crate) trait SavedRows<T: Real> {
    /// What they are stored in.
    fn cells(&self) -> &Cells<T>;

    /// What they are stored in.
    fn cells_mut(&mut self) -> &mut Cells<T>;

    /// Rows and their width.
    fn size(&self) -> (usize, usize);

    /// Adds rows of zeros or drops the last ones.
    fn set_len(&mut self, rows: usize);

    /// Where the values of the first `rows` rows lie, row after row.
    fn places(&self, rows: usize) -> impl Iterator<Item = usize>;

    /// Drops all rows from `rows` on.
    fn truncate(&mut self, rows: usize) {
        if rows < self.size().0 {
            self.set_len(rows);
        }
    }

    /// Puts the rows among a state's tensors.
    fn save(&self, state: &mut SavedState, part: usize, name: &str) -> Result<()> {
        let (rows, width) = self.size();
        state.put(part, name, self.cells().saved(self.places(rows), (rows, width))?);
        if let Some(scales) = self.cells().scales() {
            let scales = Tensor::from_slice(&scales[..rows], rows, &Device::Cpu)?;
            state.put(part, &scale(name), scales);
        }
        Ok(())
    }

    /// Takes the rows back, `rows` of them if that is known.
    fn restore(
        &mut self,
        state: &mut SavedState,
        part: usize,
        name: &str,
        rows: Option<usize>,
    ) -> Result<()> {
        let shape = [rows, Some(self.size().1)];
        let saved = state.take(part, name, self.cells().saved_dtype(), &shape)?;
        let rows = saved.dim(0)?;
        self.set_len(rows);
        let places: Vec<usize> = self.places(rows).collect();
        self.cells_mut().restore(places.into_iter(), &saved)?;
        if self.cells().scales().is_some() {
            let scales = state.take(part, &scale(name), T::DTYPE, &[Some(rows)])?;
            self.cells_mut().restore_scales(&scales.to_vec1()?);
        }
        Ok(())
    }
}

fn scale(name: &str) -> String {
    format!("{name}_scale")
}
