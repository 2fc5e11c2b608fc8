//! Set-up of the process before any work.

/// Sets what libraries and system calls do by themselves.
pub fn prepare() {
    // The tensor library puts a backtrace into every error's text when RUST_BACKTRACE is set, and an error is one line.
    // SAFETY: no other thread runs yet.
    unsafe { std::env::set_var("RUST_LIB_BACKTRACE", "0") };
    #[cfg(unix)]
    // A file that grows beyond `ulimit -f` is an error of writing, not the end of the process.
    // SAFETY: no handler is installed, only the default one replaced by none.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN)
    };
}
