//! The terminal of the bars, a little narrower than it is.
//!
//! A terminal echoes `^C` where the cursor stands. At the end of a row that is full the echo would begin the next one, and what
//! wipes the bar's row would wipe that.

use std::io;

use console::Term;
use indicatif::{ProgressDrawTarget, TermLike};

/// Columns of an echo, and one in which the cursor stands.
const ECHO: u16 = 3;
/// Most frames a second.
const MOST_FRAMES: u8 = 20;

/// Columns of a bar's row.
pub fn width() -> u16 {
    Term::stderr().size().1.saturating_sub(ECHO)
}

/// Where bars are drawn.
pub fn target() -> ProgressDrawTarget {
    ProgressDrawTarget::term_like_with_hz(Box::new(Narrow(Term::buffered_stderr())), MOST_FRAMES)
}

#[derive(Debug)]
struct Narrow(Term);

impl TermLike for Narrow {
    fn width(&self) -> u16 {
        width()
    }

    fn height(&self) -> u16 {
        self.0.size().0
    }

    fn move_cursor_up(&self, n: usize) -> io::Result<()> {
        self.0.move_cursor_up(n)
    }

    fn move_cursor_down(&self, n: usize) -> io::Result<()> {
        self.0.move_cursor_down(n)
    }

    fn move_cursor_right(&self, n: usize) -> io::Result<()> {
        self.0.move_cursor_right(n)
    }

    fn move_cursor_left(&self, n: usize) -> io::Result<()> {
        self.0.move_cursor_left(n)
    }

    fn write_line(&self, line: &str) -> io::Result<()> {
        self.0.write_line(line)
    }

    fn write_str(&self, text: &str) -> io::Result<()> {
        self.0.write_str(text)
    }

    fn clear_line(&self) -> io::Result<()> {
        self.0.clear_line()
    }

    fn flush(&self) -> io::Result<()> {
        self.0.flush()
    }
}
