//! The command on a pseudo-terminal, and what its screen shows.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Rows of every terminal.
const ROWS: u16 = 40;
/// How long something may take to show.
const PATIENCE: Duration = Duration::from_secs(120);

/// What Enter sends.
pub const ENTER: &str = "\r";
/// Ctrl-C.
pub const CTRL_C: &str = "\x03";
/// Ctrl-D.
pub const CTRL_D: &str = "\x04";
/// The arrow key.
pub const UP: &str = "\x1b[A";
/// The tabulator key.
pub const TAB: &str = "\t";

/// A terminal: what is written to the second is read from the first.
pub fn open(columns: u16) -> (File, OwnedFd) {
    let (mut ours, mut theirs) = (-1, -1);
    let size = libc::winsize { ws_row: ROWS, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: openpty reads the size and writes two descriptors, which are then owned here; the other arguments may be null.
    unsafe {
        let made = libc::openpty(
            &raw mut ours,
            &raw mut theirs,
            std::ptr::null_mut(),
            std::ptr::null(),
            &raw const size,
        );
        assert_eq!(made, 0);
        (File::from_raw_fd(ours), OwnedFd::from_raw_fd(theirs))
    }
}

/// A command that runs on a terminal of its own.
pub struct Terminal {
    child: Child,
    keys: File,
    shown: Arc<Mutex<Shown>>,
}

struct Shown {
    screen: vt100::Parser,
    /// All that was written to the terminal.
    bytes: Vec<u8>,
}

impl Terminal {
    /// Starts a command on a terminal that is its standard input, output and error.
    pub fn start(mut command: Command, columns: u16) -> Self {
        let (ours, theirs) = open(columns);
        command.env("TERM", "xterm-256color");
        command.stdin(theirs.try_clone().unwrap()).stdout(theirs.try_clone().unwrap());
        command.stderr(theirs);
        // SAFETY: setsid and ioctl may be called between fork and exec.
        unsafe {
            command.pre_exec(|| {
                let controls = libc::setsid() != -1 && libc::ioctl(0, libc::TIOCSCTTY, 0) == 0;
                if controls { Ok(()) } else { Err(std::io::Error::last_os_error()) }
            });
        }
        let child = command.spawn().unwrap();
        // The command holds the terminal's other side.
        drop(command);
        let screen = vt100::Parser::new(ROWS, columns, 1000);
        let shown = Arc::new(Mutex::new(Shown { screen, bytes: Vec::new() }));
        let (to, mut from) = (shown.clone(), ours.try_clone().unwrap());
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            // A terminal whose other side is gone ends with an error.
            while let Ok(count @ 1..) = from.read(&mut buffer) {
                let mut shown = to.lock().unwrap();
                shown.screen.process(&buffer[..count]);
                shown.bytes.extend(&buffer[..count]);
            }
        });
        Self { child, keys: ours, shown }
    }

    /// Types.
    pub fn send(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).unwrap();
    }

    /// The screen: its rows without spaces at their ends, from the first that is not empty to the last.
    pub fn screen(&self) -> String {
        self.shown.lock().unwrap().screen.screen().contents().trim_end().to_owned()
    }

    /// All that was written to the terminal so far.
    pub fn bytes(&self) -> String {
        String::from_utf8_lossy(&self.shown.lock().unwrap().bytes).into_owned()
    }

    /// Whether a row of the screen goes on in the next because it is too long.
    pub fn wraps(&self) -> bool {
        let shown = self.shown.lock().unwrap();
        (0..ROWS).any(|row| shown.screen.screen().row_wrapped(row))
    }

    /// Rows that were too long, those that have left the screen too.
    pub fn rows_too_long(&self) -> Vec<String> {
        let mut shown = self.shown.lock().unwrap();
        let screen = shown.screen.screen_mut();
        let columns = screen.size().1;
        let mut rows = Vec::new();
        for above in (0..).step_by(usize::from(ROWS)) {
            screen.set_scrollback(above);
            let texts = screen.rows(0, columns).enumerate();
            let long = texts.filter(|(row, _)| screen.row_wrapped(*row as u16));
            rows.extend(long.map(|(_, text)| text));
            if screen.scrollback() < above {
                break;
            }
        }
        screen.set_scrollback(0);
        rows
    }

    /// Waits until the screen shows something `times` times; returns how long it took.
    #[track_caller]
    pub fn until_times(&mut self, words: &str, times: usize) -> Duration {
        let started = Instant::now();
        loop {
            let ended = self.child.try_wait().unwrap();
            if ended.is_some() {
                // What it wrote last.
                std::thread::sleep(Duration::from_millis(100));
            }
            let screen = self.screen();
            if screen.matches(words).count() >= times {
                return started.elapsed();
            }
            assert!(
                ended.is_none() && started.elapsed() < PATIENCE,
                "no {words:?} ({times} times; {ended:?}):\n{screen}"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until the screen shows something.
    #[track_caller]
    pub fn until(&mut self, words: &str) -> Duration {
        self.until_times(words, 1)
    }

    /// Waits until the cursor stands after the last row's prompt.
    #[track_caller]
    pub fn until_prompt(&mut self) {
        let started = Instant::now();
        loop {
            let screen = self.screen();
            if screen.lines().last().is_some_and(|line| line.trim_end() == ">") {
                return;
            }
            assert!(started.elapsed() < PATIENCE, "no prompt:\n{screen}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Its process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The modes of the terminal, as `stty` would show them.
    pub fn local_modes(&self) -> libc::tcflag_t {
        use std::os::fd::AsRawFd;
        // SAFETY: an all-zero termios is valid, and tcgetattr only writes to it.
        unsafe {
            let mut now: libc::termios = std::mem::zeroed();
            assert_eq!(libc::tcgetattr(self.keys.as_raw_fd(), &raw mut now), 0);
            now.c_lflag
        }
    }

    /// Waits until the command ends; returns its exit code.
    #[track_caller]
    pub fn code(&mut self) -> i32 {
        let started = Instant::now();
        while self.child.try_wait().unwrap().is_none() {
            assert!(started.elapsed() < PATIENCE, "it goes on:\n{}", self.screen());
            std::thread::sleep(Duration::from_millis(5));
        }
        let status = self.child.wait().unwrap();
        // What it wrote last.
        std::thread::sleep(Duration::from_millis(100));
        status.code().expect("ended by a signal")
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
