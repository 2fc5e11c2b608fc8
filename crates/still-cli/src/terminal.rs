//! The terminal's modes during a chat, restored when the process ends.

#[cfg(unix)]
mod modes {
    use std::sync::{Mutex, PoisonError};

    static BEFORE: Mutex<Option<libc::termios>> = Mutex::new(None);
    /// Ends a line editor's bracketed paste.
    const NO_BRACKETED_PASTE: &str = "\x1b[?2004l";

    /// Takes note of the modes, before a line editor changes them.
    pub fn remember() {
        // SAFETY: an all-zero termios is valid, and tcgetattr only writes to it.
        let (now, got) = unsafe {
            let mut now: libc::termios = std::mem::zeroed();
            let got = libc::tcgetattr(libc::STDIN_FILENO, &raw mut now);
            (now, got == 0)
        };
        *BEFORE.lock().unwrap_or_else(PoisonError::into_inner) = got.then_some(now);
    }

    /// Sets the modes as they were; does nothing if no note was taken.
    pub fn restore() {
        if set(|_| {}) {
            crate::printer::say(NO_BRACKETED_PASTE);
        }
    }

    /// Sets the modes as they were but for a change.
    fn set(change: impl FnOnce(&mut libc::termios)) -> bool {
        let before = *BEFORE.lock().unwrap_or_else(PoisonError::into_inner);
        before.is_some_and(|mut modes| {
            change(&mut modes);
            // SAFETY: tcsetattr reads a termios that tcgetattr wrote.
            unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, &raw const modes) == 0 }
        })
    }

    /// While it lives, what is typed is not shown: it would stand in the middle of a reply. It waits for the next prompt.
    #[derive(Debug)]
    pub struct NoEcho;

    impl NoEcho {
        /// From now on.
        pub fn begin() -> Self {
            set(|modes| modes.c_lflag &= !libc::ECHO);
            Self
        }
    }

    impl Drop for NoEcho {
        fn drop(&mut self) {
            set(|_| {});
        }
    }
}

/// Without Unix's terminals there is nothing to restore.
#[cfg(not(unix))]
mod modes {
    pub fn remember() {}
    pub fn restore() {}

    #[derive(Debug)]
    pub struct NoEcho;

    impl NoEcho {
        pub fn begin() -> Self {
            Self
        }
    }
}

pub use modes::{NoEcho, remember, restore};
