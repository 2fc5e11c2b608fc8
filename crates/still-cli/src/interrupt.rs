//! Signals: the effect of Ctrl-C, SIGTERM and SIGHUP on a command.
//!
//! Where nothing has to be saved the process ends at once, from a thread of its own, whatever the others do. A second signal
//! always ends it, from the signal's handler.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError, mpsc};
use std::time::Duration;

use anyhow::Context;
use still_model::Cancel;

use crate::printer::Printer;
use crate::progress;
use crate::terminal;

/// What a signal does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum OnSignal {
    /// Ends the process: there is nothing to save.
    End,
    /// Raises the flag; a command that has not ended by itself after a moment is ended.
    Finish,
    /// Raises the flag: the step that goes on is done and saved, however long it takes.
    Save,
    /// Raises the flag: what goes on may end within a time that the command sets.
    #[cfg_attr(not(feature = "serve"), allow(dead_code, reason = "the server's"))]
    Drain,
    /// Ctrl-C raises the flag, which cuts a reply; other signals end the process.
    Cut,
}

/// How long [`OnSignal::Finish`] waits.
const MOMENT: Duration = Duration::from_millis(800);
/// How long [`OnSignal::Cut`] waits before it says that it was heard.
const ACKNOWLEDGED: Duration = Duration::from_millis(400);
/// How long a stderr that takes nothing may hold up the end.
const LAST_WORDS: Duration = Duration::from_millis(400);

static FLAG: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);
static ON_SIGNAL: AtomicU8 = AtomicU8::new(OnSignal::End as u8);
static HINT: Mutex<Option<String>> = Mutex::new(None);
/// What [`OnSignal::Save`] finishes first.
static DOING: Mutex<&str> = Mutex::new("this step");

/// From now on signals do what [`on_signal`] says; at first they end the process.
///
/// # Errors
/// If the system refuses the handler.
pub fn install(printer: &Printer) -> anyhow::Result<()> {
    let printer = printer.clone();
    listen(move |signal| handle(signal, &printer)).context("cannot catch Ctrl-C")
}

/// What a signal does from now on.
pub fn on_signal(what: OnSignal) {
    ON_SIGNAL.store(what as u8, Ordering::SeqCst);
}

/// From now on a signal has `doing` finished and saved.
pub fn save_after(doing: &'static str) {
    *DOING.lock().unwrap_or_else(PoisonError::into_inner) = doing;
    on_signal(OnSignal::Save);
}

/// What to do after a signal has ended the process, as a hint.
pub fn hint(text: impl Into<String>) {
    *HINT.lock().unwrap_or_else(PoisonError::into_inner) = Some(text.into());
}

/// The flag, for what takes long in libraries.
pub fn flag() -> Cancel {
    Cancel::from(FLAG.clone())
}

/// Whether a signal came since the flag was last lowered.
pub fn raised() -> bool {
    FLAG.load(Ordering::SeqCst)
}

/// Lowers the flag; says whether it was raised.
pub fn take() -> bool {
    FLAG.swap(false, Ordering::SeqCst)
}

fn handle(signal: i32, printer: &Printer) {
    let what = ON_SIGNAL.load(Ordering::SeqCst);
    let is = |of: OnSignal| what == of as u8;
    if is(OnSignal::Cut) && signal == SIGINT {
        FLAG.store(true, Ordering::SeqCst);
        // Most replies are cut before that could be read. One step of a large model takes longer.
        std::thread::sleep(ACKNOWLEDGED);
        if raised() {
            // What stands on the line is a reply, which stays.
            printer.line_end();
            printer.step("Stopping", "after this step; Ctrl-C once more ends the chat");
        }
    } else if is(OnSignal::Save) {
        FLAG.store(true, Ordering::SeqCst);
        let doing = *DOING.lock().unwrap_or_else(PoisonError::into_inner);
        printer.step(
            "Stopping",
            format_args!("after {doing}, which is then saved; once more to end at once"),
        );
    } else if is(OnSignal::Drain) {
        FLAG.store(true, Ordering::SeqCst);
        printer
            .step("Stopping", "when the answers that go on have ended; once more to end at once");
    } else {
        if is(OnSignal::Finish) {
            FLAG.store(true, Ordering::SeqCst);
            std::thread::sleep(MOMENT);
        }
        end(signal, printer);
    }
}

/// Says so and ends the process, without waiting for its threads.
fn end(signal: i32, printer: &Printer) -> ! {
    let (said, wait) = mpsc::channel();
    let printer = printer.clone();
    std::thread::spawn(move || {
        let hint = HINT.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let hint = hint.unwrap_or_else(|| "nothing was left half-done: start it again".into());
        terminal::restore();
        progress::close();
        printer.error(&format!("interrupted by {}", name(signal)), Some(&hint));
        let _ = said.send(());
    });
    let _ = wait.recv_timeout(LAST_WORDS);
    exit(128 + signal)
}

const SIGINT: i32 = 2;

/// The exit code after Ctrl-C.
pub const EXIT_INTERRUPTED: u8 = 128 + SIGINT as u8;

fn name(signal: i32) -> &'static str {
    match signal {
        SIGINT => "Ctrl-C",
        1 => "SIGHUP (the terminal was closed)",
        15 => "SIGTERM",
        _ => "a signal",
    }
}

/// Ends the process as it stands: destructors would wait for threads that are at work.
fn exit(code: i32) -> ! {
    #[cfg(unix)]
    // SAFETY: _exit takes a number and does not return.
    unsafe {
        libc::_exit(code)
    }
    #[cfg(not(unix))]
    std::process::exit(code)
}

#[cfg(unix)]
fn listen(handle: impl Fn(i32) + Send + 'static) -> std::io::Result<()> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    use signal_hook::{flag, iterator::Signals};

    // `nohup` has SIGHUP ignored, and it stays so. Shells ignore SIGINT for what scripts run in the background; one that is sent
    // there nevertheless is meant.
    let caught = [Some(SIGINT), Some(SIGTERM), (!is_ignored(SIGHUP)).then_some(SIGHUP)];
    let caught: Vec<i32> = caught.into_iter().flatten().collect();
    for &signal in &caught {
        // Before the flag can be raised: the second signal ends the process.
        flag::register_conditional_shutdown(signal, 128 + signal, FLAG.clone())?;
    }
    let mut signals = Signals::new(&caught)?;
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || signals.forever().for_each(handle))
        .map(drop)
}

#[cfg(unix)]
fn is_ignored(signal: i32) -> bool {
    // SAFETY: an all-zero sigaction is valid, and sigaction without a new one only writes to it.
    unsafe {
        let mut now: libc::sigaction = std::mem::zeroed();
        libc::sigaction(signal, std::ptr::null(), &raw mut now) == 0
            && now.sa_sigaction == libc::SIG_IGN
    }
}

/// Without Unix's signals a thread looks for Ctrl-C: the C library's handlers may do no more than raise a flag.
#[cfg(not(unix))]
fn listen(handle: impl Fn(i32) + Send + 'static) -> std::io::Result<()> {
    use signal_hook::flag;

    /// How often it looks.
    const PERIOD: Duration = Duration::from_millis(50);

    // Before the flag can be raised: the second signal ends the process.
    flag::register_conditional_shutdown(SIGINT, 128 + SIGINT, FLAG.clone())?;
    let came = Arc::new(AtomicBool::new(false));
    flag::register(SIGINT, came.clone())?;
    let look = move || {
        loop {
            std::thread::sleep(PERIOD);
            if came.swap(false, Ordering::SeqCst) {
                handle(SIGINT);
            }
        }
    };
    std::thread::Builder::new().name("signals".into()).spawn(look).map(drop)
}
