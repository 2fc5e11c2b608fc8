//! Files that a command will write, checked before it does any work.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use still_model::files::{self, WRITING};

use crate::disk::room;
use crate::errors::user;

/// Bytes that a page or a table takes.
const SMALL: u64 = 1 << 20;
/// How the title of every page begins.
const TITLE: &str = "<title>still ";
/// What the numbers of `still report eval` are. The note ends every file of its tables.
pub const TABLES_NOTE: &str = "Shares are in per cent, with their 95 % interval: Wilson's where every answer is right or wrong, else 1.96 standard \
    errors to either side. Intervals of differences are from a paired bootstrap over items, of perplexities in nats of negative \
    log-likelihood. \"–\" is what was not measured, or has no chance level.";

/// What tells a file that still wrote before from any other: an existing file of another kind is never replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutputKind {
    /// An HTML page.
    Page,
    /// Tables of `still report eval`.
    Markdown,
    /// Results of `still eval`.
    Results,
    /// Budgets of `still calibrate`.
    Budgets,
    /// A quantized student.
    Student,
    /// A page of `still man`.
    ManPage,
    /// A session of `still ask` or `still chat`.
    Session,
}

/// What becomes of a file that is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    /// It is replaced, if it is ours.
    Replace,
    /// It is refused: `--overwrite` was not given.
    Refuse,
}

impl Existing {
    /// By the option `--overwrite`.
    pub fn overwrite(overwrite: bool) -> Self {
        if overwrite { Self::Replace } else { Self::Refuse }
    }
}

/// The output files of a command. Each is checked as it is added.
#[derive(Debug, Default)]
pub struct Outputs {
    /// Where they really are, with their options.
    taken: Vec<(PathBuf, &'static str)>,
    /// What the command reads.
    read: Vec<PathBuf>,
}

impl Outputs {
    /// Makes sure that a file can be written where an option says; removes what a killed command left of one there.
    ///
    /// # Errors
    /// Something else of that name, a directory that is missing or cannot be written, a file that another option names.
    pub fn file(
        &mut self,
        option: &'static str,
        path: &Path,
        ours: OutputKind,
        existing: Existing,
    ) -> anyhow::Result<()> {
        self.place(option, path)?;
        // A link that leads nowhere is an error of `place`.
        let Ok(metadata) = path.metadata() else { return Ok(()) };
        if existing == Existing::Refuse {
            return Err(user(
                format!("{} exists already", path.display()),
                format!("choose another {option}, or add --overwrite"),
            ));
        }
        if metadata.len() > 0 && !ours.wrote(path) {
            return Err(user(
                format!("{} exists and is not {}", path.display(), ours.name()),
                format!(
                    "choose another {option}, or move that file away: only what still wrote is replaced"
                ),
            ));
        }
        Ok(())
    }

    /// Makes sure that a path is that of a regular file, or of none, in a directory that can be written.
    ///
    /// # Errors
    /// As [`Outputs::file`].
    pub fn place(&mut self, option: &'static str, path: &Path) -> anyhow::Result<()> {
        let wrong = |what: &str| {
            user(
                format!("{option} {}: {what}", path.display()),
                format!("name a file for {option}"),
            )
        };
        if ends_like_a_directory(path) {
            return Err(wrong("it is the name of a directory"));
        }
        let there = path.metadata();
        if let Some(kind) = there.as_ref().ok().and_then(files::kind) {
            return Err(wrong(&format!("it is {kind}")));
        }
        let target = match path.symlink_metadata() {
            Ok(link) if link.is_symlink() && there.is_err() => {
                return Err(wrong("it is a link that leads nowhere"));
            }
            Ok(link) if link.is_symlink() => path.canonicalize()?,
            _ => path.to_path_buf(),
        };
        let parent = files::parent(&target);
        writable(&parent)?;
        room(&parent, "what is written", SMALL, "free some disk space")?;
        let real = parent.canonicalize()?.join(target.file_name().unwrap_or_default());
        if let Some((_, other)) = self.taken.iter().find(|(path, _)| *path == real) {
            return Err(user(
                format!("{other} and {option} name one file, {}", path.display()),
                "name two files",
            ));
        }
        if self.read.contains(&real) {
            return Err(would_replace(option, path));
        }
        self.taken.push((real, option));
        Ok(())
    }

    /// Makes sure that no output, named before or after, is a file that the command reads.
    ///
    /// # Errors
    /// The first that is.
    pub fn spare<'a>(&mut self, inputs: impl IntoIterator<Item = &'a Path>) -> anyhow::Result<()> {
        for input in inputs {
            let Ok(real) = input.canonicalize() else { continue };
            if let Some((_, option)) = self.taken.iter().find(|(path, _)| *path == real) {
                return Err(would_replace(option, input));
            }
            self.read.push(real);
        }
        Ok(())
    }
}

fn would_replace(option: &str, input: &Path) -> anyhow::Error {
    user(
        format!("{option} would replace {}, which is read", input.display()),
        format!("name another file for {option}"),
    )
}

impl OutputKind {
    fn name(self) -> &'static str {
        match self {
            Self::Page => "a page that still wrote",
            Self::Markdown => "a table that still wrote",
            Self::Results => "a result of `still eval`",
            Self::Budgets => "budgets of `still calibrate`",
            Self::Student => "a student that `still export` wrote",
            Self::ManPage => "a manual page that still wrote",
            Self::Session => "a session that still wrote",
        }
    }

    /// Whether a file is of this kind.
    fn wrote(self, path: &Path) -> bool {
        let has_keys = |keys: &[&str]| {
            let text = files::read_to_string(path).unwrap_or_default();
            serde_json::from_str::<serde_json::Value>(&text)
                .is_ok_and(|value| keys.iter().all(|key| value.get(key).is_some()))
        };
        match self {
            Self::Page => head(path).contains(TITLE),
            Self::Markdown => {
                files::read_to_string(path).is_ok_and(|text| text.contains(TABLES_NOTE))
            }
            Self::Results => has_keys(&["model", "tasks", "timing"]),
            Self::Budgets => has_keys(&["budgets", "chunk", "at_length"]),
            Self::Student => still_model::is_exported_student(path),
            Self::ManPage => head(path).contains(".TH still"),
            Self::Session => still_model::ChatSession::is_saved_in(path),
        }
    }
}

/// The first bytes of a file, as text.
fn head(path: &Path) -> String {
    use std::io::Read;
    let mut bytes = Vec::new();
    if let Ok(file) = files::open(path) {
        let _ = file.take(1024).read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn ends_like_a_directory(path: &Path) -> bool {
    path.file_name().is_none()
        || path.as_os_str().as_encoded_bytes().last().is_some_and(|&byte| byte == b'/')
}

/// An error unless files can be made in a directory: one is made there, and removed. What killed commands left there of theirs goes
/// too.
///
/// # Errors
/// A directory that is missing or cannot be written.
pub fn writable(dir: &Path) -> anyhow::Result<()> {
    files::sweep(dir, WRITING);
    let error = match files::staging_dir(dir, WRITING) {
        Ok(_removed) => return Ok(()),
        Err(error) => error,
    };
    let hint = match error.kind() {
        ErrorKind::NotFound => "make the directory first, or choose another place",
        ErrorKind::NotADirectory => "a part of the path is a file: choose another place",
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => "free some disk space",
        _ => "choose a place that can be written",
    };
    // The system's words without the random name that was tried.
    let what = error.get_ref().map_or_else(|| error.to_string(), |_| error.kind().to_string());
    Err(user(format!("nothing can be written in {}: {what}", dir.display()), hint))
}

/// The nearest directory of a path that is there.
pub fn existing_ancestor(path: &Path) -> PathBuf {
    let mut ancestors = path.ancestors().filter(|path| !path.as_os_str().is_empty());
    ancestors.find(|path| path.exists()).map_or_else(|| ".".into(), Path::to_path_buf)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(path: &Path, existing: Existing) -> anyhow::Result<()> {
        Outputs::default().file("--html", path, OutputKind::Page, existing)
    }

    #[test]
    fn a_file_of_others_is_never_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("page.html");
        page(&file, Existing::Refuse).unwrap();
        std::fs::write(&file, "<!doctype html>mine").unwrap();
        for existing in [Existing::Refuse, Existing::Replace] {
            assert!(page(&file, existing).unwrap_err().to_string().contains("exists"));
        }
        let ours = format!("<!doctype html>\n{}", TITLE);
        std::fs::write(&file, ours).unwrap();
        assert!(page(&file, Existing::Refuse).is_err());
        page(&file, Existing::Replace).unwrap();
        std::fs::write(&file, "").unwrap();
        page(&file, Existing::Replace).unwrap();
        assert_eq!(dir.path().read_dir().unwrap().count(), 1);
    }

    #[test]
    fn places_that_are_no_files_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let told = |path: &Path| page(path, Existing::Replace).unwrap_err().to_string();
        assert!(told(dir.path()).contains("it is a directory"));
        assert!(told(&dir.path().join("x/")).contains("the name of a directory"));
        assert!(told(&dir.path().join("no/x.html")).contains("nothing can be written in"));
        #[cfg(unix)]
        {
            assert!(told(Path::new("/dev/null")).contains("it is a device"));
            let link = dir.path().join("link");
            std::os::unix::fs::symlink("nowhere", &link).unwrap();
            assert!(told(&link).contains("leads nowhere"));
        }
    }

    #[test]
    fn one_file_is_one_output_and_no_input() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a");
        let mut outputs = Outputs::default();
        outputs.place("--json", &file).unwrap();
        let twice = outputs.place("--html", &dir.path().join("./a")).unwrap_err().to_string();
        assert!(twice.contains("--json and --html"), "{twice}");
        std::fs::write(&file, "text").unwrap();
        let read = outputs.spare([file.as_path()]).unwrap_err().to_string();
        assert!(read.contains("--json would replace"), "{read}");
    }
}
