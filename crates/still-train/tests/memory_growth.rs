//! Memory does not grow with the number of steps.

#![cfg(target_os = "linux")]

mod common;
#[path = "common/memory.rs"]
mod memory;

use common::{model, recipe, windows};
use memory::resident_bytes;
use still_train::{Observer, Stage, StepReport, linearize_windows};

/// What a stage may grow by between steps 100 and 500: 10 KiB a step, less than one step's activations.
const TOLERANCE: usize = 4 << 20;

/// Resident memory at steps 100 and 500 of each stage.
#[derive(Default)]
struct Watcher(Vec<(Stage, usize, usize)>);

impl Observer for Watcher {
    fn on_step(&mut self, report: &StepReport) {
        if report.step == 100 || report.step == 500 {
            self.0.push((report.stage, report.step, resident_bytes("VmRSS")));
        }
    }
}

#[test]
fn five_hundred_steps_need_no_more_than_one_hundred() {
    let recipe = recipe(&[
        "transfer.steps=500",
        "transfer.batch=1",
        "finetune.steps=500",
        "finetune.batch=1",
        "finetune.dropout=0.1",
        "evaluation.every=100",
        "evaluation.windows=1",
        "evaluation.keep_best=true",
        "guard.max_heldout_growth=0",
        "checkpoint.every=100",
    ]);
    let heldout: Vec<u32> = (0..48).map(|t| t * 5 % 256).collect();
    let windows = windows().with_heldout(vec![heldout.into()]);
    let dir = tempfile::tempdir().unwrap();
    let mut watcher = Watcher::default();
    linearize_windows(&model(), &recipe, &windows, dir.path(), false, &mut watcher).unwrap();
    let [transfer_100, transfer_500, finetune_100, finetune_500] = watcher.0[..] else {
        panic!("{:?}", watcher.0)
    };
    for (early, late) in [(transfer_100, transfer_500), (finetune_100, finetune_500)] {
        assert!(late.2 <= early.2 + TOLERANCE, "{early:?}, then {late:?}");
    }
}
