//! A decode step takes no memory that the step before did not have.
#![allow(unsafe_code, reason = "an allocator that counts")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use still_attention::RowDtype;
use still_model::random::{random_model, tiny_config};
use still_model::{LoraConfig, LoraTarget, Model, Student, likeliest};

struct Counting;

static CALLS: AtomicUsize = AtomicUsize::new(0);
static BYTES: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is the system allocator's.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        CALLS.fetch_add(1, Ordering::Relaxed);
        BYTES.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: by this function's own contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: by this function's own contract.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Of rayon: two short vectors each time that a step is handed to the pool's threads.
const POOL_CALLS: usize = 4;
const POOL_BYTES: usize = 4096;
/// Blocks of rayon's queue in 200 steps: it takes a new one after 63 jobs, and none while the last one freed is at hand. On a busy machine
/// two were seen.
const POOL_BLOCKS: usize = 200 * 2 / 63;

fn student(cap: Option<usize>) -> Model {
    let model = random_model(tiny_config(), 5).unwrap();
    let config = model.config();
    let mut still =
        still_attention::StillConfig::uniform(config.num_hidden_layers, config.geometry(), 16, 3);
    still.cap = cap;
    let mut student = Student::init(still, config, Default::default(), 0).unwrap();
    let lora = LoraConfig { rank: 2, alpha: 4.0, targets: LoraTarget::ALL.to_vec() };
    student.add_lora(config, lora, 0).unwrap();
    model.with_student(student)
}

/// Calls of the allocator and bytes taken over some steps, retirements and demotions included.
fn taken(model: &Model, steps: usize) -> (usize, usize) {
    let mut cache = model.new_cache(1, RowDtype::Bf16).unwrap();
    let ids: Vec<u32> = (0..200).map(|i| i * 7 % 250).collect();
    model.prefill(&ids, &mut cache).unwrap();
    let mut id = 3;
    for _ in 0..40 {
        id = likeliest(model.decode(&[id], &mut cache).unwrap());
    }
    let before = (CALLS.load(Ordering::Relaxed), BYTES.load(Ordering::Relaxed));
    for _ in 0..steps {
        id = likeliest(model.decode(&[id], &mut cache).unwrap());
    }
    (CALLS.load(Ordering::Relaxed) - before.0, BYTES.load(Ordering::Relaxed) - before.1)
}

#[test]
fn steps_take_no_memory() {
    let (calls, bytes) = taken(&student(Some(24)), 200);
    println!("{calls} calls, {bytes} bytes over 200 steps");
    assert!(calls <= 200 * POOL_CALLS + POOL_BLOCKS, "{calls} calls over 200 steps");
    assert!(bytes <= 200 * POOL_BYTES, "{bytes} bytes over 200 steps");
    // Without a cap the store of salient rows grows, by an eighth at a time.
    let (uncapped, _) = taken(&student(None), 200);
    assert!(uncapped <= calls + 100, "{uncapped} calls over 200 steps, {calls} with a cap");
}
