//! Stop a run and resume it: the student is the one that an uninterrupted run gives, bit for bit.
//!
//! `cargo run --release -p still-train --example resume_run`

use std::path::Path;

use still_model::Model;
use still_model::random::{random_model, tiny_config};
use still_train::{Observer, Recipe, Silent, StepReport, TrainError, Windows, linearize_windows};

/// Stops a run as Ctrl-C does, after so many steps.
struct StopAfter(usize);

impl Observer for StopAfter {
    fn on_step(&mut self, report: &StepReport) {
        println!("{} step {}: loss {:.5}", report.stage.name(), report.step, report.loss);
        self.0 = self.0.saturating_sub(1);
    }

    fn stop_requested(&self) -> bool {
        self.0 == 0
    }
}

/// Stops a run in its second stage and resumes it; compares its student with that of a run that is not stopped.
pub fn main() -> Result<(), Box<dyn std::error::Error>> {
    let model = random_model(tiny_config(), 0)?;
    let recipe = Recipe::parse(
        "[attention]\nchunk = 8\nbudget = 1\n[data]\nlength = 48\nmin_length = 8\n[transfer]\nsteps = 4\n[finetune]\nsteps = 4",
        &[],
    )?;
    let window = |n: u32| (0..48).map(|t| (t * t + 31 * n) % 256).collect();
    let windows = Windows::from_windows((0..6).map(window).collect(), recipe.seed);
    let run = |dir: &Path, resume, observer: &mut dyn Observer| {
        linearize_windows(&model, &recipe, &windows, dir, resume, observer)
    };

    let (stopped, whole) = (tempfile::tempdir()?, tempfile::tempdir()?);
    match run(stopped.path(), false, &mut StopAfter(6)) {
        Err(TrainError::Interrupted { path, .. }) => println!("saved in {}", path.display()),
        other => return Err(format!("the run was to be stopped: {:?}", other.err()).into()),
    }
    let resumed = run(stopped.path(), true, &mut Silent)?;
    let uninterrupted = run(whole.path(), false, &mut Silent)?;
    assert_eq!(learned(&resumed)?, learned(&uninterrupted)?);
    println!("the resumed run's student equals the uninterrupted one's");
    Ok(())
}

/// The bits of every learned value.
fn learned(model: &Model) -> Result<Vec<u32>, Box<dyn std::error::Error>> {
    let student = model.student.as_ref().ok_or("a run returns a student")?;
    let mut bits = Vec::new();
    student.map_tensors(|_, tensor| {
        let values = tensor.flatten_all()?.to_vec1::<f32>()?;
        bits.extend(values.into_iter().map(f32::to_bits));
        Ok(tensor.clone())
    })?;
    Ok(bits)
}
