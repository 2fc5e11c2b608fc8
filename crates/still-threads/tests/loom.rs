//! Every order in which threads can go through phases.
#![cfg(loom)]

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::thread;
use still_threads::{Failed, Phases};

/// Of each test: the first orders of a model are those with the fewest switches.
const LONGEST: std::time::Duration = std::time::Duration::from_secs(60);

/// A value that one thread at a time may write: loom fails where two meet.
struct Cell(UnsafeCell<usize>);

// SAFETY: loom checks every access.
unsafe impl Sync for Cell {}
// SAFETY: a number.
unsafe impl Send for Cell {}

impl Cell {
    fn new() -> Self {
        Self(UnsafeCell::new(0))
    }

    fn get(&self) -> usize {
        // SAFETY: loom checks that nobody writes it.
        self.0.with(|value| unsafe { *value })
    }

    fn set(&self, to: usize) {
        // SAFETY: loom checks that it is nobody else's.
        self.0.with_mut(|value| unsafe { *value = to });
    }
}

/// Every order with at most so many preemptions, counted.
fn model(preemptions: usize, body: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_duration = Some(LONGEST);
    let count = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counting = count.clone();
    builder.check(move || {
        counting.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        body();
    });
    let count = count.load(std::sync::atomic::Ordering::Relaxed);
    println!("{count} orders with at most {preemptions} preemptions");
    assert!(count > 100);
}

/// Each phase writes what the phase before read: `cells[unit]` is the sum of both plus 1.
fn run(
    phases: &Phases,
    cells: &[[Cell; 2]; 2],
    done: &AtomicUsize,
    count: u32,
) -> Result<(), Failed> {
    for number in 0..count {
        let (from, to) = (number as usize % 2, (number as usize + 1) % 2);
        let Some(work) = phases.enter(number, 2, 1)? else { continue };
        // What a member computes for itself before its first piece.
        let sum = cells[from][0].get() + cells[from][1].get() + 1;
        for part in work {
            assert_eq!(part.len(), 1);
            cells[to][part.start].set(sum);
            done.fetch_add(1, Ordering::Relaxed);
        }
    }
    Ok(())
}

fn together(threads: usize, count: u32) {
    let shared = Arc::new((
        Phases::new(),
        [[Cell::new(), Cell::new()], [Cell::new(), Cell::new()]],
        AtomicUsize::new(0),
    ));
    let others: Vec<_> = (1..threads)
        .map(|_| {
            let shared = shared.clone();
            thread::spawn(move || run(&shared.0, &shared.1, &shared.2, count).unwrap())
        })
        .collect();
    run(&shared.0, &shared.1, &shared.2, count).unwrap();
    others.into_iter().for_each(|thread| thread.join().unwrap());
    assert_eq!(shared.2.load(Ordering::Relaxed), 2 * count as usize);
    let last = count as usize % 2;
    // 1, 3, 7, 15 …
    assert_eq!(shared.1[last].each_ref().map(Cell::get), [(1 << count) - 1; 2]);
}

#[test]
fn two_threads_do_every_unit_once_and_see_the_phase_before() {
    model(2, || together(2, 1));
    model(1, || together(2, 2));
}

#[test]
fn three_threads_do_so_too() {
    model(1, || together(3, 1));
}

#[test]
fn nobody_waits_for_a_thread_that_failed() {
    model(2, || {
        let phases = Arc::new(Phases::new());
        let other = {
            let phases = phases.clone();
            thread::spawn(move || {
                for number in 0..2 {
                    match phases.enter(number, 2, 1) {
                        Ok(Some(mut work)) => {
                            if number == 1 {
                                let _taken = work.next();
                                phases.fail();
                                return;
                            }
                            work.by_ref().for_each(drop);
                        }
                        Ok(None) => {}
                        Err(Failed) => return,
                    }
                }
                phases.fail();
            })
        };
        // Whether it fails depends on who was first; it never hangs.
        for number in 0..3 {
            match phases.enter(number, 2, 1) {
                Ok(Some(work)) => work.for_each(drop),
                Ok(None) => {}
                Err(Failed) => break,
            }
        }
        other.join().unwrap();
        assert_eq!(phases.enter(9, 1, 1).err(), Some(Failed));
    });
}
